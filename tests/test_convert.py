"""Weights of other libraries: their formulas, written out from their own sources, give nn.LSTM's outputs; and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from lstm_triton import LSTM, convert

I, H, T, B = 5, 6, 7, 3  # noqa: E741
SIZES = [dict(), dict(bidirectional=True), dict(num_layers=2), dict(num_layers=3, bidirectional=True)]
LIBRARIES = ["haste", "flashrnn", "keras", "onnx"]


def lstm_of(**options: Any) -> nn.LSTM:
    torch.manual_seed(0)
    return nn.LSTM(I, H, **options).double()


def imported(state: dict[str, Tensor], **options: Any) -> nn.LSTM:
    """An LSTM that was built without the foreign weights, with exactly these."""
    lstm = LSTM(I, H, dtype=torch.float64, **options)
    lstm.load_state_dict(state, strict=True)
    return lstm


def random_state(shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape) * 0.4 for shape in shapes]


# What the libraries compute with weights of their own layout: one direction of one layer, x [T, B, I] -> [T, B, H].
def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def haste_direction(x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """v = x W + h R + b in four parts i, g, f, o."""
    h = c = np.zeros((x.shape[1], weights["recurrent_kernel"].shape[0]))
    out = []
    for x_t in x:
        v = x_t @ weights["kernel"] + h @ weights["recurrent_kernel"] + weights["bias"]
        i, g, f, o = np.split(v, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.stack(out)


def keras_direction(x: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    """z = x kernel + h recurrent_kernel + bias in four parts i, f, c, o."""
    h = c = np.zeros((x.shape[1], weights[1].shape[0]))
    out = []
    for x_t in x:
        z = x_t @ weights[0] + h @ weights[1] + (weights[2] if len(weights) == 3 else 0)
        units = weights[1].shape[0]
        i, f, candidate, o = (z[:, gate * units : (gate + 1) * units] for gate in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(candidate)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.stack(out)


def flashrnn_layer(x: np.ndarray, weights: tuple[np.ndarray, ...]) -> np.ndarray:
    """Every head on its own: gate n is Wx[n] + R[n] h + b[n], in the order i, f, z, o."""
    W, R, b = weights
    _, heads, head_dim, _ = R.shape
    Wx = (x @ W.T).reshape(*x.shape[:2], 4, heads, head_dim)
    out = np.empty((*x.shape[:2], heads, head_dim))
    for head in range(heads):
        for row in range(x.shape[1]):
            h = c = np.zeros(head_dim)
            for t in range(x.shape[0]):
                i, f, z, o = (Wx[t, row, n, head] + R[n, head] @ h + b[n, head] for n in range(4))
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(z)
                h = sigmoid(o) * np.tanh(c)
                out[t, row, head] = h
    return out.reshape(*x.shape[:2], heads * head_dim)


def both_ways(run: Callable, x: np.ndarray, directions: list) -> np.ndarray:
    """The second direction reads the sequence from its end."""
    parts = [run(x, directions[0]), *(run(x[::-1], weights)[::-1] for weights in directions[1:])]
    return np.concatenate(parts, -1)


def run_haste(x: np.ndarray, layers: list) -> np.ndarray:
    for layer in layers:
        x = both_ways(haste_direction, x, [layer] if isinstance(layer, dict) else list(layer))
    return x


def run_keras(x: np.ndarray, layers: list, bidirectional: bool) -> np.ndarray:
    for layer in layers:
        middle = len(layer) // 2
        x = both_ways(keras_direction, x, [layer[:middle], layer[middle:]] if bidirectional else [layer])
    return x


def run_flashrnn(x: np.ndarray, layers: list) -> np.ndarray:
    for layer in layers:
        x = flashrnn_layer(x, layer)
    return x


def run_onnx(x: np.ndarray, layers: list) -> np.ndarray:
    """ONNX's own reference of the operator, one node a layer."""
    for W, R, bias in layers:
        inputs = dict(X=x, W=W, R=R) | ({} if bias is None else dict(B=bias))
        direction = "bidirectional" if W.shape[0] == 2 else "forward"
        node = onnx.helper.make_node("LSTM", list(inputs), ["Y"], hidden_size=R.shape[2], direction=direction)
        ranks = {name: array.ndim for name, array in inputs.items()} | dict(Y=4)
        infos = [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, [None] * n) for name, n in ranks.items()
        ]
        graph = onnx.helper.make_graph([node], "lstm", infos[:-1], infos[-1:])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)])
        onnx.checker.check_model(model)
        (y,) = ReferenceEvaluator(model).run(None, inputs)  # [T, D, B, H]
        x = y.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
    return x


