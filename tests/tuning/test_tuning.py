"""Plans from tables, where tables come from, and the search that makes them, in Triton's interpreter."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planning.test_table import BOUT, CONFIG, H100, PROBLEM, table
from processes import FOREVER, side_by_side

from lstm_triton.kernels.config import Config
from lstm_triton.layer import op
from lstm_triton.planning import route, store
from lstm_triton.planning.cudnn import Call
from lstm_triton.planning.device import INTERPRETER, KNOWN
from lstm_triton.planning.planner import candidates, fits, plan
from lstm_triton.planning.problem import Problem, bucket_of
from lstm_triton.planning.table import NO_TABLE, Contest, Entry, Table, load
from lstm_triton.tuning import first_call, search
from lstm_triton.tuning.search import search as search_configs

CPU = torch.device("cpu")
TINY = Problem("forward", 16, 2, 1, "float32", "ieee")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LSTM_TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(first_call, "_TRIED", set())
    monkeypatch.setattr(first_call, "SECONDS", math.inf)
    monkeypatch.setattr(search, "REPEAT", 1)
    monkeypatch.setattr(store, "_IN_USE", {})
    store._found.cache_clear()
    yield tmp_path
    store._found.cache_clear()


def only(problem: Problem, config: Config) -> Table:
    entry = Entry(config, {config.encode(): 1.0}, True)
    return replace(table(), name="mine", entries={bucket_of(problem): entry})


def test_a_plan_comes_from_the_table_first() -> None:
    chosen = plan(PROBLEM, H100, table())
    assert chosen.source == table().name
    assert replace(chosen.config, max_batch_tiles=0) == CONFIG
    assert chosen.config.max_batch_tiles == H100.multiprocessors // 32
    assert plan(PROBLEM, H100).source == "heuristic"
    # The same bucket has the same plan; another one has the heuristic's.
    assert plan(replace(PROBLEM, batch=20, hidden_size=504), H100, table()).config.block_k == CONFIG.block_k
    for other in (replace(PROBLEM, batch=33), replace(PROBLEM, hidden_size=511), replace(PROBLEM, which="backward")):
        assert plan(other, H100, table()).source == "heuristic"


@pytest.mark.parametrize(
    "config",
    [
        Config("grid", "mailbox", True, True, 1, 64, 128, 512, 8),  # more shared memory than there is
        Config("grid", "mailbox", True, True, 1, 64, 16, 256, 4),  # spills
        Config("local", "none", True, True, 1, 16, 256, 256, 8),  # does not hold H
        Config("grid", "flags", True, True, 1, 16, 16, 256, 2),  # as many warps as no candidate has
    ],
)
def test_an_entry_that_does_not_fit_is_not_used(config: Config) -> None:
    assert plan(PROBLEM, H100, only(PROBLEM, config)).source == "heuristic"


def test_an_entry_never_makes_more_programs_wait_than_are_resident() -> None:
    small = replace(H100, multiprocessors=20)  # 32 hidden tiles: not even one batch tile
    assert plan(PROBLEM, small, table()).config.block_h > CONFIG.block_h
    lonely = replace(H100, cooperative=False)
    assert plan(PROBLEM, lonely, table()).config.placement == "stepwise"


def write(device=H100, text: str | None = None) -> Path:
    path = store.user_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table().dump() if text is None else text)
    return path


def test_the_users_table_is_active_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.active_table(H100) is NO_TABLE
    store._found.cache_clear()
    path = write()
    assert store.active_table(H100).name == path.stem
    assert route.plan_for(PROBLEM, H100).source == path.stem
    monkeypatch.setenv("LSTM_TRITON_AUTOTUNE", "off")
    assert route.plan_for(PROBLEM, H100).source == "heuristic"
    monkeypatch.setenv("LSTM_TRITON_AUTOTUNE", "sometimes")
    with pytest.raises(ValueError, match="LSTM_TRITON_AUTOTUNE should be one of off, cached, on, got: 'sometimes'"):
        route.plan_for(PROBLEM, H100)


def test_users_entries_go_before_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "shipped"
    other = replace(PROBLEM, hidden_size=1024)
    slow = replace(CONFIG, num_warps=4)
    both = {bucket_of(PROBLEM): Entry(slow, {slow.encode(): 9.0}, True)} | only(other, CONFIG).entries
    replace(table(), entries=both).save(shipped / store.file_name(H100))
    monkeypatch.setattr(store, "SHIPPED", shipped)
    write()
    active = store.active_table(H100)
    assert active.entries[bucket_of(PROBLEM)].config == CONFIG
    assert active.entries[bucket_of(other)].config == CONFIG


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        (table().dump().replace('"format": 1', '"format": 7'), "format 7, expected 1"),
        (table(kernels="0" * 64).dump(), "other kernels"),
        (table(gpu="A100").dump(), "tuned on A100"),
    ],
)
def test_a_table_of_no_use_is_ignored_with_one_warning(text: str, complaint: str, caplog) -> None:
    path = write(text=text)
    with caplog.at_level(logging.WARNING, "lstm_triton"):
        for _ in range(3):
            assert store.active_table(H100) is NO_TABLE
    assert len(caplog.records) == 1
    assert complaint in caplog.text
    assert path.read_text() == text


def test_a_cache_folder_that_cannot_be_written(own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    (own_cache / "file").touch()
    monkeypatch.setenv("LSTM_TRITON_CACHE_DIR", str(own_cache / "file"))
    other = replace(PROBLEM, which="backward")
    for problem in (PROBLEM, other):
        store.keep(bucket_of(problem), table().entries[bucket_of(PROBLEM)], H100)
    assert "kept for this process only" in caplog.text
    assert set(store.active_table(H100).entries) == {bucket_of(PROBLEM), bucket_of(other)}


def test_what_cannot_be_looked_at_is_no_table(own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setenv("LSTM_TRITON_CACHE_DIR", str(own_cache / ("x" * 300)))
    assert store.active_table(H100) is NO_TABLE
    assert "is ignored" in caplog.text


def test_a_foreign_table_is_left_alone_by_tuning(caplog) -> None:
    text = table(kernels="0" * 64).dump()
    path = write(text=text)
    store.keep(bucket_of(PROBLEM), table().entries[bucket_of(PROBLEM)], H100)
    assert path.read_text() == text
    assert bucket_of(PROBLEM) in store.active_table(H100).entries


RANK = f"""
import datetime, os, sys
import torch.distributed as dist
from lstm_triton.planning.device import KNOWN
from lstm_triton.planning import store
rank, forever = int(sys.argv[1]), datetime.timedelta(seconds={FOREVER})
os.environ["LSTM_TRITON_CACHE_DIR"] = sys.argv[3]
meeting = dist.FileStore(sys.argv[2], 2)
meeting.set_timeout(forever)
dist.init_process_group("gloo", store=meeting, rank=rank, world_size=2, timeout=forever)
if rank == 1:
    dist.barrier()  # the other asks first
