"""The LSTM inside PyTorch's other tools: what nn.LSTM gives there, ours gives too, without a warning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from lstm_triton import LSTM, LSTMCell

BACKENDS = ["auto", "triton"]
pytestmark = [
    pytest.mark.filterwarnings("error", "ignore:Conversion of an array with ndim"),  # Triton 3.6's interpreter
    pytest.mark.parametrize("backend", BACKENDS),
]
TWO_LAYERS = dict(num_layers=2, bidirectional=True)


def pair(backend: str, *sizes: int, **options) -> tuple[nn.LSTM, LSTM]:
    """nn.LSTM and ours with the same weights."""
    theirs, ours = nn.LSTM(*sizes, **options), LSTM(*sizes, **options, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def batch(size: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 2, size, dtype=dtype, generator=torch.Generator().manual_seed(3))


def gradients(module: nn.Module, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """The output for `batch()` and the gradients of its square: of the input, then of all parameters."""
    module.zero_grad()
    x = batch().requires_grad_()
    torch.manual_seed(11)
    out = run(x) if run else module(x)[0]
    out.square().sum().backward()
    return [out.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("marked", [False, True], ids=["plain", "lengths"])
def test_activation_checkpointing(backend: str, use_reentrant: bool, dropout: float, marked: bool) -> None:
    """The second forward pass draws what the first drew."""
    module = LSTM(3, 4, **TWO_LAYERS, dropout=dropout, backend=backend)
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    marks = {"lengths": torch.tensor([2, 4])} if marked else {}

    def run(x: Tensor) -> Tensor:
        return module(x, **marks)[0]

    want = gradients(module, run)
    got = gradients(module, lambda x: checkpoint(run, x, use_reentrant=use_reentrant))
    assert len(calls) == 3
    for a, b in zip(got, want, strict=True):  # not to the bit: without gradients PyTorch's LSTM is oneDNN's
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def hogwild(module: LSTM, x: Tensor, connection) -> None:
    """The other process: run, run again after its parent's step, then take a step of its own."""
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        connection.recv()
        connection.send(module(x)[0].tolist())
    connection.recv()
    module(x)[0].square().sum().backward()
    optimizer.step()
    connection.send(module(x)[0].tolist())


def test_shared_memory_between_processes(backend: str) -> None:
    """Hogwild: weights that one process changes in place are those of the other."""
    module, x = LSTM(3, 4, backend=backend).share_memory(), batch()
    assert all(weight.is_shared() for weight in module._flat_weights)
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=hogwild, args=(module, x, there), daemon=True)
    process.start()
    there.close()  # the other process has its own: if it dies, `recv` ends instead of waiting

    def ask() -> Tensor:
        here.send("go")
        return torch.tensor(here.recv())

    try:
        first = module(x)[0]
        torch.testing.assert_close(ask(), first)
        first.square().sum().backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        second = module(x)[0]
        assert not torch.equal(first, second)
        torch.testing.assert_close(ask(), second)
        answer = ask()
        assert not torch.equal(answer, second)
        torch.testing.assert_close(answer, module(x)[0])
        process.join()
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("assign", [False, True])
def test_meta_construction(backend: str, assign: bool) -> None:
    theirs = nn.LSTM(3, 4, **TWO_LAYERS)
    with torch.device("meta"):
        ours = LSTM(3, 4, **TWO_LAYERS, backend=backend)
    assert all(weight.is_meta for weight in ours._flat_weights)
    if assign:
        ours.load_state_dict(theirs.state_dict(), assign=True)
        assert ours.weight_hh_l1.data_ptr() == theirs.weight_hh_l1.data_ptr()
    else:
        ours.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    assert_close(gradients(ours), gradients(theirs))


def test_assigning_a_state_dict_of_another_type(backend: str) -> None:
    theirs, ours = pair(backend, 3, 4, **TWO_LAYERS)
    ours(batch())
    ours.load_state_dict(theirs.double().state_dict(), assign=True)
    x = batch(dtype=torch.float64)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


