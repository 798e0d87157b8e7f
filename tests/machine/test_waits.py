"""Waits in vain end with an error that says who waited for whom, and launches that a device refuses are planned anew."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from engines import Engine
from layers import Case, run_recurrence
from planted import plant_everywhere
from torch import nn

from lstm_triton import LSTM
from lstm_triton.kernels.config import Config
from lstm_triton.planning import device, route

from .driver import Machine, running

pytestmark = pytest.mark.machine

CONSTANTS = "from .alarm import GRACE, MARK, PATIENCE, STEP_BITS, TILE_BITS"
IMPATIENT = (
    "from .alarm import MARK, STEP_BITS, TILE_BITS\n\nPATIENCE = tl.constexpr(200)\nGRACE = tl.constexpr(100)"
)  # fmt: skip
HERE = "    tile = own_tile(first_tile, batch, seq_len, row_stride_t, row_stride_b, lengths, how)\n"
LOST = {  # one program of three, which the device has not started
    "forward": (HERE, HERE + "    step_end = tl.where(tile.hidden_tile == 1, step_begin, step_end)\n"),
    "backward": (HERE, HERE + "    step_begin = tl.where(tile.hidden_tile == 1, step_end, step_begin)\n"),
}


@pytest.mark.every_target
@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("protocol", ["mailbox", "flags"])
def test_a_lost_neighbour_is_named(engine: Engine, protocol: str, which: str, tmp_path: Path) -> None:
    """The compiled kernels as they are, but for a shorter patience and a program that does nothing."""
    made = plant_everywhere(tmp_path, "exchange", (CONSTANTS, IMPATIENT), also={which: LOST[which]})
    config = Config("grid", protocol, True, False, 1, 16, 16, 32, 4)
    step = {"forward": 1, "backward": 1}[which]
    said = rf"{which} pass on cpu: at step {step} the programs of hidden tiles 0, 2 waited in vain for those of .*1.*"
    with running(Machine(engine.name, looks=400)), pytest.raises(RuntimeError, match=said) as caught:
        run_recurrence(
            Case(hidden_size=40, seq_len=3), config, made["forward"].lstm_forward, made["backward"].lstm_backward
        )
    assert "of which 1 did not wait themselves" in str(caught.value)
    assert "unspecified launch failure" in str(caught.value.__cause__), "what CUDA says is kept"


def test_patience_does_not_change_what_is_computed(engine: Engine, tmp_path: Path) -> None:
    """With polls counted and none in vain, and programs that look often."""
    longer = IMPATIENT.replace("PATIENCE = tl.constexpr(200)", "PATIENCE = tl.constexpr(2)")
    longer = longer.replace("GRACE = tl.constexpr(100)", "GRACE = tl.constexpr(1000000)")
    made = plant_everywhere(tmp_path, "exchange", (CONSTANTS, longer))
    case = Case(hidden_size=40, seq_len=3)
    for protocol in ("mailbox", "flags"):
        config = Config("grid", protocol, True, False, 1, 16, 16, 32, 4)
        with engine(seed=3):
            found = run_recurrence(case, config, made["forward"].lstm_forward, made["backward"].lstm_backward)
        with engine(seed=4):
            wanted = run_recurrence(case, config)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that this test makes refuse something are forgotten after it."""
    monkeypatch.setattr(device, "_refused", set())


@pytest.mark.parametrize("recompute", ["none", "chunk:2"])
@pytest.mark.parametrize("training", [False, True])
def test_a_refused_launch_is_planned_again_once(
    engine: Engine, training: bool, recompute: str, refusals: None, caplog: pytest.LogCaptureFixture
) -> None:
    """A device whose multiprocessors are not all free: a share of it, or another process."""
    theirs = nn.LSTM(6, 40)
    ours = LSTM(6, 40, backend="triton", precision="ieee", recompute=recompute)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 2, 6)
    with running(Machine(engine.name, free=1)) as machine, caplog.at_level(logging.WARNING, "lstm_triton"):
        for _ in range(2):
            with torch.set_grad_enabled(training):
                out, _ = ours(x)
            if training:
                ours.zero_grad()
                out.square().sum().backward()
    assert [record.getMessage() for record in caplog.records if "has refused" in record.getMessage()] == [
        message for message in caplog.messages if "LSTM_TRITON_COOPERATIVE=0" in message
    ]
    assert len(caplog.messages) == 1
    assert machine.launches.count("lstm_forward_kernel") >= 2 * len(x), "one launch a step"
    want, _ = theirs(x)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    if training:
        want.square().sum().backward()
        for a, b in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_a_refusal_while_auto_is_asked(engine: Engine, refusals: None) -> None:
    """PyTorch's own LSTM does better than one launch a step: the next call takes it."""
    ours = LSTM(6, 40, precision="ieee")
    x = torch.randn(3, 2, 6)
    with running(Machine(engine.name, free=1)) as machine, torch.no_grad():
        first, _ = ours(x)
        launches = len(machine.launches)
        assert launches
        second, _ = ours(x)
        assert len(machine.launches) == launches
        assert "one launch a step" in route.possible_refusal(
            route.Request("auto", "cpu", None, "float32", "ieee", 40, 1)
        )
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