def as_numpy(value: Any) -> Any:
    """The same with arrays, read-only as onnx hands them out, for tensors."""
    if isinstance(value, Tensor):
        array = value.numpy().copy()
        array.flags.writeable = False
        return array
    if isinstance(value, dict):
        return {name: as_numpy(item) for name, item in value.items()}
    return type(value)(as_numpy(item) for item in value) if isinstance(value, (list, tuple)) else value


def export(library: str, lstm: nn.RNNBase) -> list:
    return getattr(convert, f"to_{library}")(lstm)


def import_(library: str, layers: list) -> dict[str, Tensor]:
    return convert.from_onnx(*map(list, zip(*layers))) if library == "onnx" else getattr(convert, f"from_{library}")(layers)  # fmt: skip


def run(library: str, x: np.ndarray, layers: list, bidirectional: bool = False) -> np.ndarray:
    if library == "keras":
        return run_keras(x, layers, bidirectional)
    return dict(haste=run_haste, flashrnn=run_flashrnn, onnx=run_onnx)[library](x, layers)


def check_outputs(lstm: nn.RNNBase, want: np.ndarray, x: np.ndarray) -> None:
    with torch.no_grad():
        torch.testing.assert_close(lstm(torch.from_numpy(x))[0], torch.from_numpy(want.copy()), rtol=1e-12, atol=1e-12)


X = np.random.default_rng(1).normal(size=(T, B, I))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_exported_weights_give_the_same_outputs(library: str, sizes: dict, bias: bool) -> None:
    lstm = lstm_of(bias=bias, **sizes)
    bidirectional = sizes.get("bidirectional", False)
    if library == "flashrnn" and bidirectional:
        with pytest.raises(ValueError, match="FlashRNN has no backward direction; the module has bidirectional=True"):
            export(library, lstm)
        return
    layers = as_numpy(export(library, lstm))
    assert len(layers) == lstm.num_layers
    check_outputs(lstm, run(library, X, layers, bidirectional), X)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_foreign_weights_give_the_same_outputs(sizes: dict) -> None:
    directions = 2 if sizes.get("bidirectional") else 1
    keras, haste, onnx_nodes = [], [], []
    for width in [I, *[H * directions] * (sizes.get("num_layers", 1) - 1)]:
        kernels = random_state([(width, 4 * H), (H, 4 * H), (4 * H,)] * directions)
        keras.append(kernels)
        mappings = [dict(zip(("kernel", "recurrent_kernel", "bias"), kernels[d * 3 : d * 3 + 3])) for d in range(directions)]  # fmt: skip
        haste.append(mappings[0] if directions == 1 else tuple(mappings))
        onnx_nodes.append(random_state([(directions, 4 * H, width), (directions, 4 * H, H), (directions, 8 * H)]))
    for library, layers in (("keras", keras), ("haste", haste), ("onnx", onnx_nodes)):
        lstm = imported(import_(library, layers), **sizes)
        check_outputs(lstm, run(library, X, layers, directions == 2), X)


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_heads_of_flashrnn_are_a_block_diagonal_recurrence(heads: int) -> None:
    size = H // heads
    layers = [random_state([(4 * H, width), (4, heads, size, size), (4, heads, size)]) for width in (I, H)]
    lstm = imported(convert.from_flashrnn(layers), num_layers=2)
    check_outputs(lstm, run_flashrnn(X, layers), X)
    again = convert.to_flashrnn(lstm, num_heads=heads)
    assert all(np.array_equal(a, b) for one, other in zip(again, layers) for a, b in zip(one, other))
    if heads > 1:
        assert int((lstm.weight_hh_l0 == 0).sum()) == 4 * H * (H - size)