class WeightDrop(nn.Module):
    """DropConnect, as of AWD-LSTM: entries of a weight are dropped in training."""

    def forward(self, weight: Tensor) -> Tensor:
        return nn.functional.dropout(weight, 0.5, self.training)


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l0", "weight_hh_l1_reverse"])
@pytest.mark.parametrize(
    "parametrized",
    [
        lambda module, name: parametrizations.weight_norm(module, name),
        lambda module, name: parametrizations.spectral_norm(module, name),
        lambda module, name: parametrize.register_parametrization(module, name, WeightDrop()),
    ],
    ids=["weight-norm", "spectral-norm", "weight-drop"],
)
def test_parametrizations(backend: str, parametrized: Callable, name: str) -> None:
    """Gradients reach the originals; a random parametrization is drawn as often as in nn.LSTM, so seeds agree."""
    modules = pair(backend, 3, 4, **TWO_LAYERS)
    for module in modules:
        torch.manual_seed(2)
        parametrized(module, name)
    theirs, ours = modules
    assert any(key.startswith(f"parametrizations.{name}.original") for key, _ in ours.named_parameters())
    for _ in range(2):
        assert_close(*([*gradients(module), torch.rand(1)] for module in (ours, theirs)))
    for module in modules:
        module.eval()
    with parametrize.cached():
        assert_close([ours(batch())[0]], [theirs(batch())[0]])
    for module in modules:
        parametrize.remove_parametrizations(module, name)
    assert_close(gradients(ours), gradients(theirs))


def test_a_parametrized_module_changes_its_type(backend: str) -> None:
    theirs, ours = (parametrizations.weight_norm(m, "weight_hh_l0") for m in pair(backend, 3, 4))
    for module in (theirs, ours):
        module(batch())
        module.double()
    x = batch(dtype=torch.float64)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_hooks_of_the_old_style_on_weights(backend: str, name: str) -> None:
    """Pruning and the old spectral_norm put a plain tensor in a parameter's place before every call."""
    theirs, ours = pair(backend, 3, 4)
    for module in (theirs, ours):
        prune.l1_unstructured(module, name, amount=0.5)
    assert_close(gradients(ours), gradients(theirs))
    assert ((getattr(ours, f"{name}_orig").grad == 0) == (getattr(ours, f"{name}_mask") == 0)).all()
    for module in (theirs, ours):
        prune.remove(module, name)
        torch.manual_seed(4)
        nn.utils.spectral_norm(module, name)
    for _ in range(2):  # each call goes on with the power iteration
        assert_close(gradients(ours), gradients(theirs))


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        gradients(module)
        optimizer.step()


def test_moving_average_of_weights(backend: str) -> None:
    module = LSTM(3, 4, **TWO_LAYERS, backend=backend)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    want = {}
    for _ in range(3):
        steps(module, optimizer, 1)
        average.update_parameters(module)
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        want = {name: 0.75 * want[name] + 0.25 * tensor for name, tensor in state.items()} if want else state
    assert_close(list(average.module.state_dict().values()), list(want.values()))
    theirs = nn.LSTM(3, 4, **TWO_LAYERS)
    theirs.load_state_dict(want)
    assert_close([average(batch())[0]], [theirs(batch())[0]])


