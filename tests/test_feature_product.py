"""Everything at once: 2,000 drawn calls over the whole feature product, against fp64.

Each runs on PyTorch's path, and every eighth through the kernels as well.

The truth is `reference/layer.py` in fp64, step by step. A draw may be off by what rounding explains (a wrong index or a
missing mark is off by far more), so that hypothesis can shrink it; over all draws of a test the largest error of
ours may be at most twice the largest of plain PyTorch in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from engines import Engine
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lstm_triton import functional
from lstm_triton.functional.checks import Sizes
from lstm_triton.variant import Variant

DRAWS = 2000
EPS = torch.finfo(torch.float32).eps


_DRAWN = Variant(zoneout=(0.3, 0.2), recurrent_dropout=0.3, variational_dropout=0.3)
PLAIN_AND_PROJECTED = [
    *[Variant()] * 4,
    Variant(peephole=True),
    Variant(peephole="o", coupled_gates=True, recurrent_dropout=0.3),
    Variant(zoneout=(0.0, 0.3), variational_dropout=(0.3, 0.0), weight_dropout=0.2),
    Variant(cell_clip=0.5, recurrent_grad_clip=0.5),
]
NORMED = [Variant(layer_norm=True), replace(_DRAWN, layer_norm=True, peephole=True, cell_clip=0.5)]


def variants_for(hidden_size: int, proj_size: int) -> list[Variant]:
    """What goes with these; the variance of a few units may be small, and dividing by it no measure of anything."""
    if proj_size:
        return PLAIN_AND_PROJECTED
    return [*PLAIN_AND_PROJECTED, _DRAWN, *(NORMED if hidden_size >= 8 else [])]


@dataclass(frozen=True)
class Call:
    """One call of `functional.lstm`; its tensors follow from the seed."""

    seq_len: int
    batch: int
    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool
    state: bool
    lengths: bool
    reset: bool
    reset_state: str
    return_states: tuple[str, ...]
    recompute: str
    batch_invariant: bool
    variant: Variant
    seed: int


@st.composite
def calls(draw) -> Call:
    hidden_size = draw(st.integers(1, 18))
    recompute = draw(st.sampled_from(["none", "none", "none", "gates", "chunk:2"]))
    states = {"none": ("c", "layers", "gates"), "gates": ("c", "layers")}.get(recompute, ("layers",))
    reset = draw(st.booleans())
    proj_size = draw(st.sampled_from([0, 0, max(hidden_size // 2, 1)])) if hidden_size > 1 else 0
    return Call(
        seq_len=draw(st.integers(1, 3)),
        batch=draw(st.integers(1, 3)),
        input_size=draw(st.integers(1, 4)),
        hidden_size=hidden_size,
        proj_size=proj_size,
        num_layers=draw(st.sampled_from([1, 1, 1, 2])),
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        state=draw(st.booleans()),
        lengths=draw(st.booleans()),
        reset=reset,
        reset_state=draw(st.sampled_from(["", "shared", "each"])) if reset else "",
        return_states=tuple(draw(st.lists(st.sampled_from(states), unique=True))),
        recompute=recompute,
        batch_invariant=draw(st.booleans()),
        variant=draw(st.sampled_from(variants_for(hidden_size, proj_size))),
        seed=draw(st.integers(0, 2**16)),
    )


def results(call: Call, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Every output and the gradient of every input, through all outputs."""
    generator = torch.Generator().manual_seed(call.seed)

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator) * scale
        return values.to(dtype).requires_grad_()

    directions = 2 if call.bidirectional else 1
    states, out_size = call.num_layers * directions, call.proj_size or call.hidden_size
    steps = (call.batch, call.seq_len) if call.batch_first else (call.seq_len, call.batch)
    x = tensor(*steps, call.input_size)
    weights, inputs = [], call.input_size
    sizes = Sizes(states, directions, call.proj_size, call.bias, call.variant)
    for _ in range(call.num_layers):
        for shape in [*sizes.expected(inputs, call.hidden_size).values()] * directions:
            weights.append(tensor(*shape, scale=shape[1] ** -0.5 if len(shape) > 1 else 1.0))
        inputs = directions * out_size

    def state_of(*batch: int) -> tuple[Tensor, Tensor]:
        return tensor(states, *batch, out_size), tensor(states, *batch, call.hidden_size)

    hx = state_of(call.batch) if call.state else None
    batch = {"shared": (), "each": (call.batch,)}.get(call.reset_state)
    reset_state = None if batch is None else state_of(*batch)
    lengths = torch.randint(0, call.seq_len + 1, (call.batch,), generator=generator) if call.lengths else None
    reset = torch.rand(*steps, generator=generator) < 0.4 if call.reset else None
    kernels = backend == "triton"
    torch.manual_seed(call.seed)  # of the masks
    *found, last = functional.lstm(
        x,
        hx,
        weights,
        bias=call.bias,
        num_layers=call.num_layers,
        proj_size=call.proj_size,
        bidirectional=call.bidirectional,
        batch_first=call.batch_first,
        lengths=lengths,
        reset=reset,
        reset_state=reset_state,
        return_states=call.return_states,
        recompute=call.recompute,
        batch_invariant=call.batch_invariant and kernels,
        variant=call.variant,
        training=True,
        backend=backend,
        precision="ieee",
    )
    outputs = [*found, *([last] if isinstance(last, Tensor) and not isinstance(last, functional.States) else [])]
    if isinstance(last, functional.States):
        outputs += [one for of_layers in last if of_layers is not None for one in of_layers]
    leaves = [t for t in (x, *weights, *(hx or ()), *(reset_state or ())) if t is not None]
    cotangents = [torch.randn(output.shape, generator=generator).to(dtype) for output in outputs]
    grads = torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True)
    return [*(output.detach() for output in outputs), *grads]


