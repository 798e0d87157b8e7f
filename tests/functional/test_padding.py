"""Layers padded to a hidden size that is kinder to memory: nothing outside them shows it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from engines import Engine

from lstm_triton import LSTM
from lstm_triton.commands import tune
from lstm_triton.explain import explain_call
from lstm_triton.functional import decision, stack
from lstm_triton.planning import store
from lstm_triton.planning.cudnn import Call
from lstm_triton.planning.device import INTERPRETER, KNOWN
from lstm_triton.planning.padding import padded_size
from lstm_triton.planning.planner import plan
from lstm_triton.planning.problem import bucket_of
from lstm_triton.planning.route import Request, refusal_on
from lstm_triton.planning.table import Entry

H, PADDED = 5, 8


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every plain layer is padded to 8 units; the hidden sizes that the kernels then have."""
    seen: list[int] = []
    real = stack.eager.layer
    monkeypatch.setattr(decision, "kernel_hidden_size", lambda *request: PADDED)

    def noted(v, *known):
        seen.append(v.w_hh.shape[2])
        return real(v, *known)

    monkeypatch.setattr(stack.eager, "layer", noted)
    return seen


def pair(**options) -> tuple[LSTM, LSTM]:
    torch.manual_seed(0)
    ours = LSTM(3, H, backend="triton", precision="ieee", **options)
    theirs = LSTM(3, H, backend="torch", precision="ieee", **options).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


CASES = {
    "plain": ({}, {}),
    "two layers, two directions": (dict(num_layers=2, bidirectional=True, batch_first=True), {}),
    "no bias, projection": (dict(bias=False, proj_size=2), {}),
    "marks": ({}, dict(lengths=torch.tensor([4, 0, 2]), reset=torch.rand(4, 3) < 0.3)),
    "gates again": (dict(recompute="gates", bidirectional=True), {}),
    "in chunks": (dict(recompute="chunk:2"), {}),
}


@pytest.mark.parametrize(("options", "given"), CASES.values(), ids=CASES)
def test_results_and_gradients(options: dict, given: dict, sizes: list[int], engine: Engine) -> None:
    ours, theirs = pair(**options)
    x = torch.randn((3, 4, 3) if options.get("batch_first") else (4, 3, 3))
    found = []
    for module, data in ((ours, x.clone()), (theirs, x.double())):
        data.requires_grad_()
        with engine():
            out, (h_n, c_n) = module(data, **given)
            (out.sin().sum() + h_n.cos().sum() + (c_n * c_n).sum()).backward()
        found.append([out, h_n, c_n, data.grad, *(parameter.grad for parameter in module.parameters())])
    for got, want in zip(*found):
        assert got.shape == want.shape
        assert got.is_contiguous()
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=2e-6)
    assert set(sizes) == {PADDED}


def test_states(sizes: list[int]) -> None:
    ours, theirs = pair(bidirectional=True)
    x, state = torch.randn(4, 3, 3), (torch.randn(2, 3, H), torch.randn(2, 3, H))
    found = ours(x, state, return_states=("c", "layers", "gates"))
    wanted = theirs(x.double(), tuple(t.double() for t in state), return_states=("c", "layers", "gates"))
    for got, want in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(wanted)):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=2e-6)
    assert sizes == [PADDED]


def test_what_is_not_padded(sizes: list[int]) -> None:
    module, x = LSTM(3, H, backend="triton"), torch.randn(4, 2, 3)
    module(x[:1])
    LSTM(3, H, backend="triton", layer_norm=True, peephole=True)(x)
    LSTM(3, 8, backend="triton")(x)
    assert sizes == [H, H, 8]


def test_vmap_compile_and_second_derivatives(sizes: list[int]) -> None:
    ours, theirs = pair()
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(torch.compile(ours, backend="aot_eager", fullgraph=True)(x)[0], ours(x)[0])
    given = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(ours(given)[0].sin().sum(), given, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), given)
    twin = x.double().requires_grad_()
    (first,) = torch.autograd.grad(theirs(twin)[0].sin().sum(), twin, create_graph=True)
    (want,) = torch.autograd.grad(first.square().sum(), twin)
    torch.testing.assert_close(second, want.float(), rtol=1e-4, atol=1e-5)
    members = torch.func.stack_module_state([ours, pair()[0]])[0]
    results = torch.func.vmap(lambda p: torch.func.functional_call(ours, p, (x,))[0])(members)
    torch.testing.assert_close(results[0], ours(x)[0])
    assert set(sizes) == {PADDED}


def test_where_it_is_predicted_to_win() -> None:
    """The word models of the literature; and never what is aligned, fits one program, or runs elsewhere."""
    for arch in ("sm_80", "sm_90", "sm_120"):
        assert padded_size(650, 1, "float32", "tf32", KNOWN[arch]) == 652
        assert padded_size(1150, 1, "bfloat16", "tf32", KNOWN[arch]) == 1152
        assert padded_size(1500, 1, "float16", "tf32", KNOWN[arch]) == 1504
    for size, dtype in itertools.product((1, 77, 128, 650, 1024), ("float32", "bfloat16")):
        assert padded_size(size, 2, dtype, "tf32", KNOWN["gfx942"]) == size
        assert padded_size(size, 2, dtype, "tf32", INTERPRETER) == size
        if size % 8 == 0 or size <= 128:
            assert padded_size(size, 2, dtype, "tf32", KNOWN["sm_90"]) == size
    text = str(explain_call(Call(1150, 1150, 16, 1, 1, "bfloat16"), KNOWN["sm_90"]))
    assert text.count("padded to H=1152") == 2


@pytest.mark.machine
def test_a_device_pads_by_itself(engine: Engine) -> None:
    """A size that is predicted to win, through the whole library."""
    torch.manual_seed(0)
    size = next(s for s in range(129, 400) if padded_size(s, 1, "float32", "tf32", KNOWN[engine.name]) != s)
    module, x = LSTM(3, size, backend="triton"), torch.randn(2, 2, 3)
    with engine(), torch.no_grad():
        out, _ = module(x)
    want, _ = torch.nn.LSTM.forward(module.cpu(), x)
    torch.testing.assert_close(out, want, rtol=3e-3, atol=3e-3)


def test_batch_invariant_steps_are_padded_like_the_sequence(sizes: list[int]) -> None:
    """Or its bits would depend on where it is cut."""
    module, x = LSTM(3, H, backend="triton", batch_invariant=True), torch.randn(4, 2, 3)
    whole, _ = module(x)
    state, steps = None, []
    for step in x.split(1):
        out, state = module(step, state)
        steps.append(out)
    assert torch.equal(torch.cat(steps), whole)
    assert set(sizes) == {PADDED}


def test_tables_speak_of_the_size_that_is_computed() -> None:
    """`tune` measures what a call then asks for; and whether the kernels run is asked of it too."""
    device = KNOWN["sm_90"]
    problems = tune.Shape(650, 20, 1, "float32", "tf32").problems(device)
    assert {problem.hidden_size for problem in problems} == {652}
    entries = {
        bucket_of(p): Entry(replace(plan(p, device).config, max_batch_tiles=0), {}, complete=True) for p in problems
    }
    with store.using(replace(store.new_table(device, {}), name="measured", entries=entries), device):
        text = str(explain_call(Call(650, 650, 20, 1, 1, "float32"), device))
    assert text.count("plan from measured, padded to H=652") == 2
    # Here 577 units have one launch a step, and 580 need none.
    assert refusal_on(KNOWN["sm_86"], Request("auto", "cuda", None, "float32", "tf32", 577, 2)) == ""
