"""What kernels and device functions pass to each other, named once, with the shape of every field.

A record is always given; what a call does without is None in it, and then leaves nothing in the binary. Rules of Triton
for records that are arguments of a kernel, or go through device functions:

- An integer inside a record would be part of the binary, so the sizes of a batch, a sequence and a launch are arguments
  of their own, see RUNTIME.
- A float inside a record is no part of the binary. So what varies from call to call is a float; a probability, which
  a mask compares with 24 random bits, is a whole number of 2^-24 (`config.chance`), which a float32 holds exactly.
- A device function cannot return None, nor a record with one inside (3.6): such a record is made by who uses it.
- The fields of a record that is known at compile time (`How`) are tl.constexpr when a kernel is compiled, and plain
  values when it is interpreted, see `launch.given`.

`rows` are the T * B rows of a sequence buffer, D the sets of weights: the directions of a layer, or of each member of
an ensemble in turn. A state tile is [BLOCK_B, BLOCK_H], or [BLOCK_H, BLOCK_B] with UNITS_FIRST. Compute type: fp32, or
fp64 for fp64 data.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# Never part of a binary: no size of a batch, a sequence or a launch compiles anything anew.
RUNTIME = [
    "batch", "seq_len", "row_stride_t", "row_stride_b", "first_tile", "step_begin", "step_end", "time_begin"
]  # fmt: skip


class How(NamedTuple):
    """What a binary is compiled for.

    dtype, compute: types of the data, and of states and sums. H: hidden units. D: sets of weights. PRECISION: of
    float32 products. BACKWARD: which pass. ORDER: which sets run in reverse, see `tiles.runs_reversed`. SAVE: keep
    gates and cells for the backward pass.
    COUPLED, ZONEOUT_H, ZONEOUT_C, DROPOUT (recurrent), SAMPLED, NORM: variants of the cell, see cell.py, masks.py and
    norm.py. EXACT: fp32 data whose products keep fp32's precision. INPUTS: features of x, where one launch projects
    them too. ALIGNED: whether every row that is collected begins at a multiple of 16 bytes. TILES: programs that share
    a row of the batch. PUBLISHED: tiles that a program publishes in a step. The rest: see `config.Config`.
    """

    dtype: Any
    compute: Any
    H: int
    D: int
    ORDER: str
    PRECISION: str
    EXACT: bool
    BACKWARD: bool
    SAVE: bool
    COUPLED: bool
    ZONEOUT_H: bool
    ZONEOUT_C: bool
    DROPOUT: bool
    SAMPLED: bool
    NORM: bool
    INPUTS: int
    ALIGNED: bool
    PLACEMENT: str
    PROTOCOL: str
    RESIDENT: bool
    UNITS_FIRST: bool
    SPLIT_K: int
    BLOCK_B: int
    BLOCK_H: int
    BLOCK_K: int
    TILES: int
    PUBLISHED: int


class State(NamedTuple):
    """h and c, or their gradients: buffers [D, B, H], or state tiles."""

    h: Any = None
    c: Any = None


class Gates(NamedTuple):
    """Something of each gate: state tiles, or what broadcasts over one."""

    i: Any
    f: Any
    g: Any
    o: Any


class Peephole(NamedTuple):
    """Weights of c_{t-1} to i and f and of c_t to o, for the units of a state tile, or sums of their gradients."""

    i: Any
    f: Any
    o: Any


# Arguments of the kernels.


class Resets(NamedTuple):
    """marks [rows] int32: where a sequence begins anew, and [D, B, H] with what state; None for zeros."""

    marks: Any = None
    h: Any = None
    c: Any = None


class Exchange(NamedTuple):
    """flags [D, batch tiles, hidden tiles] int32, with the protocol "flags"; board int64: see alarm.py."""

    flags: Any = None
    board: Any = None


class Projection(NamedTuple):
    """Of one step, in the same launch: x [B, I], w_ih [D, 4H, I], bias [D, 4H] or None."""

    x: Any = None
    w_ih: Any = None
    bias: Any = None


class Norm(NamedTuple):
    """Layer normalisation of h_{t-1} W_hh^T and of c_t.

    gain_hh [D, 4, H]. norm_c [D, 2, H]: gain and bias. In the compute type: pairs [rows, D, 2, hidden tiles, 2], what
    programs share; stats [rows, D, 4], mean and rstd of both, kept for the backward pass; dnorm_c [2, D, B, H], the
    gradient of norm_c for every row of the batch. Of the backward pass, in the type of the data: product
    [rows, D, 4, H], h_{t-1} W_hh^T, and dproduct, its gradient.
    """

    gain_hh: Any = None
    norm_c: Any = None
    pairs: Any = None
    stats: Any = None
    product: Any = None
    dproduct: Any = None
    dnorm_c: Any = None


class Masks(NamedTuple):
    """seed [D] int64: of the masks of single steps. zoneout_h, zoneout_c, recurrent_dropout: probabilities in 2^-24.

    h_mask [D, B, H]: on the h that the recurrent product reads. With it h_0 and reset_h [D, B, H]: the initial and the
    reset h, masked; sent [rows, D, H]: h_t, masked, which is then what programs hand each other.
    """

    seed: Any = None
    zoneout_h: Any = None
    zoneout_c: Any = None
    recurrent_dropout: Any = None
    h_mask: Any = None
    h_0: Any = None
    reset_h: Any = None
    sent: Any = None


class Scalars(NamedTuple):
    """Numbers that a variant is given: bounds of |c_t|, and of the gradients of the pre-activations."""

    cell_clip: Any = None
    recurrent_grad_clip: Any = None


class Kept(NamedTuple):
    """What the forward pass keeps, or gradients of it: activated gates [rows, D, 4, H], cells (c_t) [rows, D, H]."""

    gates: Any = None
    cells: Any = None


class Incoming(NamedTuple):
    """Gradients that a backward pass is given, None for zeros: of out [rows, D, H], the last state, what is kept."""

    out: Any = None
    final: State = State()
    kept: Kept = Kept()


# Of one program.


class Tile(NamedTuple):
    """What a program owns.

    b [BLOCK_B] int64 and unit [BLOCK_H]: its rows of the batch and its units. in_batch [BLOCK_B], owned (state tile):
    which of them exist. state (state tile): offsets in a buffer [D, B, H]. length [BLOCK_B] int32. hidden_tile: its
    number among those that share its rows, and group: the number of these. direction: its set of weights. reverse:
    whether that goes from the end to the start.
    """

    b: Any
    unit: Any
    in_batch: Any
    owned: Any
    state: Any
    length: Any
    hidden_tile: Any
    group: Any
    direction: Any
    reverse: Any
    batch: Any
    row_stride_t: Any
    row_stride_b: Any


class Position(NamedTuple):
    """One step: its number, and for every row [BLOCK_B] its time index int64, its row in a sequence buffer, whether it
    is within the row's length, and whether the state is reset before it."""

    step: Any
    time: Any
    rows: Any
    active: Any
    restart: Any