table = store.active_table(KNOWN["sm_90"])
if rank == 0:
    dist.barrier()
print(len(table.entries), table.name)
dist.barrier()
dist.destroy_process_group()
"""


def test_all_ranks_use_one_table(tmp_path: Path) -> None:
    """The rank that asks first decides, also for a rank whose own folder is empty."""
    commands = []
    write().rename(tmp_path / "kept")
    for rank in (0, 1):
        folder = tmp_path / f"rank{rank}"
        (folder / "tables").mkdir(parents=True)
        if rank == 0:
            (tmp_path / "kept").rename(folder / "tables" / store.file_name(H100))
        commands.append([sys.executable, "-c", RANK, str(rank), str(tmp_path / "rendezvous"), str(folder)])
    assert side_by_side(commands) == ["1 h100-132, as on every rank\n"] * 2


def test_the_search_measures_every_admissible_config() -> None:
    told = []
    entry = search_configs(TINY, INTERPRETER, CPU, op.layer, math.inf, tell=told.append)
    assert entry.complete
    assert len(entry.measured) == len(told) == 4
    assert entry.measured[entry.config.encode()] == min(entry.measured.values())
    assert entry.config.max_batch_tiles == 0


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_config_that_is_wrong_or_fails_is_left_out(which: str, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    problem = replace(TINY, which=which)
    real = search.Scratch._by_kernels

    def sabotaged(self, config: Config):
        if config.block_b == 16:
            return [result * 1.001 for result in real(self, config)]
        if config.block_b == 32:
            raise RuntimeError("out of resources\nand a long tail")
        return real(self, config)

    monkeypatch.setattr(search.Scratch, "_by_kernels", sabotaged)
    entry = search_configs(problem, INTERPRETER, CPU, op.layer, math.inf)
    assert entry.config.block_b in (8, 64)
    results = {Config.decode(key).block_b: value for key, value in entry.measured.items()}
    assert results[16].startswith("wrong: result 0 has an rms error of")
    assert results[32] == "RuntimeError: out of resources"
    assert len([record for record in caplog.records if "left out" in record.message]) == 2


def test_nothing_measured_is_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.Scratch, "complaint", lambda self, config: "no")
    assert search_configs(TINY, INTERPRETER, CPU, op.layer, math.inf) is None


@pytest.mark.parametrize(("deadline", "done"), [(-math.inf, 1), (3, 3)])
def test_the_search_stops_at_its_deadline_and_goes_on_from_there(deadline: float, done: int, clock_of_configs) -> None:
    first = search_configs(TINY, INTERPRETER, CPU, op.layer, deadline)
    assert len(first.measured) == done, "one config is measured however late it is"
    assert not first.complete
    told = []
    whole = search_configs(TINY, INTERPRETER, CPU, op.layer, math.inf, known=first, tell=told.append)
    assert whole.complete
    assert len(told) == 4 - done
    assert first.measured.items() <= whole.measured.items()


def test_no_tensor_but_scratch_is_touched() -> None:
    scratch = search.Scratch(TINY, INTERPRETER, CPU, op.layer)
    before = [t.clone() for t in (scratch.projected, scratch.w_hh, scratch.x, scratch.w_ih)]
    config = next(candidates(TINY, INTERPRETER))
    assert scratch.complaint(config) == ""
    scratch.times_per_step(config)
    for old, new in zip(before, (scratch.projected, scratch.w_hh, scratch.x, scratch.w_ih)):
        assert torch.equal(old, new)


def test_tuning_at_the_first_call(own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(store, "active_table", lambda device: store.read(store.user_path(device), device))
    first_call.tune(TINY, INTERPRETER, CPU, op.layer)
    written = load(store.user_path(INTERPRETER))
    assert list(written.entries) == [bucket_of(TINY)]
    monkeypatch.setattr(first_call, "search", None)  # neither tried nor known again
    caplog.clear()
    first_call.tune(replace(TINY, batch=7), INTERPRETER, CPU, op.layer)
    first_call._TRIED.clear()
    first_call.tune(TINY, INTERPRETER, CPU, op.layer)
    assert not caplog.records  # a search that fails is logged, and no error


def test_tuning_inside_of_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a custom operator runs nothing records gradients, and the search needs them: both passes of a module."""
    from lstm_triton import LSTM
    from lstm_triton.layer import choice as layer

    tuned = []
    real = layer.plan_for

    def tune_and_plan(problem, device):
        first_call.tune(problem, device, CPU, op.layer)
        tuned.append(problem.which)
        return real(problem, device)

    monkeypatch.setattr(layer, "plan_for", tune_and_plan)
    module = LSTM(3, 16, backend="triton", precision="ieee")
    out, _ = module(torch.randn(2, 2, 3))
    out.sum().backward()
    assert tuned == ["forward", "backward"]
    assert {bucket.which for bucket in load(store.user_path(INTERPRETER)).entries} == {"forward", "backward"}