@pytest.mark.parametrize("as_arrays", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_there_and_back_gives_the_same_bits(library: str, sizes: dict, bias: bool, as_arrays: bool) -> None:
    if library == "flashrnn" and sizes.get("bidirectional"):
        pytest.skip("FlashRNN has no backward direction")
    lstm = lstm_of(bias=bias, **sizes)
    with torch.no_grad():
        for name, parameter in lstm.named_parameters():
            if name.startswith("bias_hh") and library != "onnx":  # the others have one bias
                parameter.zero_()
    layers = export(library, lstm)
    state = import_(library, as_numpy(layers) if as_arrays else layers)
    no_bias = not bias and library in ("keras", "onnx")
    again = imported(state, bias=not no_bias, **sizes)
    for name, parameter in again.named_parameters():
        want = getattr(lstm, name, None)
        assert torch.equal(parameter, torch.zeros_like(parameter) if want is None else want), name


@pytest.mark.parametrize("library", LIBRARIES)
def test_two_biases_become_one_where_there_is_but_one(library: str) -> None:
    lstm = lstm_of()
    state = import_(library, export(library, lstm))
    if library == "onnx":
        assert torch.equal(state["bias_hh_l0"], lstm.bias_hh_l0)
    else:
        assert torch.equal(state["bias_ih_l0"], lstm.bias_ih_l0 + lstm.bias_hh_l0)
        assert not state["bias_hh_l0"].any()


def test_a_forget_bias_is_in_the_bias_already() -> None:
    """Keras' unit_forget_bias and haste's forget_bias set the initial bias, each at its own place."""
    haste_bias, keras_bias = np.zeros(4 * H), np.zeros(4 * H)
    haste_bias[2 * H : 3 * H] = 1
    keras_bias[H : 2 * H] = 1
    kernels = random_state([(I, 4 * H), (H, 4 * H)])
    haste = convert.from_haste([dict(kernel=kernels[0], recurrent_kernel=kernels[1], bias=haste_bias)])
    keras = convert.from_keras([[*kernels, keras_bias]])
    want = torch.tensor([0.0, 1, 0, 0], dtype=torch.float64).repeat_interleave(H)  # i, f, g, o
    assert torch.equal(haste["bias_ih_l0"], want)
    assert torch.equal(keras["bias_ih_l0"], want)


def test_a_layer_without_bias_beside_one_that_has_one() -> None:
    layers = [random_state([(I, 4 * H), (H, 4 * H)]), random_state([(H, 4 * H), (H, 4 * H), (4 * H,)])]
    lstm = imported(convert.from_keras(layers), num_layers=2)
    assert not lstm.bias_ih_l0.any()
    check_outputs(lstm, run_keras(X, layers, False), X)
    W, R, bias = map(list, zip(*convert.to_onnx(lstm)))
    assert not convert.from_onnx(W, R, [None, bias[1]])["bias_ih_l0"].any()


def test_one_onnx_node_as_it_is() -> None:
    lstm = lstm_of(bidirectional=True)
    W, R, bias = convert.to_onnx(lstm)[0]
    state = convert.from_onnx(W, R, bias)
    assert all(torch.equal(tensor, getattr(lstm, name)) for name, tensor in state.items())
    assert list(convert.from_onnx(W, R)) == ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"]  # fmt: skip


@pytest.mark.parametrize("library", LIBRARIES)
def test_memory_is_not_shared_and_types_stay(library: str) -> None:
    lstm = LSTM(I, H, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in lstm.state_dict().items()}
    layers = export(library, lstm)
    state = import_(library, layers)
    for layer in layers:
        for tensor in layer.values() if isinstance(layer, dict) else layer:
            assert tensor.dtype == torch.bfloat16
            assert tensor.is_contiguous()
            assert not tensor.requires_grad
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in lstm.state_dict().items())
    assert all(tensor.any() and tensor.is_contiguous() for name, tensor in state.items() if name.startswith("weight"))