class Peers(NamedTuple):
    """The programs that share a row, at a step: their flags [hidden tiles] or None; the board of those that wait."""

    flags: Any
    board: Any
    step: Any


class Source(NamedTuple):
    """What a product reads: rows [BLOCK_B], pointers to DEPTH values each, all of which may be read. waiting: whether
    this launch publishes them. foreign [BLOCK_B] or None: those that it does not, whose bits may be any."""

    rows: Any
    waiting: Any
    foreign: Any


class Part(NamedTuple):
    """Which values of a row of DEPTH are collected: those from `begin` on. Programs own EACH of them in turn, beginning
    anew after PERIOD."""

    begin: Any
    DEPTH: Any
    PERIOD: Any
    EACH: Any


class Sharing(NamedTuple):
    """How programs share numbers: pairs [BLOCK_B], pointers to a row's [TILES, 2]; count: tiles published by then."""

    pairs: Any
    count: Any
    peers: Peers


class Sums(NamedTuple):
    """Of a backward pass, sums over steps, state tiles: what reaches the initial and the reset h by zoneout, the
    gradient of the reset c, those of the peephole weights, and of gain and bias of c_t. Zeros where nobody wants one.
    """

    dh_kept: Any
    dh_reset: Any
    dc_reset: Any
    dpeephole: Any
    dgain: Any
    dbias: Any


class Drawn(NamedTuple):
    """The masks of a step, state tiles, or their means: which h and c keep their old value, and what the candidate g is
    multiplied by. Without such a mask anything, and not used."""

    keep_h: Any
    keep_c: Any
    g_scale: Any


class NormWeights(NamedTuple):
    """Of the units of a state tile: a gain for each gate; gain and bias of c_t."""

    gates: Any
    gain: Any
    bias: Any


class Moments(NamedTuple):
    """mean and rstd [BLOCK_B]."""

    mean: Any
    rstd: Any


class Cells(NamedTuple):
    """State tiles of one step: c_{t-1} (or the reset c), c_t before and after it is clipped."""

    prev: Any
    raw: Any
    now: Any
