"""Configs are compared with plain PyTorch before a GPU runs them: what is wrong is left out, and all of it remembered."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engines import Engine
from torch import nn

from lstm_triton import LSTM
from lstm_triton.kernels import backward, forward
from lstm_triton.layer import comparison, first_use
from lstm_triton.planning import memory, route, store
from lstm_triton.planning.table import Entry

pytestmark = pytest.mark.machine

PLAIN = dict(
    plain={}, norm=dict(layer_norm=True), peephole=dict(peephole=True), zoneout=dict(zoneout=(0.2, 0.3)),
    dropout=dict(variational_dropout=0.3), coupled=dict(coupled_gates=True), clips=dict(cell_clip=0.5, recurrent_grad_clip=0.1),
)  # fmt: skip


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[str, str]]]:
    """What has been compared, with the complaint; in a folder of its own, as the first process that comes."""
    monkeypatch.setenv("LSTM_TRITON_CHECK", "first")
    monkeypatch.setenv("LSTM_TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(route, "_wrong", {})
    made: list[tuple[str, str]] = []
    real = comparison.complaint

    def noted(one: comparison.Pass, *configs) -> str:
        made.append((one.which, real(one, *configs)))
        return made[-1][1]

    monkeypatch.setattr(comparison, "complaint", noted)
    forget()
    yield made
    forget()


def forget() -> None:
    """Be another process."""
    first_use._settled.clear()
    first_use._found.clear()
    first_use._read.cache_clear()
    first_use._warn_once.cache_clear()
    route._wrong.clear()
    route._refusal.cache_clear()
    memory.forget()


def train(module: LSTM, x: torch.Tensor, **marks: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    out, (h_n, c_n) = module(x, **marks)
    out.float().square().sum().backward()
    return [out.detach(), h_n.detach(), c_n.detach(), *(p.grad.clone() for p in module.parameters())]


MARKS = dict(lengths=torch.tensor([3, 1]), reset=torch.tensor([[False, False], [True, False], [False, True]]))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("variant", PLAIN)
def test_what_is_right_is_used_and_compared_once(engine: Engine, variant: str, dtype: torch.dtype, compared) -> None:
    module = LSTM(5, 20, bidirectional=variant == "plain", **PLAIN[variant]).to(dtype)
    x = torch.randn(3, 2, 5).to(dtype)
    with engine() as machine:
        train(module, x, **MARKS)
        train(module, x[:, :1], lengths=torch.tensor([2]), reset=torch.zeros(3, 1, dtype=torch.bool))
    assert [found for _, found in compared] == [""] * len(compared)
    assert {which for which, _ in compared} == {"forward", "backward"}
    assert len(compared) == 2
    assert machine.launches.count("lstm_backward_kernel") == 3


@pytest.mark.parametrize(
    "options", [dict(recompute="chunk:2", bidirectional=True), dict(recompute="gates"), dict()], ids=str
)
def test_windows_single_steps_and_ensembles(engine: Engine, options: dict, compared) -> None:
    members = [LSTM(4, 16, precision="tf32x3", **options) for _ in range(2)]
    x = torch.randn(3, 2, 4)
    with engine():
        train(members[0], x)
        with torch.no_grad():
            members[0](x[:1])
        if not options:
            parameters, _ = torch.func.stack_module_state(members)
            torch.func.vmap(lambda p: torch.func.functional_call(members[0], p, (x,)))(parameters)
    assert compared
    assert {found for _, found in compared} == {""}


def marks_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of Triton's, see perf/NOTES.md: gradients with `reset` are garbage, and nothing else is."""
    for module in (forward, backward):
        monkeypatch.setattr(module, "wide_marks", lambda reset: reset)


def test_a_wrong_binary_is_left_out(
    engine: Engine, compared, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`auto` takes another plan or PyTorch's path, with a warning for each config; gradients are right."""
    marks_in_bytes(monkeypatch)
    module, x = LSTM(5, 16).half(), torch.randn(3, 2, 5).half()
    with engine() as machine, caplog.at_level(logging.WARNING, "lstm_triton"):
        found = train(module, x, reset=MARKS["reset"])
        assert any("wrong: the gradient of" in complaint for _, complaint in compared)
        warnings = [text for text in caplog.messages if "left out" in text]
        assert len(warnings) == sum(bool(complaint) for _, complaint in compared)
        assert all("report" in text and "doctor" in text for text in warnings)
        train(module, x, reset=MARKS["reset"])
        assert [text for text in caplog.messages if "left out" in text] == warnings
        with torch.no_grad():
            launches = len(machine.launches)
            module(x)  # what the bug does not touch still runs, unless every config was wrong
            assert (len(machine.launches) > launches) != bool(module.refusal(x))
    reference = LSTM(5, 16, backend="torch").half()
    reference.load_state_dict(module.state_dict())
    for ours, theirs in zip(found, train(reference, x, reset=MARKS["reset"])):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=5e-3)


