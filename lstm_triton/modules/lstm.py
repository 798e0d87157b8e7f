"""`LSTM`, a drop-in replacement of `torch.nn.LSTM`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from ..functional import States
from ..functional.checks import State, check_options, check_pair, of_type
from ..functional.decision import Marks
from ..functional.stack import run_decided, run_stack
from ..planning.device import on_gpu
from ..planning.route import Request, by_torch_alone, compute_dtype, kernel_refusal, refused, slower_reason
from ..planning.transforms import aten_can, exporting, rnns_are_traced, traced_by_fx, untraced
from ..variant import PLAIN, Variant
from .nested import nested_like, padded_of
from .path import EXPANDED, Call, rival, stack_of, weights_are_expanded
from .weights import add_weights, check_start, fill_own


class LSTM(nn.RNNBase):
    """A multi-layer LSTM with the constructor, parameters and results of `torch.nn.LSTM`.

    On a CUDA device the recurrence runs in one persistent Triton kernel per layer and pass; where
    the kernels do not apply, or nn.LSTM is faster as measured or predicted, the call takes PyTorch's
    own LSTM, for a reason that `lstm_triton.explain(module, input)` prints. State dicts go both
    ways, and the same seed gives the same initial weights.

    Args: those of `torch.nn.LSTM`, and keyword-only
        backend: "auto" uses the kernels where they run and PyTorch elsewhere; "triton" raises
            RuntimeError with the reason where they do not; "torch" never uses them.
        precision: of float32 products on a GPU, "ieee", "tf32" or "tf32x3"; None follows
            `torch.backends.cudnn`, as nn.LSTM does.
        recompute: "none", "gates" or "chunk:K": what training keeps in memory; see `functional.lstm`.
        batch_invariant: a row's results do not depend on its company, at a price; see `functional.lstm`.
        peephole, layer_norm, zoneout, recurrent_dropout, variational_dropout, weight_dropout, coupled_gates,
            cell_clip, recurrent_grad_clip: variants of the cell; see `Variant`. Their weights are parameters of that
            class's names with the suffix of the others, such as weight_ch_l0.
        forget_bias: what the two biases of the forget gate sum up to at first; None for PyTorch's random ones.
        learn_initial_state: the state without hx, and that of rows that are reset without reset_state, are the
            parameters initial_h [L * D, H or P] and initial_c [L * D, H], at first 0.

    It is no subclass of nn.LSTM: TorchDynamo refuses to trace those.
    """

    # nn.LSTM's own checks, as they are: they only use what RNNBase has.
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden
    _forward_by_torch: Any = nn.LSTM.forward

    # What a state that was pickled without them, or by nn.LSTM, has.
    backend: str = "auto"
    precision: str | None = None
    recompute: str = "none"
    batch_invariant: bool = False
    variant: Variant = PLAIN
    forget_bias: float | None = None
    learn_initial_state: bool = False

    def __init__(
        self,
        *args: Any,
        backend: str = "auto",
        precision: str | None = None,
        recompute: str = "none",
        batch_invariant: bool = False,
        peephole: bool | str = False,
        layer_norm: bool = False,
        zoneout: tuple[float, float] = (0.0, 0.0),
        recurrent_dropout: float = 0.0,
        variational_dropout: float | tuple[float, float] = 0.0,
        weight_dropout: float = 0.0,
        coupled_gates: bool = False,
        cell_clip: float | None = None,
        recurrent_grad_clip: float | None = None,
        forget_bias: float | None = None,
        learn_initial_state: bool = False,
        **kwargs: Any,
    ) -> None:
        check_options(backend, precision, recompute)
        variant = Variant(
            peephole=peephole,
            layer_norm=layer_norm,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            variational_dropout=variational_dropout,
            weight_dropout=weight_dropout,
            coupled_gates=coupled_gates,
            cell_clip=cell_clip,
            recurrent_grad_clip=recurrent_grad_clip,
        )
        self.variant = PLAIN if variant == PLAIN else variant
        self.backend = backend
        self.precision = precision
        self.recompute = recompute
        self.batch_invariant = batch_invariant
        self.learn_initial_state = learn_initial_state
        self.forget_bias = None  # until it has been checked
        super().__init__("LSTM", *args, **kwargs)
        self.variant.check(self.proj_size)
        check_start(forget_bias, learn_initial_state, coupled_gates, self.bias)
        self.forget_bias = forget_bias
        if add_weights(self, self.variant, learn_initial_state):
            self._init_flat_weights()
        fill_own(self, forget_bias)

    def reset_parameters(self) -> None:
        """Initial values: PyTorch's; gains 1, bias_c and the initial state 0; the forget bias, where it is given."""
        super().reset_parameters()
        fill_own(self, self.forget_bias)

    def flatten_parameters(self) -> None:
        """As nn.LSTM does, when the module is made or moved, never within a call; nothing where cuDNN cannot run it."""
        if self.backend != "triton" and self.variant == PLAIN:
            super().flatten_parameters()

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.backend != "auto":
            text += f", backend={self.backend}"
        if self.precision is not None:
            text += f", precision={self.precision}"
        if self.recompute != "none":
            text += f", recompute={self.recompute}"
        if self.batch_invariant:
            text += ", batch_invariant=True"
        further: dict[str, Any] = self.variant.asked()
        if self.forget_bias is not None:
            further["forget_bias"] = self.forget_bias
        if self.learn_initial_state:
            further["learn_initial_state"] = True
        return text + "".join(f", {name}={value}" for name, value in further.items())

    def refusal(self, input: Tensor) -> str:
        """Why a call on a tensor like `input` takes PyTorch's path; "" if it takes the kernels."""
        expanded = not torch.compiler.is_compiling() and weights_are_expanded(self)
        return kernel_refusal(*self._request(input)) if not expanded else refused(self.backend, EXPANDED)

    def _request(self, input: Tensor) -> Request:
        # Not self.weight_ih_l0: to read a parametrized weight is to compute it, drawing its random numbers once more.
        return Request(
            self.backend,
            input.device.type,
            input.device.index,
            compute_dtype(input.device.type, self._flat_weights[0].dtype),  # type: ignore[union-attr]
            self.precision or "",
            self.hidden_size,
            2 if self.bidirectional else 1,
            self.variant.kind(self.training),
        )

    def slower(self, input: Tensor, hx: State | None = None) -> str:
        """Why nn.LSTM is the faster path for a batch that the kernels could run; "" if it is not known to be.

        By the tuned table of the GPU, else by a prediction (`planning/prediction.py`), so it depends on the shape of
        the input, [T, B, I] or [B, T, I].
        """
        asked = rival(self, input, hx)
        return "" if asked is None else slower_reason(input.device, *asked)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_state: State | None = None,
        return_states: Sequence[str] = (),
    ) -> tuple[Tensor | PackedSequence, State] | tuple[Tensor | PackedSequence, State, States]:
        """Run the LSTM.

        Args:
            input: [T, B, input_size], [B, T, input_size] with batch_first, [T, input_size]
                unbatched, a PackedSequence, or with batch_first a nested tensor of jagged layout,
                [B, any length, input_size].
            hx: (h_0 [L * D, B, H or P], c_0 [L * D, B, H]), of any floating types; without the batch dimension
                for unbatched input. If None zeros, or the learned initial state.
            lengths, reset, reset_state: see `functional.lstm`; for batched tensors only.
            return_states: any of "c", "layers", "gates": see `functional.States`.

        Returns:
            output and (h_n, c_n), shaped as nn.LSTM shapes them, and with return_states the states
            of every step, in the form of the input: padded, packed or nested.
        """
        if type(input) is fx.Proxy:
            return traced_by_fx(
                self, input, hx, lengths=lengths, reset=reset, reset_state=reset_state, return_states=return_states
            )
        packed = isinstance(input, PackedSequence)
        data: Tensor = input.data if packed else input  # type: ignore[assignment]
        nested = not packed and data.is_nested
        unmarked = lengths is None and reset is None and reset_state is None
        if not isinstance(return_states, str):  # which is an error that others raise
            return_states = tuple(return_states)
        if not unmarked and (packed or nested):
            kind = "nested tensor" if nested else "PackedSequence"
            raise ValueError(f"a {kind} has its own lengths: lengths= and reset= go with a padded tensor")
        if self.learn_initial_state:
            hx = self._learned(input, hx)
            if reset is not None and reset_state is None:
                reset_state = self._initial()
        plain = unmarked and not return_states and not nested and self._is_plain()
        alone = plain and by_torch_alone(self.backend, data.device)
        compiling = torch.compiler.is_compiling()
        marks = Marks(lengths, reset, reset_state)
        call = None
        if not (alone or compiling or packed or nested or self.learn_initial_state):
            call = Call.of(self, data, hx, marks, return_states)
        if call is not None:
            path = call.memory.get(call.key)
            if path == "torch":
                return self._forward_by_torch(data, of_type(hx, data.dtype))
            if path == "kernels" and (decided := call.memory.get(call.signature)) is not None:
                output, h_n, c_n, *states = run_decided(decided, data, hx, call.weights, call.stack, marks, known=True)
                return output, (h_n, c_n), *states
        refusal = "" if alone else self.refusal(data)
        traced = compiling and not exporting()
        if plain and (alone or refusal) and aten_can():
            if hx is not None:
                hx = of_type(hx, data.dtype)
            if traced and (torch.is_grad_enabled() or on_gpu(data.device)) and not rnns_are_traced():
                return untraced(nn.LSTM.forward, self, input, hx)
            if call is not None:
                call.memory[call.key] = "torch"
            return self._forward_by_torch(input, hx)
        if alone:  # a transform that aten lacks
            refusal = self.refusal(data)
        if nested:
            return self._forward_nested(data, hx, return_states, refusal)
        if packed:
            if traced:
                return untraced(LSTM._forward_packed, self, input, hx, return_states, refusal)
            return self._forward_packed(input, hx, return_states, refusal)  # type: ignore[arg-type]
        if plain and not compiling and self.slower(data, hx):
            if call is not None:
                call.memory[call.key] = "torch"
            return self._forward_by_torch(data, of_type(hx, data.dtype))
        results = self._forward_padded(data, hx, marks, return_states, refusal)
        if call is not None:
            call.memory[call.key] = "kernels"
        return results

    def _is_plain(self) -> bool:
        """Whether nn.LSTM computes the same."""
        if self.batch_invariant or (self.recompute != "none" and torch.is_grad_enabled()):
            return False
        dropped = self.training and self.variant.weight_dropout
        return self.variant is PLAIN or (self.variant.kind(self.training) == "plain" and not dropped)

    def _initial(self) -> State:
        return self.initial_h, self.initial_c  # type: ignore[return-value]

    def _learned(self, input: Tensor | PackedSequence, hx: State | None) -> State | None:
        """hx, in place of None the learned initial state for every row."""
        if hx is not None:
            return hx
        if isinstance(input, PackedSequence):
            batch = int(input.batch_sizes[0])
        elif input.dim() != 3 or (input.is_nested and not self.batch_first):
            return self._initial() if input.dim() == 2 else None  # the rest is an error, which others raise
        else:
            batch = input.shape[0 if self.batch_first else 1]
        h, c = (tensor.unsqueeze(1).expand(-1, batch, -1) for tensor in self._initial())
        return h.contiguous(), c.contiguous()  # cuDNN takes no other

    def _forward_padded(
        self, input: Tensor, hx: State | None, marks: Marks, return_states: Sequence[str], refusal: str
    ) -> Any:
        self._update_flat_weights()
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched, batch_dim = input.dim() == 3, 0 if self.batch_first else 1
        if not batched:
            if any(mark is not None for mark in marks):
                raise ValueError("lengths= and reset= go with batched 3-D input, got 2-D input")
            input = input.unsqueeze(batch_dim)
        if hx is None:
            self.check_input(input, None)
        else:
            check_pair(hx)
            dims = 3 if batched else 2
            if hx[0].dim() != dims or hx[1].dim() != dims:
                raise RuntimeError(
                    f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx and cx should "
                    f"also be {dims}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
            hx = hx if batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
            self.check_forward_args(input, hx, None)
        output, h_n, c_n, *states = self._run(input, hx, self.batch_first, marks, return_states, refusal)
        if not batched:
            output, h_n, c_n = output.squeeze(batch_dim), h_n.squeeze(1), c_n.squeeze(1)
            states = [of_all.map(lambda tensor: tensor.squeeze(batch_dim)) for of_all in states]
        return output, (h_n, c_n), *states

    def _forward_nested(self, input: Tensor, hx: State | None, return_states: Sequence[str], refusal: str) -> Any:
        if not self.batch_first:
            raise ValueError("a nested tensor is [B, length, input_size]: it goes with batch_first=True")
        padded, lengths = padded_of(input)
        output, state, *states = self._forward_padded(padded, hx, Marks(lengths), return_states, refusal)
        states = [of_all.map(lambda tensor: nested_like(tensor, input)) for of_all in states]
        return nested_like(output, input), state, *states

    def _forward_packed(
        self, input: PackedSequence, hx: State | None, return_states: Sequence[str], refusal: str
    ) -> Any:
        self._update_flat_weights()
        data, batch_sizes, sorted_indices, unsorted_indices = input
        self.check_input(data, batch_sizes)
        if hx is not None:
            check_pair(hx)
            hx = self.permute_hidden(hx, sorted_indices)
            self.check_forward_args(data, hx, batch_sizes)
        padded, lengths = torch._VF._pad_packed_sequence(data, batch_sizes, False, 0.0, len(batch_sizes))
        output, h_n, c_n, *states = self._run(padded, hx, False, Marks(lengths), return_states, refusal)

        def pack(tensor: Tensor) -> PackedSequence:
            data, _ = torch._VF._pack_padded_sequence(tensor, lengths, False)
            return PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices)

        states = [of_all.map(pack) for of_all in states]
        return pack(output), self.permute_hidden((h_n, c_n), unsorted_indices), *states

    def _run(
        self,
        input: Tensor,
        hx: State | None,
        batch_first: bool,
        marks: Marks,
        return_states: Sequence[str],
        refusal: str,
    ) -> Any:
        weights: Any = self._flat_weights
        return run_stack(input, hx, weights, stack_of(self, batch_first, return_states), marks, refusal)
