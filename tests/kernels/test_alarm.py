"""What is said of a wait in vain, and of launches that fail otherwise. Both executed: tests/machine/test_waits.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lstm_triton.kernels import alarm, launch
from lstm_triton.kernels.config import Config


def word(step: int, first: int, last: int, group: int = 0) -> int:
    bits = alarm.TILE_BITS.value
    return alarm.MARK.value | (((group << bits | last) << bits | first) << alarm.STEP_BITS.value) | step


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """That of forward passes on the CPU."""
    monkeypatch.setattr(alarm, "_boards", {})
    monkeypatch.setattr(alarm.atexit, "register", lambda function: None)
    return alarm.board_of(torch.device("cpu"), backward=False)


def test_nothing_is_said_before_a_program_has_stopped_the_device(board: torch.Tensor) -> None:
    board[1 + 3] = word(7, 0, 4)
    assert alarm.raised() == ""


def test_who_waited_for_whom_is_said_once(board: torch.Tensor) -> None:
    board[0] = alarm.MARK.value
    for tile in (0, 1, 2, 4, 6):
        board[1 + tile] = word(70_000, 4, 7)
    board[1 + 5] = word(3, 0, 1, group=1)  # of other sequences
    said = alarm.raised()
    assert "forward pass on cpu: at step 70000 the programs of hidden tiles 0-2, 4, 6 waited in vain" in said
    assert "for those of 4-7, of which 5, 7 did not wait themselves" in said
    assert "LSTM_TRITON_COOPERATIVE=0" in said
    assert alarm.raised() == ""


def test_the_largest_words_fit(board: torch.Tensor) -> None:
    last = (1 << alarm.TILE_BITS.value) - 1
    board[0], board[1 + last] = alarm.MARK.value, word(2**31 - 1, last, last, last)
    assert f"step {2**31 - 1} the programs of hidden tiles {last} waited in vain for those of {last}" in alarm.raised()


def test_boards_are_aligned_and_of_one_pass_each(board: torch.Tensor) -> None:
    other = alarm.board_of(torch.device("cpu"), backward=True)
    assert board.data_ptr() % 16 == other.data_ptr() % 16 == 0
    other[0] = board[1] = 1
    assert board[0] == 0
    assert alarm.board_of(torch.device("meta"), backward=True).is_meta


def test_last_words_of_a_process() -> None:
    """For whoever has only seen CUDA's error."""
    program = """
import torch
from lstm_triton.kernels import alarm
board = alarm.board_of(torch.device("cpu"), True)
board[0] = alarm.MARK.value
board[1] = alarm.MARK.value | 5
raise SystemExit("CUDA error: unspecified launch failure")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "backward pass on cpu: at step 5 the programs of hidden tiles 0 waited in vain for those of 0" in done.stderr


def test_other_errors_of_a_launch_stay_what_they_are(monkeypatch: pytest.MonkeyPatch, board: torch.Tensor) -> None:
    def recurrence(protocol: str) -> launch.Recurrence:
        config = Config("grid", protocol, True, False, 1, 16, 16, 16, 4) if protocol != "none" else LOCAL
        how = launch.how_of(config, 16, 1, None, "ieee", torch.float32)
        return launch.Recurrence(config, launch.Layout(1, 1, False), how, [torch.empty(1, 1, 16)])

    def failing(text: str):
        class Kernel:
            def __getitem__(self, grid):
                def fail(**arguments):
                    raise RuntimeError(text)

                return fail

        return Kernel()

    refusal = "Triton Error [CUDA]: too many blocks in cooperative launch"
    with pytest.raises(launch.LaunchRefused, match="too many blocks"):
        launch.run(failing(refusal), recurrence("flags"), {})
    with pytest.raises(launch.LaunchRefused, match="not supported"):
        launch.run(failing("Triton Error [CUDA]: operation not supported"), recurrence("mailbox"), {})
    for text, protocol in ((refusal, "none"), ("Triton Error [CUDA]: out of memory", "flags")):
        with pytest.raises(RuntimeError) as caught:
            launch.run(failing(text), recurrence(protocol), {})
        assert type(caught.value) is RuntimeError
        assert str(caught.value) == text
    board[0], board[1] = alarm.MARK.value, word(0, 0, 0)
    with pytest.raises(RuntimeError, match="in place of a hang"):
        launch.run(failing("CUDA error: unspecified launch failure"), recurrence("none"), {})


LOCAL = Config("local", "none", True, False, 1, 16, 16, 16, 4)
