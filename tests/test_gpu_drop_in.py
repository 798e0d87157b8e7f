"""What a drop-in promises, on a CUDA device: graphs, memory modes, ensembles, single steps, invariance."""

from __future__ import annotations

import pytest
import torch
from layer.test_memory import KEEP, kept_bytes
from layers import Case, assert_like, with_exact_products
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lstm_triton import LSTM, LSTMCell

pytestmark = pytest.mark.gpu
BF16 = dict(device="cuda", dtype=torch.bfloat16)


def gradients(module: nn.Module, x: Tensor, **marks) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out, (h_n, c_n) = module(x, **marks)
    return [out, h_n, c_n, *torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("hidden_size", [64, 512, 2048])
@pytest.mark.parametrize("cooperative", ["1", "0"])
def test_cuda_graphs(hidden_size: int, cooperative: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture and replay of forward and backward: flags and mailboxes are reset inside the graph."""
    monkeypatch.setenv("LSTM_TRITON_COOPERATIVE", cooperative)
    module = LSTM(32, hidden_size, bidirectional=True, backend="triton").to(**BF16)
    x = with_exact_products(module, 7, 9, 32)
    lengths = torch.randint(0, 8, (9,), device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(module, x, lengths=lengths)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(module, x, lengths=lengths)
    for _ in range(20):
        x.copy_(torch.randint(-1, 2, x.shape))
        lengths.random_(0, 8)
        graph.replay()
        assert_like(captured, gradients(module, x, lengths=lengths))


def test_graphed_callables() -> None:
    module = LSTM(32, 128, backend="triton").to(**BF16)
    x = with_exact_products(module, 7, 16, 32).requires_grad_()
    want = gradients(module, x)
    graphed = torch.cuda.make_graphed_callables(module, (x,))
    assert_like(gradients(graphed, x), want)


@pytest.mark.parametrize("recompute", ["gates", "chunk:16"])
@pytest.mark.parametrize("hidden_size", [64, 512])
def test_memory_modes(recompute: str, hidden_size: int) -> None:
    plain = LSTM(32, hidden_size, bidirectional=True, backend="triton").to(**BF16)
    module = LSTM(32, hidden_size, bidirectional=True, backend="triton", recompute=recompute).to(**BF16)
    module.load_state_dict(plain.state_dict())
    x = torch.randn(50, 9, 32, **BF16)
    lengths = torch.randint(0, 51, (9,), device="cuda")
    for a, b in zip(gradients(module, x, lengths=lengths), gradients(plain, x, lengths=lengths)):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


@pytest.mark.parametrize("recompute", ["none", "gates", "chunk:32"])
def test_what_is_kept_between_the_passes(recompute: str) -> None:
    """Allocated bytes after the forward pass, against the formula."""
    assert set(KEEP) == {"none", "gates"}
    case = Case(seq_len=512, batch=32, input_size=64, hidden_size=256, dtype=torch.bfloat16)
    module = LSTM(64, 256, backend="triton", recompute=recompute).to(**BF16)
    x = torch.randn(512, 32, 64, **BF16)
    module(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = module(x)
    kept = torch.cuda.memory_allocated() - before
    formula = kept_bytes(case, recompute)
    assert formula <= kept <= 1.03 * formula, f"{kept / formula:.3f} of the formula"
    del out


def test_a_long_sequence_without_gradients_takes_little_more_than_its_output() -> None:
    module = LSTM(16, 256, backend="triton").to(**BF16)
    x = torch.randn(50_000, 16, 16, **BF16)
    with torch.no_grad():
        module(x[:2000])
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, _ = module(x)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= out.nbytes + (160 << 20), f"{taken / out.nbytes:.2f} times the output"


def test_ensemble() -> None:
    members = [LSTM(32, 128, batch_first=True, backend="triton").to(**BF16) for _ in range(8)]
    parameters, _ = torch.func.stack_module_state(members)
    base = LSTM(32, 128, batch_first=True, backend="triton", device="meta")
    x = torch.randn(16, 20, 32, **BF16)
    out = torch.func.vmap(lambda p: torch.func.functional_call(base, p, (x,))[0])(parameters)
    grads = torch.autograd.grad(out.float().square().sum(), list(parameters.values()))
    for index, member in enumerate(members):
        (
            want,
            *_,
        ) = gradients(member, x)
        torch.testing.assert_close(out[index], want, rtol=2e-2, atol=1e-2)
        own = torch.autograd.grad(member(x)[0].float().square().sum(), list(member.parameters()))
        for a, b in zip(grads, own):
            torch.testing.assert_close(a[index], b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


@pytest.mark.parametrize("hidden_size", [20, 256, 650, 2048])
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_single_step(hidden_size: int, batch: int) -> None:
    module = LSTM(48, hidden_size, 2, bidirectional=True, backend="triton").to(**BF16)
    exact = nn.LSTM(48, hidden_size, 2, bidirectional=True).cuda().double()
    exact.load_state_dict(module.state_dict())
    x = torch.randn(1, batch, 48, **BF16)
    for a, b in zip(gradients(module, x), gradients(exact, x.double())):
        torch.testing.assert_close(a.double(), b, rtol=3e-2, atol=3e-2 * float(b.abs().max()))


def test_masked_cell() -> None:
    cell = LSTMCell(32, 128, backend="triton").to(**BF16)
    x, hx = torch.randn(8, 32, **BF16), (torch.randn(8, 128, **BF16), torch.randn(8, 128, **BF16))
    active = torch.arange(8, device="cuda") % 2 == 0
    h, c = cell(x, hx, active=active)
    assert torch.equal(h[~active], hx[0][~active])
    assert torch.equal(c[~active], hx[1][~active])
    for a, b in zip((h, c), cell(x, hx)):
        assert torch.equal(a[active], b[active])


@pytest.mark.parametrize("hidden_size", [64, 512])
def test_batch_invariance(hidden_size: int) -> None:
    module = LSTM(48, hidden_size, 2, backend="triton", batch_invariant=True).to(**BF16)
    x = torch.randn(24, 300, 48, **BF16)
    with torch.no_grad():
        whole, _ = module(x)
        for rows in ([7], [299, 7, 0], list(range(7, 107))):
            assert torch.equal(module(x[:, rows])[0][:, rows.index(7)], whole[:, 7])
        first, state = module(x[:11])
        assert torch.equal(torch.cat((first, module(x[11:], state)[0])), whole)


@pytest.mark.parametrize("hidden_size", [64, 512])
def test_states_of_every_step(hidden_size: int) -> None:
    module = LSTM(48, hidden_size, bidirectional=True, backend="triton", precision="ieee").cuda()
    twin = LSTM(48, hidden_size, bidirectional=True, backend="torch").cuda()
    twin.load_state_dict(module.state_dict())
    x, lengths = torch.randn(6, 9, 48, device="cuda"), torch.randint(0, 7, (9,), device="cuda")
    results = []
    for one in (module, twin):
        *_, states = one(x, lengths=lengths, return_states=("c", "layers", "gates"))
        loss = sum(leaf.square().sum() for leaf in tree_leaves(states))
        results.append([*tree_leaves(states), *torch.autograd.grad(loss, list(one.parameters()))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_compiled_by_inductor() -> None:
    module = LSTM(32, 128, 2, backend="triton").to(**BF16)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for seq_len, batch in ((5, 8), (9, 3)):
        x = torch.randn(seq_len, batch, 32, **BF16)
        for a, b in zip(gradients(compiled, x), gradients(module, x)):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


def test_nested_tensors_do_not_wait_for_the_device() -> None:
    module = LSTM(32, 64, batch_first=True, backend="triton").to(**BF16)
    nested = torch.nested.nested_tensor(
        [torch.randn(length, 32, **BF16) for length in (3, 1, 9)], layout=torch.jagged, requires_grad=True
    )
    module(nested)[0].values().sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = module(nested)
        out.values().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.values().shape == (13, 64)
