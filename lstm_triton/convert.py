"""Trained weights to and from other libraries: haste, FlashRNN, Keras 3 and the ONNX operator LSTM.

`from_*` takes what a library keeps for every layer, tensors or numpy arrays, and returns a state dict of new tensors
for `load_state_dict` of an LSTM of the same sizes. `to_*` takes an nn.LSTM or one of ours and returns, layer by layer,
new tensors on the module's device in the library's layout; `.numpy()` where it wants numpy.

    lstm.load_state_dict(convert.from_keras([layer.get_weights() for layer in keras_layers]))
    haste_layer.load_state_dict(convert.to_haste(lstm)[0])

A library's only bias becomes bias_ih, with a bias_hh of zeros; on the way out the two are summed. Where no layer has a
bias, the state dict is one of an LSTM with bias=False. None of the four adds a forget bias at run time: the options of
haste (forget_bias) and Keras (unit_forget_bias) are initial values of the bias, so nothing is added here.

I input size of a layer, H hidden size, D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .variant import PLAIN

Array = Any  # a tensor, a numpy array, or what else torch.tensor takes
StateDict = dict[str, Tensor]

# How a library orders the four gates, in our letters: g, the candidate, is c in Keras and ONNX and z in FlashRNN.
GATES = {"PyTorch": "ifgo", "haste": "igfo", "FlashRNN": "ifgo", "Keras": "ifgo", "ONNX": "iofg"}


class Direction(NamedTuple):
    """The weights of one direction of one layer, PyTorch's way but for the order of the gates."""

    weight_ih: Tensor  # [4H, I]
    weight_hh: Tensor  # [4H, H]
    bias_ih: Tensor | None  # [4H]
    bias_hh: Tensor | None  # [4H]

    def reordered(self, source: str, target: str) -> Direction:
        """A contiguous copy with the gates of one library in the order of another."""
        order = [GATES[source].index(gate) for gate in GATES[target]]

        def reorder(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (4, tensor.shape[0] // 4))[order].flatten(0, 1).contiguous()

        biases = (None if bias is None else reorder(bias) for bias in (self.bias_ih, self.bias_hh))
        return Direction(reorder(self.weight_ih), reorder(self.weight_hh), *biases)

    def bias(self) -> Tensor:
        """The one bias [4H] of a library that has but one."""
        if self.bias_ih is None or self.bias_hh is None:
            return self.weight_hh.new_zeros(self.weight_hh.shape[0])
        return self.bias_ih + self.bias_hh


def from_haste(layers: Sequence[Any]) -> StateDict:
    """From haste: a mapping with kernel [I, 4H], recurrent_kernel [H, 4H], bias [4H] for every layer.

    That is `state_dict()` in PyTorch and `get_weights()` of a TensorFlow layer; for two directions, which only haste's
    TensorFlow LSTM has, a pair of them (forward, backward) for every layer. Zoneout has no counterpart: haste applies
    it in evaluation as well, so a layer trained with it will not give the same outputs.

    Source: github.com/lmnt-com/haste, frameworks/pytorch/lstm.py, frameworks/tf/lstm.py, lib/lstm_forward_gpu.cu.cc.
    """

    def read(where: str, layer: Any, sizes: dict[str, int]) -> list[Direction]:
        directions = []
        for weights in [layer] if isinstance(layer, Mapping) else layer:
            names = ["bias", "kernel", "recurrent_kernel"]
            if not isinstance(weights, Mapping) or sorted(weights) != names:
                got = sorted(weights) if isinstance(weights, Mapping) else type(weights).__name__
                raise ValueError(f"{where} should be a mapping with {names}, or a pair of them, got {got}")
            arrays = (weights["kernel"], weights["recurrent_kernel"], weights["bias"])
            directions.append(_from_kernels(where, arrays, sizes).reordered("haste", "PyTorch"))
        return directions

    return _state_dict("haste", layers, read)


def to_haste(module: nn.RNNBase) -> list[Any]:
    """For haste: see `from_haste`; zeros for the bias of a module without one."""

    def write(direction: Direction) -> dict[str, Tensor]:
        return dict(zip(("kernel", "recurrent_kernel", "bias"), (*_to_kernels(direction), direction.bias())))

    layers = [[write(direction) for direction in directions] for directions in _layers("haste", module)]
    return [directions[0] if len(directions) == 1 else tuple(directions) for directions in layers]


def from_flashrnn(layers: Sequence[Sequence[Array]]) -> StateDict:
    """From FlashRNN with function="lstm": (W [4H, I], R [4, N, H / N, H / N], b [4, N, H / N]) for every layer.

    R and b are what `flashrnn(Wx, R, b)` takes, R as [gate, head, out, in]; W is the weight of the linear layer whose
    output, viewed as [B, T, 4, N, H / N], was Wx (a bias of that layer belongs into b). N heads are a block diagonal
    recurrence, imported into a weight_hh that is zero elsewhere; training on may fill it.

    Source: github.com/NX-AI/flashrnn, README.md, flashrnn/flashrnn/flashrnn.py (FlashRNNConfig, flashrnn),
    flashrnn/flashrnn/vanilla_fwbw/fw.py, flashrnn/tests/test_lstm.py (test_torch_lstm).
    """

    def read(where: str, layer: Sequence[Array], sizes: dict[str, int]) -> list[Direction]:
        if len(layer) != 3:
            raise ValueError(f"{where} should be three arrays (W, R, b), got {len(layer)}")
        heads = {"G": 4}  # N and D, heads and their size, may differ from layer to layer
        recurrent = _copy(where, "R", layer[1], "G N D D", heads)
        weight_hh = _copy(where, "R as a dense matrix", _block_diagonal(recurrent), "4H H", sizes)
        weight_ih = _copy(where, "W", layer[0], "4H I", sizes)
        bias = _copy(where, "b", layer[2], "G N D", heads).flatten()
        return [Direction(weight_ih, weight_hh, bias, None).reordered("FlashRNN", "PyTorch")]

    return _state_dict("FlashRNN", layers, read)


def to_flashrnn(module: nn.RNNBase, num_heads: int = 1) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For FlashRNN: see `from_flashrnn`; more than one head only of a weight_hh that is block diagonal."""
    result = []
    for index, directions in enumerate(_layers("FlashRNN", module)):
        if len(directions) == 2:
            raise ValueError("FlashRNN has no backward direction; the module has bidirectional=True")
        direction = directions[0]
        hidden_size = direction.weight_hh.shape[1]
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"num_heads should divide hidden_size={hidden_size}, got {num_heads}")
        shape = (4, num_heads, hidden_size // num_heads)
        recurrent = direction.weight_hh.view(*shape, *shape[1:]).diagonal(dim1=1, dim2=3).movedim(-1, 1).contiguous()
        if num_heads > 1 and not torch.equal(_block_diagonal(recurrent), direction.weight_hh):
            raise ValueError(
                f"{num_heads} heads should have no weights between them: weight_hh_l{index} should be zero outside "
                f"{num_heads} diagonal blocks a gate, and is not; a dense LSTM has num_heads=1"
            )
        result.append((direction.weight_ih, recurrent, direction.bias().view(shape)))
    return result


def from_keras(layers: Sequence[Sequence[Array]]) -> StateDict:
    """From Keras 3: `get_weights()` of every layer, LSTM or Bidirectional(LSTM).

    An LSTM has kernel [I, 4H], recurrent_kernel [H, 4H] and, unless use_bias=False, bias [4H]; Bidirectional those of
    the forward LSTM, then those of the backward one. Only the default activations are those of PyTorch, and only
    merge_mode="concat".

    Source: github.com/keras-team/keras, keras/src/layers/rnn/lstm.py, keras/src/layers/rnn/bidirectional.py.
    """

    def read(where: str, layer: Sequence[Array], sizes: dict[str, int]) -> list[Direction]:
        if len(layer) not in (2, 3, 4, 6):
            raise ValueError(
                f"{where} should be what get_weights() returns: 2 or 3 arrays, of a Bidirectional 4 or 6; "
                f"got {len(layer)}"
            )
        each = len(layer) if len(layer) < 4 else len(layer) // 2
        parts = [layer[start : start + each] for start in range(0, len(layer), each)]
        return [_from_kernels(where, part, sizes).reordered("Keras", "PyTorch") for part in parts]

    return _state_dict("Keras", layers, read)


def to_keras(module: nn.RNNBase) -> list[list[Tensor]]:
    """For Keras: what `set_weights()` of every layer takes, see `from_keras`; no bias of a module without one."""

    def write(direction: Direction) -> list[Tensor]:
        return [*_to_kernels(direction), *([] if direction.bias_ih is None else [direction.bias()])]

    return [[array for direction in layer for array in write(direction)] for layer in _layers("Keras", module)]


def from_onnx(W: Any, R: Any, B: Any = None, P: Any = None) -> StateDict:
    """From the inputs of an ONNX LSTM node: W [D, 4H, I], R [D, 4H, H], B [D, 8H] if it has one.

    Of several nodes, a list of each, one entry a layer (None in B for a node without one). direction="reverse", which
    PyTorch has not, looks like "forward" here: its inputs and outputs have to be flipped. PyTorch computes with the
    default `activations`, without `clip` and `input_forget`; `layout` is batch_first. Peepholes P are refused.

    Source: github.com/onnx/onnx, docs/Operators.md, LSTM (versions 7, 14 and 22 have the same inputs).
    """
    if not isinstance(W, (list, tuple)):
        W, R, B, P = [W], [R], [B], [P]
    B, P = ([None] * len(W) if values is None else values for values in (B, P))
    if not len(W) == len(R) == len(B) == len(P):
        raise ValueError(f"ONNX: W, R, B should be of as many layers, got {len(W)}, {len(R)}, {len(B)}")
    if any(peepholes is not None for peepholes in P):
        raise ValueError("ONNX: peepholes are not supported, P should be None")

    def read(where: str, layer: Sequence[Array], sizes: dict[str, int]) -> list[Direction]:
        recurrent = _copy(where, "R", layer[1], "D 4H H", sizes)
        weight = _copy(where, "W", layer[0], "D 4H I", sizes)
        bias = [None] * len(weight) if layer[2] is None else _copy(where, "B", layer[2], "D 8H", sizes)
        directions = []
        for weight_ih, weight_hh, both in zip(weight, recurrent, bias):
            biases = (None, None) if both is None else both.chunk(2)
            directions.append(Direction(weight_ih, weight_hh, *biases).reordered("ONNX", "PyTorch"))
        return directions

    return _state_dict("ONNX", list(zip(W, R, B)), read)


def to_onnx(module: nn.RNNBase) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """For ONNX: (W, R, B) of one node a layer, see `from_onnx`; B is None of a module without bias."""
    result = []
    for directions in _layers("ONNX", module):
        weight_ih, weight_hh, *biases = zip(*directions)
        bias = None if biases[0][0] is None else torch.cat([torch.stack(part) for part in biases], 1)
        result.append((torch.stack(weight_ih), torch.stack(weight_hh), bias))
    return result


def _copy(where: str, name: str, array: Array, layout: str, sizes: dict[str, int]) -> Tensor:
    """A copy of an array of a layout such as "H 4H"; sizes: of the letters known so far, new ones are added."""
    # torch.as_tensor would warn of read-only arrays, which onnx hands out, and share the memory of the others.
    tensor = array.detach().clone() if isinstance(array, Tensor) else torch.tensor(array)
    parts = layout.split()
    fits = tensor.dim() == len(parts)
    for part, size in zip(parts, tensor.shape):
        factor = int(part[:-1] or 1)
        fits &= 0 < size == factor * sizes.setdefault(part[-1], size // factor)
    if not fits:
        used = [letter for letter in sizes if letter in layout]
        known = ", ".join(f"{letter}={sizes[letter]}" for letter in used)
        raise ValueError(f"{where}: {name} should be [{', '.join(parts)}] with {known}, got {list(tensor.shape)}")
    return tensor


def _from_kernels(where: str, arrays: Sequence[Array], sizes: dict[str, int]) -> Direction:
    """From kernel [I, 4H], recurrent_kernel [H, 4H] and, if there is one, bias [4H]."""
    weight_hh = _copy(where, "recurrent_kernel", arrays[1], "H 4H", sizes).t()
    weight_ih = _copy(where, "kernel", arrays[0], "I 4H", sizes).t()
    return Direction(weight_ih, weight_hh, _copy(where, "bias", arrays[2], "4H", sizes) if arrays[2:] else None, None)


def _to_kernels(direction: Direction) -> tuple[Tensor, Tensor]:
    """kernel [I, 4H] and recurrent_kernel [H, 4H]."""
    return direction.weight_ih.t().contiguous(), direction.weight_hh.t().contiguous()


def _block_diagonal(recurrent: Tensor) -> Tensor:
    """R [4, N, H / N, H / N] as a dense matrix [4H, H]."""
    return torch.cat([torch.block_diag(*gate) for gate in recurrent])


def _state_dict(
    library: str, layers: Sequence[Any], read: Callable[[str, Any, dict[str, int]], list[Direction]]
) -> StateDict:
    """The state dict of all layers; read(where, layer, sizes) gives the directions of one, checked against sizes."""
    if isinstance(layers, Mapping) or not len(layers):
        got = "a mapping" if isinstance(layers, Mapping) else "none"
        raise ValueError(f"{library}: layers should be a sequence with one entry a layer, got {got}")
    sizes: dict[str, int] = {}
    imported: list[list[Direction]] = []
    for index, layer in enumerate(layers):
        where = f"{library} layer {index}"
        directions = read(where, layer, sizes)
        counts = (1, 2) if index == 0 else (len(imported[0]),)
        if len(directions) not in counts:
            raise ValueError(f"{where}: directions should be {' or '.join(map(str, counts))}, got {len(directions)}")
        sizes["I"] = len(directions) * sizes["H"]
        imported.append(directions)
    has_bias = any(direction.bias_ih is not None for directions in imported for direction in directions)
    state = {}
    for index, directions in enumerate(imported):
        for suffix, direction in zip(("", "_reverse"), directions):
            for name, tensor in direction._asdict().items():
                if tensor is None and has_bias:
                    tensor = direction.weight_hh.new_zeros(direction.weight_hh.shape[0])
                if tensor is not None:
                    state[f"{name}_l{index}{suffix}"] = tensor
    return state


def _layers(library: str, module: nn.RNNBase) -> list[list[Direction]]:
    """Copies of a module's weights, by layer and direction, in the order of gates of a library."""
    if not isinstance(module, nn.RNNBase) or module.mode != "LSTM":
        raise TypeError(f"module should be an LSTM, got {type(module).__name__}")
    if module.proj_size:
        raise ValueError(f"{library} has no projections; the module has proj_size={module.proj_size}")
    variant, learned = getattr(module, "variant", PLAIN), getattr(module, "learn_initial_state", False)
    if variant.kind(training=False) != "plain" or learned:
        options = variant.asked() | ({"learn_initial_state": True} if learned else {})
        asked = ", ".join(f"{name}={value}" for name, value in options.items())
        raise ValueError(f"only weights of the plain cell are converted to {library}; the module has {asked}")

    def read(suffix: str) -> Direction:
        tensors: list[Any] = [getattr(module, name + suffix, None) for name in Direction._fields]
        return Direction(*tensors).reordered("PyTorch", library)

    suffixes = ("", "_reverse") if module.bidirectional else ("",)
    with torch.no_grad():
        return [[read(f"_l{index}{suffix}") for suffix in suffixes] for index in range(module.num_layers)]