def test_where_nothing_is_left_triton_raises_and_auto_goes_on(
    engine: Engine, compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "complaint", lambda *_: "wrong: everything")
    module, x = LSTM(5, 16).half(), torch.randn(3, 2, 5).half()
    plain = nn.LSTM(5, 16).half()
    plain.load_state_dict(module.state_dict())
    with engine() as machine:
        for _ in range(2):
            found = module(x)[0]
        assert not machine.launches
        assert "was wrong on stand-in when it was checked" in module.refusal(x)
        torch.testing.assert_close(found, plain(x)[0])
        with pytest.raises(RuntimeError, match="was wrong on stand-in when it was checked"):
            LSTM(5, 16, backend="triton").half()(x)
        monkeypatch.setenv("LSTM_TRITON_STRICT", "1")
        with pytest.raises(RuntimeError, match="was wrong"):
            module(x)


def test_a_first_call_that_triton_was_asked_for_raises(engine: Engine, compared, monkeypatch) -> None:
    monkeypatch.setattr(comparison, "complaint", lambda *_: "wrong: everything")
    with engine(), pytest.raises(RuntimeError, match="was wrong on stand-in"):
        LSTM(5, 16, backend="triton").half()(torch.randn(3, 2, 5).half())


def test_another_process_reads_what_was_found(engine: Engine, compared, monkeypatch: pytest.MonkeyPatch) -> None:
    marks_in_bytes(monkeypatch)
    module, x = LSTM(5, 16).half(), torch.randn(3, 2, 5).half()
    with engine():
        train(module, x, reset=MARKS["reset"])
        before = list(compared)
        forget()
        train(module, x, reset=MARKS["reset"])
        assert compared == before
        forget()
        monkeypatch.setenv("LSTM_TRITON_CHECK", "always")
        train(module, x, reset=MARKS["reset"])
        assert compared == before * 2
    (path,) = Path(store.cache_dir() / "checks").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [complaint for _, complaint in lines] == [complaint for _, complaint in before] * 2


def test_records_of_other_drivers_and_kernels_are_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine():
        device = route.kernel_device(torch.device("cpu"))
    paths = {first_use.record_path(device)}
    monkeypatch.setattr(first_use, "driver_version", lambda: "575.57.08")
    paths.add(first_use.record_path(device))
    monkeypatch.setattr(first_use, "kernels_hash", lambda: "abc")
    paths.add(first_use.record_path(device))
    assert len(paths) == 3


def test_a_corrupt_record_is_passed_over(engine: Engine, compared, caplog: pytest.LogCaptureFixture) -> None:
    module, x = LSTM(5, 16).half(), torch.randn(3, 2, 5).half()
    with engine(), torch.no_grad():
        module(x)
        (path,) = Path(store.cache_dir() / "checks").iterdir()
        path.write_text('["half a li\n17\n' + path.read_text())
        for _ in range(2):
            forget()
            module(x)
        assert len(compared) == 1, "the line that is whole was read"
        assert [text for text in caplog.messages if "2 lines of the record" in text] == caplog.messages
        path.write_bytes(b"\xff\xfe\x00")
        forget()
        module(x)
    assert len(compared) == 2
    assert "is ignored" in caplog.messages[-1]