COMPILED = 5  # draws of a part that run as compiled code


def errors(got: list[Tensor], truth: list[Tensor]) -> float:
    """The largest, relative to the largest value of its tensor or 1."""
    assert [a.shape for a in got] == [b.shape for b in truth]
    return max(float((a.double() - b).abs().max() / max(float(b.abs().max()), 1.0)) for a, b in zip(got, truth))


@pytest.mark.parametrize("part", range(4))
def test_the_feature_product(part: int) -> None:
    own, ours, ran = {False: [0.0], True: [0.0]}, {False: [0.0], True: [0.0]}, []  # with and without layer norm

    @settings(
        max_examples=DRAWS // 4, deadline=None, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(calls())
    def check(call: Call) -> None:
        call = replace(call, seed=4 * call.seed + part)  # parts draw alike, their data differ
        truth = results(call, "torch", torch.float64)
        norm = call.variant.layer_norm
        explained = (1000 if norm else 100) * EPS
        own[norm].append(errors(results(call, "torch", torch.float32), truth))
        assert own[norm][-1] <= explained, f"PyTorch's path is off by {own[norm][-1]:.2e}"
        ran.append(call)
        if len(ran) % 8 == 0:
            ours[norm].append(errors(results(call, "triton", torch.float32), truth))
            assert ours[norm][-1] <= explained, f"the kernels are off by {ours[norm][-1]:.2e}"

    check()
    for norm in own:
        assert max(ours[norm]) <= 2 * max(own[norm]), f"layer norm: {norm}"
    assert len(set(ran)) >= 0.9 * DRAWS // 4
    assert len(ours[False]) + len(ours[True]) >= 0.1 * DRAWS // 4


@pytest.mark.machine
@pytest.mark.parametrize("part", range(4))
def test_compiled(engine: Engine, part: int) -> None:
    """A few of them on every target, by the compiled kernels."""
    ran = []

    @settings(
        max_examples=COMPILED, phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(calls())
    def check(call: Call) -> None:
        call = replace(call, seed=4 * call.seed + part)
        truth = results(call, "torch", torch.float64)
        with engine(call.seed):
            ours = results(call, "triton", torch.float32)
        explained = (1000 if call.variant.layer_norm else 100) * EPS
        found = errors(ours, truth)
        assert found <= explained, f"the kernels are off by {found:.2e}"
        ran.append(call)

    check()
    assert len(set(ran)) > COMPILED / 2
