"""The shapes that are measured, in named sets.

The regions follow what PyTorch asks cuDNN for (`lstm_triton.planning.cudnn`): "small" its small persistent
kernel, "home" its large one, "open" the standard algorithm. "users" are shapes that people run, with
where; the "scaling" sets vary one size; "scratch" is for the LSTMs of tutorials, next to nn.LSTM.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

DTYPES = ("float16", "bfloat16", "float32-tf32", "float32-ieee")


@dataclass(frozen=True)
class Shape:
    """One LSTM and its batch. dtype: one of DTYPES; the precision of float32 products is part of it."""

    region: str
    label: str
    input_size: int
    hidden_size: int
    batch: int
    seq_len: int
    layers: int
    directions: int
    dtype: str

    @property
    def torch_dtype(self) -> str:
        return self.dtype.partition("-")[0]

    @property
    def precision(self) -> str:
        """Of float32 products; the other types have only one."""
        return self.dtype.partition("-")[2] or "ieee"

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return 4 if self.torch_dtype == "float32" else 2

    def __str__(self) -> str:
        stack = f" {self.layers} layers" * (self.layers > 1) + " two directions" * (self.directions > 1)
        sizes = f"I={self.input_size} H={self.hidden_size} B={self.batch} T={self.seq_len}"
        return f"{self.label} {sizes}{stack} {self.dtype}".strip()


def square(region: str, hidden_size: int, batch: int, seq_len: int, dtype: str) -> Shape:
    """One layer, one direction, as many inputs as units."""
    return Shape(region, "", hidden_size, hidden_size, batch, seq_len, 1, 1, dtype)


def user(label: str, input_size: int, hidden_size: int, batch: int, seq_len: int, layers: int, directions: int,
         dtype: str) -> Shape:  # fmt: skip
    return Shape("users", label, input_size, hidden_size, batch, seq_len, layers, directions, dtype)


USERS = [
    user("recurrent policy", 128, 128, 1024, 32, 1, 1, "float32-tf32"),
    user("recurrent policy, many envs", 256, 256, 8192, 16, 1, 1, "float32-tf32"),
    user("R2D2", 512, 512, 64, 80, 1, 1, "float32-tf32"),
    user("RNN-T predictor, training", 640, 640, 32, 100, 2, 1, "bfloat16"),
    user("RNN-T predictor, a step", 640, 640, 16, 1, 2, 1, "float16"),
    user("OCR", 256, 128, 32, 60, 1, 2, "float16"),
    user("diarisation", 128, 128, 32, 600, 4, 2, "float32-tf32"),
    user("sequence tagging", 300, 256, 32, 80, 3, 2, "float32-tf32"),
    user("speech synthesis encoder", 512, 256, 16, 200, 1, 2, "bfloat16"),
    user("character model", 512, 1024, 64, 256, 2, 1, "bfloat16"),
    user("word model, medium", 650, 650, 20, 35, 2, 1, "float32-tf32"),
    user("word model, AWD", 400, 1150, 80, 70, 3, 1, "bfloat16"),
    user("word model, large", 1500, 1500, 20, 35, 2, 1, "float16"),
    user("nanopore basecaller", 384, 384, 256, 1000, 1, 1, "float16"),
    user("guitar amplifier", 1, 40, 32, 8192, 1, 1, "float32-tf32"),
    user("hydrology", 32, 256, 256, 365, 1, 1, "float32-tf32"),
    user("published: FlashRNN's figure", 768, 768, 16, 1024, 1, 1, "float16"),
    user("published: the same in bf16", 768, 768, 16, 1024, 1, 1, "bfloat16"),
]

FIRST_USERS = ("speech synthesis encoder", "word model, medium", "published: the same in bf16")
SETS: dict[str, list[Shape]] = {
    # Two or three of each region: what is measured where there is hardly any time.
    "first": [square("small", 64, 64, 256, "float16"), square("small", 128, 256, 256, "float16"),
              square("home", 512, 32, 256, "float16"), square("home", 1024, 64, 256, "float16"),
              square("open", 256, 64, 128, "bfloat16"), square("open", 1024, 16, 128, "bfloat16"),
              square("open", 512, 64, 128, "float32-tf32"),
              *(one for one in USERS if one.label in FIRST_USERS)],
    "small": [square("small", h, b, 256, d) for d, h, b in
              product(("float16", "float32-tf32"), (32, 64, 128, 192), (16, 64, 256, 1024))],
    "home": [square("home", h, b, 256, "float16") for h, b in product((256, 512, 768, 1024), (8, 32, 64, 128))],
    "open": [square("open", h, b, 128, d) for d, h, b in
             product(("bfloat16", "float32-tf32"), (256, 512, 1024, 1536, 2048), (16, 64, 256))],
    "users": USERS,
    "scaling": [square("scaling T", 512, 32, t, "bfloat16") for t in (1, 16, 64, 256, 1024, 4096)]
    + [square("scaling B", 512, b, 128, "bfloat16") for b in (1, 8, 32, 128, 512, 2048)]
    + [square("scaling H", h, 32, 128, "bfloat16") for h in (32, 64, 128, 256, 512, 1024, 2048)],
    "scratch": [square("scratch", h, b, 64, "float32-ieee") for h, b in product((32, 128, 512), (1, 8, 32))],
    "cpu": [square("scaling T", 128, 8, t, "float32-ieee") for t in (1, 16, 64, 256)]
    + [square("scaling B", 128, b, 64, "float32-ieee") for b in (1, 8, 32, 128)]
    + [square("scaling H", h, 8, 64, "float32-ieee") for h in (32, 64, 128, 256, 512)],
    "tiny": [square("tiny", 8, 2, 3, "float32-ieee"), square("tiny", 16, 3, 4, "float32-ieee")],
}  # fmt: skip