def test_a_folder_that_cannot_be_written(engine: Engine, compared, caplog, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LSTM_TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with engine(), torch.no_grad():
        for size in (16, 20, 16):
            LSTM(5, size).half()(torch.randn(3, 2, 5).half())
    assert len(compared) == 2
    assert [text for text in caplog.messages if "is not remembered" in text] == caplog.messages
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("reason", ["off", "capture", "table", "plan"])
def test_what_is_not_compared(engine: Engine, reason: str, compared, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = LSTM(5, 16, precision="tf32"), torch.randn(3, 2, 5)
    if reason == "off":
        monkeypatch.setenv("LSTM_TRITON_CHECK", "off")
    if reason == "capture":
        monkeypatch.setattr(first_use, "is_capturing", lambda device: True)
    with engine():
        device = route.kernel_device(x.device)
        with torch.no_grad():
            if reason == "plan":
                config = (
                    "placement=local protocol=none resident=True units_first=False split_k=1 block_b=16 block_h=16 "
                )
                config += "block_k=16 num_warps=4 num_stages=1 max_batch_tiles=0"
                weights = list(module.parameters())
                from lstm_triton import functional

                functional.lstm(x, None, weights, backend="triton", precision="tf32", plan=f"{config}|{config}")
            elif reason == "table":
                problem = route.Problem("forward", 16, 2, 1, "float32", "tf32")
                chosen = route.plan_for(problem, device).config
                table = store.new_table(device, {})
                table.entries[route.bucket_of(problem)] = Entry(chosen, {}, True)
                with store.using(table, device):
                    module(x)
            else:
                module(x)
    assert not compared
    assert not (store.cache_dir() / "checks").exists()


def test_what_does_not_compile_is_left_out(engine: Engine, compared, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    real, failing = comparison.forward_pass.lstm_forward, []

    def limited(gates, w_hh, state, layout, config, *rest, **options):
        if not failing:
            failing.append(config)
        if config == failing[0]:
            raise OutOfResources(300_000, 200_000, "shared memory")
        return real(gates, w_hh, state, layout, config, *rest, **options)

    monkeypatch.setattr(comparison.forward_pass, "lstm_forward", limited)
    module, x = LSTM(5, 16, backend="triton").half(), torch.randn(3, 2, 5).half()
    with engine(), torch.no_grad():
        assert module(x)[0].isfinite().all()
    assert failing[0] in next(iter(route._wrong.values()))


@pytest.mark.parametrize("compiled", [False, True])
def test_training_goes_on_where_only_the_pass_back_is_wrong(
    engine: Engine, compiled: bool, compared, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A config that is wrong for a loss on h_n alone, which shows when it is asked for: by PyTorch, with a warning."""
    real = comparison.complaint

    def partly(one: comparison.Pass, *configs) -> str:
        if one.which == "backward" and one.given.h_n is not None:
            return "wrong: the gradient of everything"
        return real(one, *configs)

    monkeypatch.setattr(comparison, "complaint", partly)
    route.warn_once_of_the_loop.cache_clear()
    module, x = LSTM(5, 16).half(), torch.randn(3, 2, 5).half()
    plain = nn.LSTM(5, 16).half()
    plain.load_state_dict(module.state_dict())
    call = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
    with engine():
        call(x)[1][0].float().sum().backward()
    plain(x)[1][0].float().sum().backward()
    for ours, theirs in zip(module.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-2, atol=5e-3)
    assert any("no config of a backward pass is left" in text for text in caplog.messages)


def test_errors_of_the_device_are_not_complaints(engine: Engine, compared, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments) -> str:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(comparison, "complaint", fail)
    with engine(), torch.no_grad(), pytest.raises(RuntimeError, match="illegal memory access"):
        LSTM(5, 16).half()(torch.randn(3, 2, 5).half())
    assert not route._wrong

    def no_room(*arguments) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(comparison, "complaint", no_room)
    with engine(), torch.no_grad():
        LSTM(5, 16).half()(torch.randn(3, 2, 5).half())
    assert not first_use._found, "another process compares it"


def test_what_pytorch_cannot_compute_is_not_compared(engine: Engine, compared, monkeypatch, caplog) -> None:
    def fail(*arguments, **options):
        raise RuntimeError("gather has no deterministic implementation")

    monkeypatch.setattr(comparison.reference, "ensemble_forward", fail)
    with engine() as machine, torch.no_grad():
        for _ in range(2):
            LSTM(5, 16).half()(torch.randn(3, 2, 5).half())
    assert [text for text in caplog.messages if "no deterministic implementation" in text] == caplog.messages
    assert len(caplog.messages) == 1
    assert machine.launches.count("lstm_forward_kernel") == 3, "one of them to be compared"


def test_random_numbers_of_the_user_stay_theirs(engine: Engine, compared) -> None:
    module, x = LSTM(5, 16, zoneout=(0.1, 0.1)).half(), torch.randn(3, 2, 5).half()
    states = []
    with engine():
        for _ in range(2):
            torch.manual_seed(5)
            train(module, x)
            states.append(torch.get_rng_state())
    assert compared
    assert torch.equal(*states)


def test_the_drivers_version(monkeypatch: pytest.MonkeyPatch) -> None:
    real = first_use.driver_version.__wrapped__
    monkeypatch.setattr(first_use, "Path", lambda name: SimpleNamespace(read_text=lambda: "575.57.08\n"))
    assert real() == "575.57.08"

    def absent() -> str:
        raise FileNotFoundError

    monkeypatch.setattr(first_use, "Path", lambda name: SimpleNamespace(read_text=absent))
    assert real() == str(torch.version.hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    assert real() == "12080"
