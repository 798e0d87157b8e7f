"""What a plan is asked for: one pass over one layer, exactly (Problem) and as tables know it (Bucket)."""

from __future__ import annotations

from dataclasses import dataclass

PASSES = ("forward", "backward")
KINDS = ("plain", "variant", "norm", "norm+")  # of cells: with variants, layer normalisation, and that with others
ELEMENT_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
INVARIANT_BATCH = 16  # what a plan is asked for where one has to serve every batch
SMALLEST_BATCH, LARGEST_BATCH = 8, 4096  # a program has at least 8 rows; beyond, only more launches


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Problem:
    """One pass over one layer. A plan depends on the batch only by its bucket: see `bucket_of_batch`."""

    which: str
    hidden_size: int
    batch: int
    directions: int
    dtype: str
    precision: str
    kind: str = "plain"  # of the cell, see KINDS

    @property
    def norm(self) -> bool:
        """Whether programs share sums within a step."""
        return self.kind.startswith("norm")

    @property
    def element_size(self) -> int:
        return ELEMENT_SIZE[self.dtype]

    @property
    def depth(self) -> int:
        """K of the recurrent product."""
        return self.hidden_size if self.which == "forward" else 4 * self.hidden_size

    def width(self, block_h: int) -> int:
        """N of the recurrent product of a program with block_h units."""
        return 4 * block_h if self.which == "forward" else block_h

    @property
    def without_tensor_cores(self) -> bool:
        return self.dtype == "float32" and self.precision == "ieee"

    @property
    def aligned(self) -> bool:
        """Whether 16-byte loads can start on every row of W_hh."""
        return self.hidden_size * self.element_size % 16 == 0


@dataclass(frozen=True)
class Bucket:
    """The problems that share an entry of a table: see `bucket_of`."""

    which: str
    hidden_size: int
    aligned: bool
    batch: int
    directions: int
    dtype: str
    precision: str


def bucket_of_batch(batch: int) -> int:
    """The power of two above, within limits: all that a plan may depend on."""
    return min(max(power_of_two(batch), SMALLEST_BATCH), LARGEST_BATCH)


def bucket_of_hidden_size(hidden_size: int) -> int:
    """The next of 16, 32, 64, 128, then of four steps per octave: 160, 192, 224, 256, 320, ..."""
    top = max(16, power_of_two(hidden_size))
    return top if top <= 128 else ceil_div(hidden_size, top // 8) * (top // 8)


def bucket_of(problem: Problem) -> Bucket:
    return Bucket(
        problem.which,
        bucket_of_hidden_size(problem.hidden_size),
        problem.aligned,
        bucket_of_batch(problem.batch),
        problem.directions,
        problem.dtype,
        problem.precision if problem.dtype == "float32" else "",
    )
