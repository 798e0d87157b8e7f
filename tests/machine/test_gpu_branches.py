"""What a CUDA tensor takes another way for, on CPU tensors with the machine in the GPU's place: every such branch.

`device.on_gpu` is the only question. Each place that asks it is found in the source, and has to be answered yes here.
"""

from __future__ import annotations

import ast
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lstm_triton
from lstm_triton import LSTM, LSTMCell, explain
from lstm_triton.commands import tune
from lstm_triton.functional import stack
from lstm_triton.layer import choice, fallback, first_use
from lstm_triton.modules import lstm as module
from lstm_triton.modules import path as modules_path
from lstm_triton.planning import device, route, store
from lstm_triton.planning.cudnn import Call
from lstm_triton.planning.planner import NoPlan
from lstm_triton.planning.table import Contest
from lstm_triton.tuning import first_call

from .driver import Machine, running

pytestmark = pytest.mark.machine

ASKING = (choice, fallback, first_use, module, modules_path, route, stack, tune)
PACKAGE = Path(lstm_triton.__file__).parent


def places() -> set[tuple[str, int]]:
    """(module, line) of every call of `on_gpu`."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name == "device.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "on_gpu":
                found.add((path.relative_to(PACKAGE).as_posix(), node.lineno))
    return found


def plain_lstm(ours: LSTM) -> nn.LSTM:
    theirs = nn.LSTM(ours.input_size, ours.hidden_size).to(ours.weight_ih_l0.dtype)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def ours(hidden_size: int = 16, **options) -> tuple[LSTM, torch.Tensor]:
    torch.manual_seed(0)
    return LSTM(4, hidden_size, **options).half(), torch.randn(3, 2, 4).half()


Run = Callable[[Machine, pytest.MonkeyPatch, pytest.LogCaptureFixture], None]
RUNS: dict[str, Run] = {}


def runs(function: Run) -> Run:
    RUNS[function.__name__] = function
    return function


@runs
def auto_takes_the_kernels(machine, monkeypatch, caplog) -> None:
    made, x = ours()
    out, _ = made(x)
    out.float().sum().backward()
    assert set(machine.launches) == {"lstm_forward_kernel", "lstm_backward_kernel"}
    torch.testing.assert_close(out, plain_lstm(made)(x)[0], rtol=1e-2, atol=2e-3)
    assert "triton" in str(explain(made, x))


@runs
def flattening_is_asked_for_where_cudnn_may_run(machine, monkeypatch, caplog) -> None:
    flattened = []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda self: flattened.append(type(self)))
    for options in (dict(backend="triton"), dict(peephole=True)):
        LSTM(4, 16, **options).double().flatten_parameters()
    assert not flattened, "only the kernels run"
    made, x = ours()
    assert set(flattened) == {LSTM}
    flattened.clear()
    made(x)
    assert not flattened, "never within a call: weights that FSDP or a graph holds would be others"


@runs
def a_contest_that_nn_lstm_has_won(machine, monkeypatch, caplog) -> None:
    made, x = ours()
    here = route.kernel_device(x.device)
    table = store.new_table(here, {})
    for training in (False, True):
        bout = route.bout_of(Call(4, 16, 2, 1, 1, "float16"), "tf32", training, False, here)
        table.contests[bout] = Contest(1.0, 2.0) if Contest(1.0, 2.0).speedup < 1 else Contest(2.0, 1.0)
    with store.using(table, here):
        out, _ = made(x)
        assert "nn.LSTM measured 2.00 times faster" in made.slower(x)
    assert not machine.launches
    torch.testing.assert_close(out, plain_lstm(made)(x)[0])


@runs
def strict_makes_an_error_of_a_fallback(machine, monkeypatch, caplog) -> None:
    monkeypatch.setenv("LSTM_TRITON_STRICT", "1")
    with pytest.raises(RuntimeError, match="float64 runs through the kernels in Triton's interpreter only"):
        LSTM(4, 16).double()(torch.randn(3, 2, 4).double())
    made, x = ours()
    made(x)
    assert machine.launches


@runs
def a_fallback_is_logged_once(machine, monkeypatch, caplog) -> None:
    route.log_once.cache_clear()
    with caplog.at_level(logging.INFO, "lstm_triton"):
        for _ in range(2):
            LSTM(4, 16).double()(torch.randn(3, 2, 4).double())
    assert [text for text in caplog.messages if "takes PyTorch's path: float64" in text] == caplog.messages
    assert len(caplog.messages) == 1


@runs
def a_loop_over_time_is_warned_of(machine, monkeypatch, caplog) -> None:
    route.warn_once_of_the_loop.cache_clear()
    x = torch.randn(3, 2, 4).double()
    LSTM(4, 16).double()(x, lengths=torch.tensor([3, 1]))
    assert not [text for text in caplog.messages if "step by step" in text], "lengths are packed, training too"
    LSTM(4, 16).double()(x, reset=torch.zeros(3, 2, dtype=torch.bool))
    assert [text for text in caplog.messages if "step by step in plain PyTorch" in text]


@runs
def second_derivatives_are_warned_of(machine, monkeypatch, caplog) -> None:
    route.warn_once_of_the_loop.cache_clear()
    made = LSTM(4, 16, precision="tf32x3")
    x = torch.randn(3, 2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(made(x)[0].sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert [text for text in caplog.messages if "derivatives of derivatives" in text]
    assert machine.launches == ["lstm_forward_kernel"]


@runs
def a_first_call_may_tune(machine, monkeypatch, caplog) -> None:
    monkeypatch.setenv("LSTM_TRITON_AUTOTUNE", "on")
    asked = []
    monkeypatch.setattr(first_call, "tune", lambda problem, *_: asked.append(problem.which))
    made, x = ours()
    made(x)[0].float().sum().backward()
    assert set(asked) == {"forward", "backward"}


@runs
def a_config_is_compared_first(machine, monkeypatch, caplog) -> None:
    monkeypatch.setenv("LSTM_TRITON_CHECK", "always")
    monkeypatch.setattr(first_use, "_settled", set())
    monkeypatch.setattr(first_use, "_found", {})
    made, x = ours(24)
    with torch.no_grad():
        made(x)
    assert machine.launches == ["lstm_forward_kernel"] * 2


@runs
def tuning_meets_nn_lstm_on_a_gpu(machine, monkeypatch, caplog) -> None:
    met = []
    monkeypatch.setattr(tune.Tuner, "_search", lambda *_: None)
    monkeypatch.setattr(tune.Tuner, "_contest", lambda self, shape, pool: met.append(shape.hidden_size))
    where = device.gpu_here()
    assert where == torch.device("cpu")
    here = route.kernel_device(where)
    tuner = tune.Tuner(store.new_table(here, {}), Path("unused"), here, where, False)
    tuner.tune(tune.parse_shapes(["16x2"], ["bfloat16"]), float("inf"), None)
    assert met == [16]


@runs
def tuning_says_why_it_cannot(machine, monkeypatch, caplog) -> None:
    monkeypatch.setattr(tune, "kernel_device", lambda where: NoPlan("its driver does not start"))
    options = type("Options", (), {"shapes": ["16x2"], "dtype": ["bfloat16"]})
    with pytest.raises(RuntimeError, match="tuning measures on a GPU: its driver does not start"):
        tune.run(options)


@runs
def a_gpu_is_looked_up(machine, monkeypatch, caplog) -> None:
    monkeypatch.setattr(route, "device_of", lambda where: device.KNOWN["sm_90"])
    assert route.kernel_device(torch.device("cuda", 1)).name == "H100"


@runs
def casts_are_those_of_autocast(machine, monkeypatch, caplog) -> None:
    made, x = LSTM(4, 16), torch.randn(3, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = made(x)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
    assert len(machine.launches) == 2
    torch.testing.assert_close(out, plain_lstm(made)(x)[0].bfloat16(), rtol=2e-2, atol=2e-2)
    assert made.weight_hh_l0.grad.dtype == torch.float32


@runs
def compiled_graphs_have_the_kernels(machine, monkeypatch, caplog) -> None:
    made, x = ours()
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    out, _ = compiled(x)
    out.float().sum().backward()
    assert set(machine.launches) == {"lstm_forward_kernel", "lstm_backward_kernel"}
    torch.testing.assert_close(out, plain_lstm(made)(x)[0], rtol=1e-2, atol=2e-3)


@runs
def compiled_graphs_break_where_cudnn_runs(machine, monkeypatch, caplog) -> None:
    made, x = LSTM(4, 16).double(), torch.randn(3, 2, 4).double()
    with torch.no_grad():
        assert torch.equal(torch.compile(made, backend="eager")(x)[0], made(x)[0])
    assert not machine.launches


@runs
def modules_move(machine, monkeypatch, caplog) -> None:
    """`module.to`, which flattens weights, and a cell."""
    made, x = ours()
    made.to(torch.bfloat16)(x.bfloat16())
    cell = LSTMCell(4, 16).half()
    h, _ = cell(x[0])
    plain = nn.LSTMCell(4, 16).half()
    plain.load_state_dict(cell.state_dict())
    torch.testing.assert_close(h, plain(x[0])[0], rtol=1e-2, atol=2e-3)
    assert len(machine.launches) == 2


def run(name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    with running(Machine("sm_80")) as machine, monkeypatch.context() as own:
        RUNS[name](machine, own, caplog)


@pytest.mark.parametrize("name", RUNS)
def test_a_branch(name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run(name, monkeypatch, caplog)


def test_no_branch_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """All of the above once more, noting who asks and is told yes: 100% of the places."""
    told, real = set(), device.on_gpu

    def noted(where: torch.device) -> bool:
        answer, frame = real(where), sys._getframe(1)
        if answer:
            told.add((Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix(), frame.f_lineno))
        return answer

    for asking in ASKING:
        monkeypatch.setattr(asking, "on_gpu", noted)
    traced = {"compiled_graphs_have_the_kernels", "compiled_graphs_break_where_cudnn_runs"}
    for name in RUNS.keys() - traced:
        run(name, monkeypatch, caplog)
    asked = places()
    assert len(asked) >= 10
    (compiled,) = asked - told
    # This one is asked while TorchDynamo traces, which calls no noting function: compiled_graphs_break_where_cudnn_runs.
    assert compiled[0] == "modules/lstm.py"
    assert "if traced and" in (PACKAGE / "modules" / "lstm.py").read_text().splitlines()[compiled[1] - 1]
