"""Text for character models: where it comes from, its alphabet, and its windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .command import Refused


@dataclass(frozen=True)
class Corpus:
    """Text as indices into its alphabet; the last tenth is for validation."""

    alphabet: str
    train: Tensor
    valid: Tensor

    @classmethod
    def from_text(cls, text: str, shortest: int) -> Corpus:
        """Raises Refused if training or validation would have fewer than `shortest` characters."""
        alphabet = "".join(sorted(set(text)))
        index = {character: i for i, character in enumerate(alphabet)}
        codes = torch.tensor([index[character] for character in text], dtype=torch.long)
        split = len(codes) * 9 // 10
        if len(codes) - split < shortest:
            raise Refused(f"the text is too short: {len(codes)} characters, at least {10 * shortest} are needed")
        return cls(alphabet, codes[:split], codes[split:])

    def unigram_loss(self) -> float:
        """Validation loss (nats per character) of drawing characters by their frequency in training."""
        counts = torch.bincount(self.train, minlength=len(self.alphabet)).double() + 1
        return float(-(counts / counts.sum()).log()[self.valid].mean())


def default_text() -> str:
    """English prose about Python, 465,000 characters in CPython 3.11: `pydoc_data.topics`."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def read_text(path: str) -> str:
    """The text of a UTF-8 file. Raises Refused in one line for anything else."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not UTF-8 text (byte {error.start})") from error
    if "\0" in text:
        raise Refused(f"{path} is a binary file, not text")
    if not text.strip():
        raise Refused(f"{path} is empty")
    return text


def batches(codes: Tensor, batch: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive windows of `batch` parallel streams: inputs and the characters that follow, [T, B]."""
    steps = (len(codes) - 1) // batch
    inputs = codes[: batch * steps].view(batch, steps).t()
    targets = codes[1 : batch * steps + 1].view(batch, steps).t()
    for start in range(0, steps, seq_len):
        yield inputs[start : start + seq_len], targets[start : start + seq_len]
