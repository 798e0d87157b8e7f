"""What a launch is told: how the recurrence is placed (Config) and how its rows lie (Layout)."""

from __future__ import annotations

from dataclasses import dataclass, fields

PLACEMENTS = ("local", "grid", "stepwise", "single")
PROTOCOLS = ("none", "flags", "mailbox")
PRECISIONS = ("ieee", "tf32", "tf32x3")


@dataclass(frozen=True)
class Config:
    """One way to run one pass of the recurrence; every field but the last is part of the binary.

    placement: "local" (a program owns all units of its rows), "grid" (programs exchange a tile
        each step inside one launch), "stepwise" (one launch a step) or "single" (the one launch of a
        sequence of one step, its input's projection included; forward only).
    protocol: "flags" or "mailbox" for "grid", "none" otherwise; see exchange.py.
    resident: W_hh is read once per launch and stays on chip; else it is re-read every step.
    units_first: the weights are the first operand of the dot; see product.py.
    split_k: slices of the depth that warps work on side by side, 1 for none; see product.py.
    block_b, block_h, block_k: rows, hidden units and dot depth of one program; powers of two, at
        least 16. "local" has block_h >= H and no block_k of its own: block_k == block_h.
    num_warps, num_stages: Triton's.
    max_batch_tiles: most batch tiles in one launch, so that all programs of a launch that waits
        are resident together; 0: no limit. A larger batch runs as several launches.
    """

    placement: str
    protocol: str
    resident: bool
    units_first: bool
    split_k: int
    block_b: int
    block_h: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    max_batch_tiles: int = 0

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {PLACEMENTS}, got {self.placement!r}")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {PROTOCOLS}, got {self.protocol!r}")
        if (self.placement == "grid") != (self.protocol != "none"):
            raise ValueError(f"placement {self.placement!r} does not go with protocol {self.protocol!r}")
        for name in ("block_b", "block_h", "block_k"):
            block = getattr(self, name)
            if block < 16 or block & (block - 1):
                raise ValueError(f"{name} must be a power of two and at least 16, got {block}")
        if self.split_k > 1 and (self.units_first or self.placement == "local" or self.block_k < 16 * self.split_k):
            raise ValueError("split_k needs the weights second, an exchanged tile and block_k >= 16 * split_k")
        if self.placement == "local" and (self.block_k != self.block_h or not self.resident):
            raise ValueError("placement 'local' keeps W_hh resident with block_k == block_h")

    def encode(self) -> str:
        """A one-line text that `decode` reads back: operators take a config as a string."""
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    @classmethod
    def decode(cls, text: str) -> Config:
        """Inverse of `encode`; ValueError names what is wrong with any other text."""
        words = dict(word.partition("=")[::2] for word in text.split())
        expected = {field.name: field.type for field in fields(cls)}
        if words.keys() != expected.keys():
            raise ValueError(f"a config has the fields {', '.join(expected)}; got {text!r}")
        readers = {"str": str, "int": int, "bool": {"True": True, "False": False}.__getitem__}
        return cls(**{name: readers[str(expected[name])](word) for name, word in words.items()})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Layout:
    """Sizes of a sequence batch and the order of its rows: row(t, b) = t * stride_t + b * stride_b."""

    batch: int
    seq_len: int
    batch_first: bool

    @property
    def rows(self) -> int:
        return self.batch * self.seq_len

    @property
    def stride_t(self) -> int:
        return 1 if self.batch_first else self.batch

    @property
    def stride_b(self) -> int:
        return self.seq_len if self.batch_first else 1