def test_a_copy_in_mid_training_goes_its_own_way(backend: str) -> None:
    module = LSTM(3, 4, **TWO_LAYERS, backend=backend)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    steps(module, optimizer, 2)
    other = copy.deepcopy(module)
    other_optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # which would share its tensors
    assert not {*module.parameters(), *module._flat_weights} & {*other.parameters(), *other._flat_weights}
    before = other(batch())[0]
    steps(module, optimizer, 2)
    assert torch.equal(other(batch())[0], before)
    steps(other, other_optimizer, 2)
    for a, b in zip(module.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_a_weight_of_two_modules(backend: str) -> None:
    """Its gradient is the sum of what it is in each, and a step changes it in both."""
    first, second = LSTM(3, 4, backend=backend), LSTM(4, 4, backend=backend)
    apart = copy.deepcopy(second)
    apart.load_state_dict({**second.state_dict(), "weight_hh_l0": first.weight_hh_l0.detach().clone()})
    second.weight_hh_l0 = first.weight_hh_l0
    model = nn.ModuleList([first, second])
    assert len(list(model.parameters())) == 7

    def run(lower: LSTM, upper: LSTM) -> Tensor:
        out = upper(lower(batch())[0])[0]
        out.square().sum().backward()
        return out

    other = copy.deepcopy(first)
    want = run(other, apart)
    got = run(first, second)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(first.weight_hh_l0.grad, other.weight_hh_l0.grad + apart.weight_hh_l0.grad)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert second.weight_hh_l0 is first.weight_hh_l0 is second._flat_weights[1]
    assert not torch.equal(run(first, second), got)


def test_a_weight_of_two_layers_and_directions(backend: str) -> None:
    modules = pair(backend, 8, 4, **TWO_LAYERS)
    for module in modules:
        for name in ("weight_hh_l0_reverse", "weight_hh_l1"):
            setattr(module, name, module.weight_hh_l0)
        module.weight_ih_l1 = module.weight_ih_l0
        assert len(list(module.parameters())) == 13
    results = []
    for module in modules:
        out = module(batch(8))[0]
        out.square().sum().backward()
        results.append([out, *(parameter.grad for parameter in module.parameters())])
    assert_close(*results)
    copied = copy.deepcopy(modules[1])
    assert copied.weight_hh_l1 is copied.weight_hh_l0


def test_functional_call_with_other_weights(backend: str) -> None:
    """Gradients go to the weights given; the module's own are as they were, used or not."""
    theirs, ours = pair(backend, 3, 4, **TWO_LAYERS)
    before = ours(batch())[0]
    grads = []
    for module in (theirs, ours):
        torch.manual_seed(1)
        given = {name: torch.randn_like(p).requires_grad_() for name, p in module.named_parameters()}
        del given["bias_hh_l1"]  # this one is the module's
        out, _ = torch.func.functional_call(module, given, (batch(),))
        out.square().sum().backward()
        grads.append([out, module.bias_hh_l1.grad, *(tensor.grad for tensor in given.values())])
    assert_close(*grads)
    assert ours.weight_hh_l0.grad is None
    assert torch.equal(ours(batch())[0], before)


@pytest.mark.parametrize("swap", [False, True])
def test_types(backend: str, swap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """.half(), .double() and .to(dtype) after a call, whether they replace a parameter's data or swap the tensors."""
    theirs, ours = pair(backend, 3, 4, **TWO_LAYERS)
    ours(batch())
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", swap)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float16, 5e-3), (torch.float32, 1e-4)):
        for module in (theirs, ours):
            assert {torch.float64: module.double, torch.float16: module.half}.get(dtype, module.float)() is module
            module.to(dtype)
        assert all(weight.dtype == dtype for weight in ours._flat_weights)
        torch.testing.assert_close(ours(batch(dtype=dtype))[0], theirs(batch(dtype=dtype))[0], rtol=0, atol=tolerance)


def test_a_frozen_module_passes_gradients_on(backend: str) -> None:
    theirs, ours = pair(backend, 3, 4, **TWO_LAYERS)
    grads = []
    for module in (theirs, ours):
        module.requires_grad_(False)
        assert not module(batch())[0].requires_grad
        x = batch().requires_grad_()
        module(x)[0].square().sum().backward()
        assert all(parameter.grad is None for parameter in module.parameters())
        module.requires_grad_(True)
        grads.append([x.grad, *gradients(module)])
    assert_close(*grads)


def scale_gradient(parameter: Tensor) -> None:
    parameter.grad.mul_(9)


def test_hooks_of_modules(backend: str) -> None:
    """Hooks before and after forward may replace what goes through; backward hooks see the same gradients."""
    modules = pair(backend, 3, 4, **TWO_LAYERS)
    seen: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}
    for module in modules:
        module.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
        module.register_forward_hook(lambda _, inputs, output: (output[0] + 1, output[1]))
        module.register_full_backward_pre_hook(lambda m, grads: seen[m].append(grads[0]) or (3 * grads[0], *grads[1:]))
        module.register_full_backward_hook(lambda m, ins, outs: seen[m].extend([ins[0], outs[0]]) or (ins[0] * 5,))
        module.weight_hh_l0.register_hook(lambda grad: grad * 7)
        module.bias_ih_l1.register_post_accumulate_grad_hook(scale_gradient)
    theirs, ours = (gradients(module) for module in modules)
    assert_close(ours, theirs)
    assert_close(seen[modules[1]], seen[modules[0]])
    assert len(seen[modules[1]]) == 3


def test_hooks_see_our_keywords(backend: str) -> None:
    module, seen = LSTM(3, 4, backend=backend), []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {"lengths": kwargs["lengths"] - 1}), with_kwargs=True
    )
    module.register_forward_hook(lambda _, args, kwargs, output: seen.append(kwargs), with_kwargs=True)
    out, _ = module(batch(), lengths=torch.tensor([4, 2]))
    assert torch.equal(out[1:, 1], torch.zeros(3, 4))
    assert seen[0]["lengths"].tolist() == [3, 1]