def test_a_parametrized_module_gives_the_weights_it_computes_with() -> None:
    lstm = nn.utils.parametrizations.weight_norm(lstm_of(), "weight_hh_l0")
    with torch.no_grad():
        lstm.parametrizations.weight_hh_l0.original0.mul_(2)
    check_outputs(lstm, run_haste(X, as_numpy(convert.to_haste(lstm))), X)


@pytest.mark.parametrize("library", LIBRARIES)
def test_modules_that_have_no_such_layout(library: str) -> None:
    names = dict(haste="haste", flashrnn="FlashRNN", keras="Keras", onnx="ONNX")
    with pytest.raises(ValueError, match=f"{names[library]} has no projections; the module has proj_size=2"):
        export(library, LSTM(I, H, proj_size=2))
    with pytest.raises(ValueError, match=r"only weights of the plain cell .*; the module has zoneout=\(0.1, 0.0\)"):
        export(library, LSTM(I, H, zoneout=(0.1, 0.0)))
    export(library, LSTM(I, H, recurrent_dropout=0.1))  # which is the plain cell in evaluation
    for module in (nn.GRU(I, H), nn.Linear(I, H)):
        with pytest.raises(TypeError, match=f"module should be an LSTM, got {type(module).__name__}"):
            export(library, module)


def test_dense_weights_have_no_heads() -> None:
    with pytest.raises(ValueError, match="2 heads should have no weights between them: weight_hh_l0 should be zero"):
        convert.to_flashrnn(LSTM(I, H), num_heads=2)
    for num_heads in (4, 0):
        with pytest.raises(ValueError, match=f"num_heads should divide hidden_size=6, got {num_heads}"):
            convert.to_flashrnn(LSTM(I, H), num_heads=num_heads)


def kernels(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.zeros(shape) for shape in shapes]