def test_what_forward_saves_is_checked() -> None:
    def forgetful(*arguments, **options):
        out, h_n, c_n, gates, cells, stats = op.layer(*arguments, **options)
        with torch.no_grad():
            cells.fill_(float("nan"))
        return out, h_n, c_n, gates, cells, stats

    assert search_configs(TINY, INTERPRETER, CPU, forgetful, math.inf) is None


def test_a_compiler_that_dies_takes_one_config_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import BrokenExecutor, Future

    class Pool:
        def submit(self, function, config, *rest):
            future = Future()
            if config.block_b == 32 or self.broken:
                self.broken = True
                future.set_exception(BrokenExecutor("gone"))
            else:
                future.set_result("")
            return future

        broken = False

    class Single(Pool):
        def __init__(self, *arguments) -> None:
            self.broken = False

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None:
            pass

    monkeypatch.setattr(search, "ProcessPoolExecutor", Single)
    entry = search_configs(TINY, INTERPRETER, CPU, op.layer, math.inf, pool=Pool())
    assert [value for value in entry.measured.values() if isinstance(value, str)] == ["the compiler ended its process"]
    assert len(entry.measured) == 4


def test_ranks_whose_store_cannot_compare(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    class Store:
        def compare_set(self, *arguments):
            raise RuntimeError("not implemented\nat all")

    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", Store)
    assert store.agreed(table(), H100) is NO_TABLE
    assert "the ranks cannot agree on one: not implemented" in caplog.text


def call(**changes) -> Call:
    return replace(Call(512, 512, 32, 1, 1, "bfloat16"), **changes)


def test_where_nn_lstm_was_faster_auto_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    where = torch.device("cuda")
    monkeypatch.setattr(route, "kernel_device", lambda device: H100)
    slow = replace(table(), name="measured")
    with store.using(slow, H100):
        reason = route.slower_reason(where, call(), "tf32", training=True, seq_len=128)
        assert reason.startswith(
            "nn.LSTM measured 2.00 times faster here (table measured): cuDNN's algorithm is standard"
        )
        # Another batch, mode or algorithm was not measured.
        assert route.slower_reason(where, call(batch=64), "tf32", True, 128) == ""
        assert route.slower_reason(where, call(), "tf32", False, 128) == ""
        assert route.slower_reason(where, call(dtype="float16"), "tf32", True, 128) == ""
        monkeypatch.setenv("LSTM_TRITON_STRICT", "1")
        assert route.slower_reason(where, call(), "tf32", True, 128) == ""
    monkeypatch.delenv("LSTM_TRITON_STRICT")
    with store.using(replace(slow, contests={BOUT: Contest(1.0, 1.0)}), H100):
        assert route.slower_reason(where, call(), "tf32", True, 128) == ""
    assert route.slower_reason(where, call(), "tf32", True, 128) == ""


def test_strict_turns_a_fallback_on_a_gpu_into_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "kernel_device", lambda device: H100)
    refused = ("auto", "cuda", 0, "float64", "tf32", 512, 1)
    assert "float64" in route.kernel_refusal(*refused)
    monkeypatch.setenv("LSTM_TRITON_STRICT", "1")
    with pytest.raises(RuntimeError, match="float64"):
        route.kernel_refusal(*refused)
    assert route.kernel_refusal("auto", "cuda", 0, "float16", "tf32", 512, 1) == ""
    assert "on cpu" in route.kernel_refusal("auto", "cpu", None, "float32", "tf32", 512, 1)


