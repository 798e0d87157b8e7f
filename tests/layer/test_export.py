"""torch.export with dynamic T and B, programs without our operators, AOTInductor, and torch.compile."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lstm_triton
from lstm_triton import LSTM, LSTMCell
from lstm_triton.layer import choice
from lstm_triton.planning import route
from lstm_triton.planning.planner import NoPlan
from lstm_triton.variant import PLAIN

T, B = torch.export.Dim("T", min=2, max=4096), torch.export.Dim("B", min=2, max=512)
BACKENDS = ["auto", "triton"]
OURS = {"lstm_triton.layer.default", "lstm_triton.linear.default"}


def marks_of(batch: int, seq_len: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch + seq_len)
    return {
        "lengths": torch.randint(0, seq_len + 1, (batch,), generator=generator),
        "reset": torch.rand((batch, seq_len), generator=generator) < 0.3,
    }


def export(module: LSTM, marked: bool) -> torch.export.ExportedProgram:
    shapes = {"input": {0: B, 1: T}} | ({"lengths": {0: B}, "reset": {0: B, 1: T}} if marked else {})
    with torch.no_grad():
        return torch.export.export(
            module, (torch.randn(3, 5, 4),), marks_of(3, 5) if marked else {}, dynamic_shapes=shapes
        )


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def assert_same(program, module: LSTM, marked: bool) -> None:
    """On the exported shapes and two others."""
    for batch, seq_len in ((3, 5), (2, 9), (7, 2)):
        x, marks = torch.randn(batch, seq_len, 4), marks_of(batch, seq_len) if marked else {}
        with torch.no_grad():
            want, got = module(x, **marks), program(x, **marks)
        for a, b in zip(tree_leaves(got), tree_leaves(want)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("marked", [False, True], ids=["plain", "marked"])
def test_dynamic_sizes(backend: str, marked: bool) -> None:
    """With our operators in the program, and with none; "auto" on the CPU has no kernels, and exports all the same."""
    module = LSTM(4, 5, 2, bidirectional=True, batch_first=True, backend=backend).eval()
    program = export(module, marked)
    assert operators(program) & OURS
    assert_same(program.module(), module, marked)
    plain = program.run_decompositions(lstm_triton.decompositions())
    assert not operators(plain) & OURS
    assert "scan" in operators(plain)
    assert_same(plain.module(), module, marked)


def test_projection() -> None:
    module = LSTM(4, 5, proj_size=2, batch_first=True, backend="triton").eval()
    plain = export(module, True).run_decompositions(lstm_triton.decompositions())
    assert not operators(plain) & OURS
    assert_same(plain.module(), module, True)


def test_batch_invariance_has_no_decomposition() -> None:
    module = LSTM(4, 5, proj_size=2, batch_first=True, backend="triton", batch_invariant=True).eval()
    program = export(module, False)
    assert operators(program) >= OURS
    assert_same(program.module(), module, False)
    with pytest.raises(RuntimeError, match="batch_invariant has no decomposition"):
        program.run_decompositions(lstm_triton.decompositions())


def test_a_decomposed_program_runs_without_this_library(tmp_path: Path) -> None:
    module = LSTM(4, 5, batch_first=True).eval()
    path = tmp_path / "program.pt2"
    torch.export.save(export(module, False).run_decompositions(lstm_triton.decompositions()), path)
    x = torch.randn(2, 3, 4)
    torch.save((x, module(x)[0].detach()), tmp_path / "case.pt")
    text = (
        "import sys, torch\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "x, want = torch.load(sys.argv[2])\n"
        "torch.testing.assert_close(program(x)[0], want)\n"
        "assert 'lstm_triton' not in sys.modules\n"
    )
    run = [sys.executable, "-c", text, str(path), str(tmp_path / "case.pt")]
    subprocess.run(run, check=True, cwd=tmp_path)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no device for kernels."""
    for module in (choice, route):
        monkeypatch.setattr(module, "kernel_device", lambda device: NoPlan("there is no GPU"))