@pytest.mark.parametrize("foreach", [False, True])
def test_clipping(backend: str, foreach: bool) -> None:
    theirs, ours = pair(backend, 3, 4, **TWO_LAYERS)
    norms = []
    for module in (theirs, ours):
        gradients(module)
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.1, foreach=foreach, error_if_nonfinite=True))
    torch.testing.assert_close(*norms)
    assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    clipped = nn.utils.get_total_norm([p.grad for p in ours.parameters()])
    torch.testing.assert_close(clipped, torch.tensor(0.1), rtol=1e-4, atol=0)


def test_gradient_scaling(backend: str) -> None:
    """A scaled step is a plain one, and one with an infinite gradient is skipped."""
    plain = LSTM(3, 4, backend=backend)
    scaled = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain(batch())[0].square().sum().backward()
    optimizers[0].step()
    scaler.scale(scaled(batch())[0].square().sum()).backward()
    scaler.step(optimizers[1])
    scaler.update()
    assert_close(list(scaled.parameters()), list(plain.parameters()))
    before = copy.deepcopy(scaled.state_dict())
    optimizers[1].zero_grad()
    with np.errstate(invalid="ignore"):  # the interpreter computes with NumPy
        scaler.scale(scaled(batch())[0].square().sum() * float("inf")).backward()
    scaler.step(optimizers[1])
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in scaled.state_dict().items())


@pytest.mark.parametrize("options", [TWO_LAYERS, dict(bias=False, batch_first=True)], ids=["two-layers", "no-bias"])
def test_checkpoints_go_both_ways(backend: str, options: dict, tmp_path: Path) -> None:
    """Through a file that holds tensors only, strictly, into a module that has been called before."""
    for source, target in (pair(backend, 3, 4, **options), reversed(pair(backend, 3, 4, **options))):
        gradients(source)
        torch.optim.SGD(source.parameters(), lr=0.5).step()
        torch.save(source.state_dict(), tmp_path / "checkpoint.pt")
        loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        gradients(target)
        assert str(target.load_state_dict(loaded, strict=True)) == "<All keys matched successfully>"
        assert_close(gradients(target), gradients(source))


def test_wrong_checkpoints_are_refused_as_by_nn_lstm(backend: str) -> None:
    theirs, ours = pair(backend, 3, 4)
    state = theirs.state_dict()
    missing = {name: tensor for name, tensor in state.items() if name != "bias_hh_l0"}
    for wrong in (missing, {**state, "more": torch.ones(1)}, nn.LSTM(3, 5).state_dict()):
        messages = []
        for module in (theirs, ours):
            with pytest.raises(RuntimeError) as error:
                module.load_state_dict(wrong)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


class Model(nn.Module):
    def __init__(self, lstm: nn.Module) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        out, (h_n, _) = self.lstm(x) if lengths is None else self.lstm(x, lengths=lengths)
        return out.sum() + h_n.sum()


def test_torch_fx(backend: str) -> None:
    """A leaf, as nn.LSTM is: one node, which computes what the module does."""
    theirs, ours = (torch.fx.symbolic_trace(Model(module), {"lengths": None}) for module in pair(backend, 3, 4))
    assert [node.op for node in ours.graph.nodes] == [node.op for node in theirs.graph.nodes]
    torch.testing.assert_close(ours(batch()), theirs(batch()))
    marked = torch.fx.symbolic_trace(Model(ours.lstm))
    lengths = torch.tensor([4, 2])
    assert torch.equal(marked(batch(), lengths), Model(ours.lstm)(batch(), lengths))


def test_torch_fx_traces_a_cell(backend: str) -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = LSTMCell(3, 4, backend=backend)

        def forward(self, x: Tensor) -> Tensor:
            h, c = self.cell(x)
            return h + self.cell(x, (h, c))[0]

    module = Step()
    traced, x = torch.fx.symbolic_trace(module), torch.randn(2, 3)
    assert sum(node.op == "call_module" for node in traced.graph.nodes) == 2
    assert torch.equal(traced(x), module(x))


def test_gradients_of_samples(backend: str) -> None:
    """`call_for_per_sample_grads` is PyTorch's, for PyTorch's own LSTM alone: its path, or an error that says so."""
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    found = []
    for lstm in pair(backend, 3, 4, batch_first=True):
        model = Model(lstm)
        call = call_for_per_sample_grads(model, batch_size=4, loss_reduction="sum")
        x = batch().requires_grad_()  # nn.LSTM then takes no oneDNN, for which there is no rule
        if isinstance(lstm, LSTM) and backend == "triton":
            with pytest.raises(RuntimeError, match="per-sample gradients"):
                call(x)
            return
        call(x).backward()
        found.append([parameter.grad_sample for parameter in model.parameters()])
    assert_close(found[1], found[0])