def test_candidates_are_compiled_ahead_and_spills_left_out() -> None:
    """Without a GPU: what the compiler makes of configs for sm_90, in threads here, in processes in `tune`."""
    spills = Config("grid", "mailbox", True, True, 1, 64, 16, 256, 4, max_batch_tiles=4)
    code = (
        "from lstm_triton.kernels.config import Config\n"
        "from lstm_triton.planning.device import KNOWN\n"
        "from lstm_triton.planning.problem import Problem\n"
        "from lstm_triton.tuning.search import _complaint\n"
        f"problem = Problem('forward', 512, 64, 1, 'bfloat16', 'tf32')\n"
        f"for text in ({spills.encode()!r}, {CONFIG.encode()!r}):\n"
        "    print(_complaint(Config.decode(text), problem, KNOWN['sm_90']))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    lines = done.stdout.split("\n")
    assert lines[0].startswith("spills "), done.stderr
    assert lines[1] == ""


def test_a_complaint_of_the_pool_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_complaint", lambda config, *rest: "spills" if config.block_b == 16 else "")
    with ThreadPoolExecutor(1) as pool:
        entry = search_configs(TINY, INTERPRETER, CPU, op.layer, math.inf, pool=pool)
    assert [value for value in entry.measured.values() if isinstance(value, str)] == ["spills"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_table_entry_is_checked_like_a_candidate(arch: str) -> None:
    """Every candidate, entered as the fastest, is what the planner then returns."""
    device = KNOWN[arch]
    for config in candidates(PROBLEM, device):
        if config.placement != "stepwise":
            bare = replace(config, max_batch_tiles=0)
            assert fits(bare, PROBLEM, device)
            assert plan(PROBLEM, device, only(PROBLEM, bare)).config == config


def test_the_sets_of_an_ensemble_are_no_directions() -> None:
    from lstm_triton.tuning.search import Scratch

    problem = replace(TINY, directions=3)
    found = plan(problem, INTERPRETER)
    assert not Scratch(problem, INTERPRETER, CPU, op.layer).complaint(found.config)