class Step(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = LSTMCell(4, 5)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.cell(x, (h, c))


WITH_GRADIENTS = {
    "plain": (LSTM(4, 5, 2, bidirectional=True), (torch.randn(6, 3, 4),)),
    "recompute": (LSTM(4, 5, recompute="gates"), (torch.randn(6, 3, 4),)),
    "chunks": (LSTM(4, 5, recompute="chunk:4"), (torch.randn(6, 3, 4),)),
    "variants": (LSTM(4, 5, layer_norm=True, peephole=True, zoneout=(0.1, 0.2)), (torch.randn(6, 3, 4),)),
    "projection": (LSTM(4, 5, proj_size=2), (torch.randn(6, 3, 4),)),
    "cell": (Step(), (torch.randn(3, 4), torch.randn(3, 5), torch.randn(3, 5))),
}


@pytest.mark.parametrize(("module", "x"), WITH_GRADIENTS.values(), ids=WITH_GRADIENTS)
@pytest.mark.parametrize("mode", ["evaluation", "decomposed", "training"])
def test_exported_with_gradients(module: torch.nn.Module, x: tuple, mode: str, nowhere: None) -> None:
    """As the documentation of torch.export does it; and run, and gone back through, where there are no kernels."""
    module.train(mode == "training" and getattr(module, "variant", PLAIN) == PLAIN)
    program = torch.export.export(module, x)
    if mode == "decomposed":
        program = program.run_decompositions(lstm_triton.decompositions())
    with torch.no_grad():
        for got, want in zip(tree_leaves(program.module()(*x)), tree_leaves(module(*x))):
            torch.testing.assert_close(got, want)
    if mode == "decomposed":
        return
    found = []
    for one in (program.module(), module):
        sum(tensor.square().sum() for tensor in tree_leaves(one(*x))).backward()
        found.append({name: parameter.grad for name, parameter in one.named_parameters()})
        one.zero_grad()
    for name, want in found[1].items():
        torch.testing.assert_close(found[0][name], want)


def test_the_operator_without_kernels(nowhere: None) -> None:
    x, weights = torch.randn(3, 2, 4), (torch.randn(1, 20, 4), torch.randn(1, 20, 5), torch.randn(1, 20))
    nothing = (None,) * 11
    for keep in ("nothing", "cells", "all", "chunk:2"):
        arguments = (x, *weights, *nothing, False, False, keep, False, "ieee", "", "")
        found = torch.ops.lstm_triton.layer(*arguments)
        torch.testing.assert_close(found[0][-1], found[1][0])
        torch.library.opcheck(torch.ops.lstm_triton.layer.default, arguments, test_utils="test_faketensor")
    with pytest.raises(RuntimeError, match="there is no GPU"):
        torch.ops.lstm_triton.layer(x, *weights, *nothing, False, False, "nothing", True, "ieee", "", "")


ONNX = {
    "plain": LSTM(4, 5, 2, bidirectional=True, batch_first=True),
    "variants": LSTM(4, 5, layer_norm=True, learn_initial_state=True, batch_first=True),
    "projection": LSTM(4, 5, proj_size=2, batch_first=True),
}


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("module", ONNX.values(), ids=ONNX)
def test_onnx(module: LSTM, tmp_path: Path) -> None:
    """By PyTorch's exporter as it comes, with sizes that are open, run by onnxruntime."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), module).eval()
    program = torch.onnx.export(model, (torch.randn(2, 5, 3),), dynamic_shapes=({0: B, 1: T},), verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch, seq_len in ((2, 5), (3, 9)):
        x = torch.randn(batch, seq_len, 3)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for got, want in zip(found, tree_leaves(model(x))):
            torch.testing.assert_close(torch.from_numpy(got), want.detach(), rtol=1e-4, atol=1e-5)


MARKED = {
    "lengths": ({}, dict(lengths=torch.tensor([3, 1]))),
    "resets": ({}, dict(reset=torch.rand(3, 2) < 0.5)),
    "variant": (dict(layer_norm=True, peephole=True), {}),
    "states": (dict(recompute="gates"), dict(return_states=("c",))),
}


@pytest.mark.parametrize(("options", "given"), MARKED.values(), ids=MARKED)
def test_compiled_without_kernels(options: dict, given: dict, nowhere: None) -> None:
    """One graph, as long for any T, with the results of the loop."""
    from torch._dynamo.testing import CompileCounterWithBackend

    module, x = LSTM(4, 5, 2, **options), torch.randn(3, 2, 4)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, found = torch.compile(module, fullgraph=True, backend=counter), []
    for one in (module, compiled):
        results = tree_leaves(one(x, **given))
        found.append([*results, *torch.autograd.grad(results[0].square().sum(), list(module.parameters()))])
    for got, want in zip(found[1], found[0]):
        torch.testing.assert_close(got, want)
    assert counter.op_count < 80


def test_who_lets_dynamo_trace_rnns_gets_one_graph(nowhere: None) -> None:
    module, x = LSTM(4, 5), torch.randn(3, 2, 4)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x)[0], module(x)[0])
        compiled(x)[0].sum().backward()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(module, fullgraph=True, backend="eager")(x)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler, and there is none")
def test_aot_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program with our operators; Inductor 2.13 fails inside itself on a `scan` of dynamic length."""
    # Inductor's usual folder is every process's, with locks that wait for ten minutes.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    module = LSTM(4, 5, batch_first=True, backend="triton").eval()
    path = torch._inductor.aoti_compile_and_package(export(module, False), package_path=str(tmp_path / "model.pt2"))
    assert_same(torch._inductor.aoti_load_package(path), module, False)


def test_no_recompilation_per_shape() -> None:
    """Forward and backward, fullgraph: after two shapes none of ten others compiles anything."""
    from torch._dynamo.testing import CompileCounterWithBackend

    module = LSTM(4, 5, 2, backend="triton")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for batch, seq_len in ((2, 3), (3, 4)):
        compiled(torch.randn(seq_len, batch, 4))[0].sum().backward()
    frames = counter.frame_count
    for batch, seq_len in ((2, 9), (5, 2), (17, 3), (4, 4)):
        x = torch.randn(seq_len, batch, 4)
        out, _ = compiled(x)
        torch.testing.assert_close(out, module(x)[0])
        out.sum().backward()
    assert counter.frame_count == frames


def test_the_graph_does_not_grow_with_the_sequence() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counts = []
    for seq_len in (2, 40):
        counter = CompileCounterWithBackend("eager")
        torch.compile(LSTM(4, 5, backend="triton"), fullgraph=True, backend=counter)(torch.randn(seq_len, 2, 4))
        counts.append(counter.op_count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("options", [dict(recompute="gates"), dict(recompute="chunk:2"), dict(batch_invariant=True)])
def test_compiled_modes(options: dict) -> None:
    module = LSTM(4, 5, backend="triton", **options)
    x, marks = torch.randn(5, 3, 4), dict(lengths=torch.tensor([5, 2, 0]))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for one in (module, compiled):
        out, _ = one(x, **marks)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_compiled_states() -> None:
    module = LSTM(4, 5, 2, backend="triton")
    x = torch.randn(3, 2, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    want, got = (one(x, return_states=("c", "gates"))[-1] for one in (module, compiled))
    for a, b in zip(tree_leaves(got), tree_leaves(want)):
        torch.testing.assert_close(a, b)
