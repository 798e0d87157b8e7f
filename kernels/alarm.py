"""The end of a wait in vain: what programs say before one of them stops the device, and what the host makes of it.

A program that waits for neighbours polls them. After PATIENCE polls, which take a GPU about a minute (a poll is a trip
to L2 and some barriers, 0.3 to 0.6 us), it says for whom, in a board that the host can read; GRACE polls later, when
everybody who waits has said so, it traps. A minute, since kernels of other streams may hold multiprocessors for long;
and polls, since under a debugger or beside another process everything becomes slower alike. CUDA then fails every
further call with an error that says nothing: the board is what there is to know.
"""

from __future__ import annotations

import atexit
import sys
from collections import defaultdict

import torch
import triton.language as tl

PATIENCE = tl.constexpr(1 << 27)
GRACE = tl.constexpr(1 << 21)
# A board: MARK once a program has trapped; then of every hidden tile a word. From its low end: the step (STEP_BITS);
# first and last hidden tile that its program waits for, and a number of those programs that exchange with each other,
# TILE_BITS each; MARK.
STEP_BITS = tl.constexpr(32)
TILE_BITS = tl.constexpr(10)
MARK = tl.constexpr(1 << 62)

PASSES = ("forward", "backward")
_boards: dict[torch.device, torch.Tensor] = {}  # of every device that has launched: [passes, 2 + hidden tiles] int64


def board_of(device: torch.device, backward: bool) -> torch.Tensor:
    """The board of a pass: in the host's memory, which outlives a stopped device."""
    size = 2 + (1 << TILE_BITS.value)  # even: every board is aligned to 16 bytes
    if device.type == "meta":  # to be compiled only
        return torch.empty(size, dtype=torch.int64, device=device)
    if device not in _boards:
        if not _boards:
            atexit.register(_last_words)
        _boards[device] = torch.zeros((len(PASSES), size), dtype=torch.int64, pin_memory=device.type == "cuda")
    return _boards[device][int(backward)]


def raised() -> str:
    """What programs have said before one of them trapped, in words, once; "" if none has."""
    said = []
    for device, boards in list(_boards.items()):
        for name, board in zip(PASSES, boards):
            if board[0]:
                said.append(f"{name} pass on {device}: {_in_words(board[1:].tolist())}")
                board.zero_()
    if not said:
        return ""
    return (
        f"lstm_triton has stopped the device in place of a hang. {'; '.join(said)}. Programs of one launch have not "
        "run side by side, or one has failed: please report it. This process cannot use the device again; "
        "LSTM_TRITON_COOPERATIVE=0 does without launches whose programs wait"
    )


def _in_words(words: list[int]) -> str:
    """Of the largest group of programs that exchange with each other, who waits for whom."""
    groups: dict[int, dict[int, tuple[int, set[int]]]] = defaultdict(dict)
    low = (1 << TILE_BITS.value) - 1
    for tile, word in enumerate(words):
        if word:
            first, last, group = (word >> STEP_BITS.value + at * TILE_BITS.value & low for at in range(3))
            groups[group][tile] = word & (1 << STEP_BITS.value) - 1, set(range(first, last + 1))
    waiting = max(groups.values(), key=len)
    awaited = set[int]().union(*(tiles for _, tiles in waiting.values()))
    steps = sorted({step for step, _ in waiting.values()})
    who, whom, lost = map(_ranges, (sorted(waiting), sorted(awaited), sorted(awaited - waiting.keys())))
    text = f"at step {_ranges(steps)} the programs of hidden tiles {who} waited in vain for those of {whom}"
    return f"{text}, of which {lost} did not wait themselves" if lost else text


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 5 as "1-3, 5"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in found)


def _last_words() -> None:
    """For whoever has only seen CUDA's error."""
    if text := raised():
        print(text, file=sys.stderr)