def haste(*shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return dict(zip(("kernel", "recurrent_kernel", "bias"), kernels(*shapes)))


FIRST = ((5, 24), (6, 24), (24,))
WRONG: list[tuple[Callable, list, str]] = [
    (convert.from_keras, [], "Keras: layers should be a sequence with one entry a layer, got none"),
    (convert.from_keras, [kernels((5, 24))], "Keras layer 0 should be what get_weights() returns: 2 or 3 arrays, of a Bidirectional 4 or 6; got 1"),
    (convert.from_keras, [kernels((5, 24), (6, 20))], "Keras layer 0: recurrent_kernel should be [H, 4H] with H=6, got [6, 20]"),
    (convert.from_keras, [kernels((5, 20), (6, 24))], "Keras layer 0: kernel should be [I, 4H] with H=6, I=5, got [5, 20]"),
    (convert.from_keras, [kernels((24, 5), (24, 6))], "Keras layer 0: recurrent_kernel should be [H, 4H] with H=24, got [24, 6]"),
    (convert.from_keras, [kernels((5, 24), (6, 24), (2, 24))], "Keras layer 0: bias should be [4H] with H=6, got [2, 24]"),
    (convert.from_keras, [kernels(*FIRST), kernels(*FIRST)], "Keras layer 1: kernel should be [I, 4H] with H=6, I=6, got [5, 24]"),
    (convert.from_keras, [kernels(*FIRST, (4, 24), (6, 24), (24,))], "Keras layer 0: kernel should be [I, 4H] with H=6, I=5, got [4, 24]"),
    (convert.from_keras, [kernels(*FIRST), kernels((6, 12), (3, 12))], "Keras layer 1: recurrent_kernel should be [H, 4H] with H=6, got [3, 12]"),
    (convert.from_keras, [kernels(*FIRST * 2), kernels((12, 24), (6, 24))], "Keras layer 1: directions should be 2, got 1"),
    (convert.from_keras, kernels(*FIRST), "Keras layer 0 should be what get_weights() returns"),
    (convert.from_haste, haste(*FIRST), "haste: layers should be a sequence with one entry a layer, got a mapping"),
    (convert.from_haste, [haste((5, 24), (6, 24))], "haste layer 0 should be a mapping with ['bias', 'kernel', 'recurrent_kernel'], or a pair of them, got ['kernel', 'recurrent_kernel']"),
    (convert.from_haste, [kernels(*FIRST)], "haste layer 0 should be a mapping with ['bias', 'kernel', 'recurrent_kernel'], or a pair of them, got Tensor"),
    (convert.from_haste, [haste((5, 24), (6, 24), (6,))], "haste layer 0: bias should be [4H] with H=6, got [6]"),
    (convert.from_haste, [[haste(*FIRST)] * 3], "haste layer 0: directions should be 1 or 2, got 3"),
    (convert.from_flashrnn, [kernels((24, 5), (4, 2, 3, 3))], "FlashRNN layer 0 should be three arrays (W, R, b), got 2"),
    (convert.from_flashrnn, [kernels((24, 5), (2, 4, 3, 3), (4, 2, 3))], "FlashRNN layer 0: R should be [G, N, D, D] with G=4, N=4, D=3, got [2, 4, 3, 3]"),
    (convert.from_flashrnn, [kernels((24, 5), (4, 2, 3, 3), (2, 4, 3))], "FlashRNN layer 0: b should be [G, N, D] with G=4, N=2, D=3, got [2, 4, 3]"),
    (convert.from_flashrnn, [kernels((5, 24), (4, 2, 3, 3), (4, 2, 3))], "FlashRNN layer 0: W should be [4H, I] with H=6, I=24, got [5, 24]"),
    (convert.from_flashrnn, [kernels((24, 5), (4, 2, 3, 3), (4, 2, 3)), kernels((24, 6), (4, 2, 2, 2), (4, 2, 2))], "FlashRNN layer 1: R as a dense matrix should be [4H, H] with H=6, got [16, 4]"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "layers", "complaint"), WRONG)
def test_wrong_shapes_are_named(function: Callable, layers: list, complaint: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        function(layers)
    assert str(error.value).startswith(complaint)


def test_wrong_onnx_inputs_are_named() -> None:
    W, R, bias, P = kernels((2, 24, 5), (2, 24, 6), (2, 48), (2, 18))
    for inputs, complaint in [
        ((W, R, bias, P), "ONNX: peepholes are not supported, P should be None"),
        ((W, R[:1], bias), "ONNX layer 0: W should be [D, 4H, I] with D=1, H=6, I=5, got [2, 24, 5]"),
        ((W[0], R[0]), "ONNX layer 0: R should be [D, 4H, H] with D=24, H=1, got [24, 6]"),
        ((W, R, bias[:, :24]), "ONNX layer 0: B should be [D, 8H] with D=2, H=6, got [2, 24]"),
        ((torch.cat([W, W]), torch.cat([R, R])), "ONNX layer 0: directions should be 1 or 2, got 4"),
        (([W, W], [R, R]), "ONNX layer 1: W should be [D, 4H, I] with D=2, H=6, I=12, got [2, 24, 5]"),
        (([W, W], [R]), "ONNX: W, R, B should be of as many layers, got 2, 1, 2"),
        (([], []), "ONNX: layers should be a sequence with one entry a layer, got none"),
    ]:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            convert.from_onnx(*inputs)
        assert str(error.value) == complaint
