"""What goes wrong when an LSTM is trained, seen from inside: gradients, gates, units, states, losses.

    with lstm_triton.diagnostics.watch(model) as seen:
        loss_of(model(x)).backward()
    print(seen.report())
    seen.figure().savefig("inside.png")

The thresholds are rules of thumb (a gradient below 1e-6 moves nothing, one above 1e3 breaks most optimisers' steps)
and arguments of `watch`. `of_losses` says what a curve of losses looks like.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .module import LSTM
from .patching import patch, unpatch
from .symptoms import ADVICE, Finding, of_losses

__all__ = ["Finding", "Layer", "Seen", "Thresholds", "kept_bytes", "of_losses", "watch"]

GATES = "ifgo"
CLOSED, OPEN = 0.05, 0.95  # a sigmoid beyond these has less than a fifth of its largest slope


@dataclass(frozen=True)
class Thresholds:
    """vanishing, exploding: of a parameter's gradient norm, and of the gradient at the first step over that at others.

    saturated: share of a gate's values that are beyond CLOSED or OPEN. dead: standard deviation of a unit's h over all
    steps and rows under which it says nothing; share: of such units. large: root mean square of c at the last step.
    """

    vanishing: float = 1e-6
    exploding: float = 1e3
    saturated: float = 0.5
    dead: float = 1e-3
    share: float = 0.1
    large: float = 10.0


@dataclass
class Layer:
    """The last call of one layer, over all valid steps of all rows; D directions, H units.

    h, c: root mean square by step [T, D]. saturation: share of saturated values by gate and unit [D, 4, H].
    spread: standard deviation of each unit's h [D, H].
    """

    h: Tensor
    c: Tensor
    saturation: Tensor
    spread: Tensor


@dataclass
class Seen:
    """What a `watch` has collected. All of it is of the last forward and backward pass.

    parameters: gradient norm by parameter. layers: by name of the module, and "[layer]". input_gradients: norm of the
    loss's gradient for the module's input at every step, [T], by name of the module. loose: modules that were given a
    state whose graph had been through a backward pass. accumulated: how many gradients have arrived in parameters.
    """

    model: nn.Module
    thresholds: Thresholds
    parameters: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    input_gradients: dict[str, Tensor] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)
    accumulated: int = 0

    def findings(self) -> list[Finding]:
        """All symptoms, the worst kinds first."""
        found = [*self._of_parameters(), *self._of_time(), *self._of_layers()]
        found += [Finding("state not detached", name, 1.0) for name in self.loose]
        order = list(ADVICE)
        return sorted(found, key=lambda finding: order.index(finding.kind))

    def _of_parameters(self) -> Iterator[Finding]:
        limits = self.thresholds
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad or not self.accumulated:
                continue
            norm = float(self.parameters[name]) if name in self.parameters else None
            if norm is None:
                yield Finding("no gradient", name, 0.0)
            elif not math.isfinite(norm):
                yield Finding("not finite", f"gradient of {name}", norm)
            elif norm < limits.vanishing:
                yield Finding("vanishing gradient", name, norm)
            elif norm > limits.exploding:
                yield Finding("exploding gradient", name, norm)

    def _of_time(self) -> Iterator[Finding]:
        for name, norms in self.input_gradients.items():
            largest = float(norms.max())
            if len(norms) < 2 or not 0 < largest < math.inf:
                continue
            first = float(norms[0])
            where = f"{name or 'the model'}, input at the first step, against the largest of all steps"
            if first < self.thresholds.vanishing * largest:
                yield Finding("gradient lost over time", where, first / largest)
            elif float(norms[-1]) > 0 and first > self.thresholds.exploding * float(norms[-1]):
                where = f"{name or 'the model'}, input at the first step, against the last"
                yield Finding("gradient grown over time", where, first / float(norms[-1]))

    def _of_layers(self) -> Iterator[Finding]:
        limits = self.thresholds
        for name, layer in self.layers.items():
            if not bool(layer.c.isfinite().all()):
                yield Finding("not finite", f"cell state of {name}", float(layer.c[-1].max()))
                continue
            for gate, share in zip(GATES, layer.saturation.mean((0, 2)).tolist()):
                if share > limits.saturated:
                    yield Finding("saturated gate", f"{gate} of {name}, share of its values", share)
            dead = float((layer.spread < limits.dead).float().mean())
            if dead > limits.share:
                yield Finding("dead units", f"{name}, share of its units", dead)
            last = float(layer.c[-1].max())
            if last > limits.large and last > 2 * float(layer.c[len(layer.c) // 2].max()):
                yield Finding("cell state grows", f"{name}, root mean square of c at the last step", last)

    def report(self) -> str:
        """Findings in words, and the numbers behind them."""
        found = self.findings()
        lines = [str(finding) for finding in found] or ["nothing suspicious"]
        lines.append(f"{'':40}{'saturated share of':>28}{'dead':>8}{'rms c':>10}")
        lines.append(f"{'layer':40}{'i':>7}{'f':>7}{'g':>7}{'o':>7}{'units':>8}{'at end':>10}")
        for name, layer in self.layers.items():
            shares = "".join(f"{share:7.0%}" for share in layer.saturation.mean((0, 2)).tolist())
            dead = float((layer.spread < self.thresholds.dead).float().mean())
            lines.append(f"{name:40}{shares}{dead:8.0%}{float(layer.c[-1].max()):10.3g}")
        lines.append(f"{'parameter':40}{'gradient':>12}")
        norms = {name: self.parameters[name] for name, _ in self.model.named_parameters() if name in self.parameters}
        lines += [f"{name:40}{float(norm):12.3g}" for name, norm in norms.items()]
        return "\n".join(lines)

    def figure(self) -> Any:
        """A matplotlib Figure: gradient norms by parameter and by step, saturated gates, states by step."""
        from .recipes.debugging import inside_figure

        return inside_figure(self)


class watch:
    """A context manager that collects a `Seen` from every LSTM of a model, ours or nn.LSTM, while it is open.

    Inside, forward passes also give the states of every step (on the CPU: step by step in plain PyTorch) and backward
    passes the gradient of every LSTM's input. Results are the same up to rounding; nn.LSTM modules run as ours
    meanwhile. Cells (LSTMCell) are left alone. Not for compiled models.

    Raises:
        ValueError: there is no LSTM in the model.
        TypeError: an LSTM in it is a subclass of nn.LSTM, whose forward may be another.
    """

    def __init__(self, model: nn.Module, **thresholds: float) -> None:
        self.seen = Seen(model, Thresholds(**thresholds))
        self.handles: list[Any] = []
        self.patched: list[nn.Module] = []
        self.frugal: list[tuple[LSTM, str]] = []
        self.made: dict[Any, int] = {}  # graph node of a state -> gradients that had been accumulated before it
        self.asked: dict[str, bool] = {}  # whether the caller asked a module for states

    def __enter__(self) -> Seen:
        modules = {name: m for name, m in self.seen.model.named_modules() if isinstance(m, (nn.LSTM, LSTM))}
        if not modules:
            raise ValueError(f"there is no LSTM in {type(self.seen.model).__name__}")
        for name, module in modules.items():
            if isinstance(module, nn.LSTM) and not isinstance(module, LSTM) and type(module) is not nn.LSTM:
                raise TypeError(f"{name or 'the model'} is a {type(module).__name__}, a subclass of nn.LSTM")
        for name, module in modules.items():
            if type(module) is nn.LSTM:
                patch(module)
                self.patched.append(module)
            if module.recompute != "none":  # else there are no gates to be seen
                self.frugal.append((module, module.recompute))  # type: ignore[arg-type]
                module.recompute = "none"
            self.handles += [
                module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                module.register_forward_hook(self._after(name), with_kwargs=True),
            ]
        for name, parameter in self.seen.model.named_parameters():
            if parameter.requires_grad:
                self.handles.append(parameter.register_post_accumulate_grad_hook(self._accumulated(name)))
        return self.seen

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        for lstm, recompute in self.frugal:
            lstm.recompute = recompute
        for module in self.patched:
            unpatch(module)

    def _before(self, name: str):
        def hook(module: nn.Module, given: tuple, named: dict) -> tuple[tuple, dict]:
            named = dict(zip(("input", "hx"), given)) | named  # the others go by name only
            state = named.get("hx")
            node = state[0].grad_fn if state is not None else None
            if node in self.made and self.made[node] < self.seen.accumulated and name not in self.seen.loose:
                self.seen.loose.append(name)
            named["input"] = self._seen_input(name, module, named["input"])
            asked = named.get("return_states") or ()
            asked = (asked,) if isinstance(asked, str) else tuple(asked)
            self.asked[name] = bool(asked)
            named["return_states"] = tuple(dict.fromkeys((*asked, "c", "gates")))
            return (), named

        return hook

    def _seen_input(self, name: str, module: nn.Module, x: Any) -> Any:
        """The input, made to want a gradient, whose norm by step is kept."""
        data = x.data if isinstance(x, PackedSequence) else x
        if not torch.is_grad_enabled() or not data.is_floating_point():
            return x
        data = data if data.requires_grad else data.detach().requires_grad_()
        data = data.view_as(data)  # a tensor of this call alone, to hang the hook on

        def keep(gradient: Tensor) -> None:
            if isinstance(x, PackedSequence):
                steps = torch.stack([part.norm() for part in gradient.split(x.batch_sizes.tolist())])
            else:
                steps = _time_first(gradient, module).flatten(1).norm(dim=1)
            self.seen.input_gradients[name] = steps.detach()

        data.register_hook(keep)
        return x._replace(data=data) if isinstance(x, PackedSequence) else data

    def _after(self, name: str):
        def hook(module: nn.Module, _: tuple, named: dict, result: Any) -> Any:
            output, state, states = result
            if state[0].grad_fn is not None:
                self.made[state[0].grad_fn] = self.seen.accumulated
            for number in range(module.num_layers):  # type: ignore[arg-type]
                layer = f"{name}[{number}]" if name else f"[{number}]"
                c, gates = states.c[number], states.gates[number]
                self.seen.layers[layer] = _layer_of(c, gates, module, named.get("lengths"))
            return result if self.asked[name] else (output, state)

        return hook

    def _accumulated(self, name: str):
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.seen.parameters[name] = parameter.grad.detach().norm()
            self.seen.accumulated += 1

        return hook


def _time_first(tensor: Tensor, module: nn.Module) -> Tensor:
    """[T, B, ...] of a padded tensor, [T, 1, ...] of an unbatched one; `tensor` has the input's form."""
    if tensor.is_nested:
        tensor = tensor.to_padded_tensor(0.0)
    if tensor.dim() == 2:
        return tensor.unsqueeze(1)
    return tensor.transpose(0, 1) if module.batch_first else tensor


@torch.no_grad()
def _layer_of(c: Any, gates: Any, module: nn.Module, lengths: Tensor | None) -> Layer:
    """Statistics of c [S, D * H] and gates [S, D, 4, H], in the form of the input, over the steps of all rows."""
    directions = 2 if module.bidirectional else 1
    if isinstance(c, PackedSequence):
        lengths = pad_packed_sequence(c)[1]
        c, gates = (pad_packed_sequence(packed)[0] for packed in (c, gates))
    else:
        if c.is_nested:
            lengths = c.offsets().diff()
        c, gates = (_time_first(tensor, module) if tensor.dim() > given else tensor.unsqueeze(1)
                    for tensor, given in ((c, 2), (gates, 4)))  # fmt: skip
    c = c.unflatten(-1, (directions, -1)).float()
    gates = gates.float()
    steps = torch.arange(len(c), device=c.device)
    valid = (steps.unsqueeze(1) < lengths.to(c.device)) if lengths is not None else c.new_ones(c.shape[:2]).bool()
    h = gates[..., 3, :] * c.tanh()
    rows = valid.sum(1).clamp(min=1)[:, None]
    rms_h, rms_c = (((x.square() * valid[..., None, None]).mean(-1).sum(1) / rows).sqrt().cpu() for x in (h, c))
    slopes = torch.stack((*gates.unbind(-2)[:2], (gates[..., 2, :] + 1) / 2, gates[..., 3, :]), dim=-2)[valid]
    saturation = ((slopes < CLOSED) | (slopes > OPEN)).float().mean(0).cpu()
    return Layer(rms_h, rms_c, saturation, h[valid].std(0, correction=0).cpu())


def kept_bytes(module: LSTM, seq_len: int, batch: int) -> dict[str, int]:
    """Bytes that training keeps between forward and backward by `recompute` mode, beyond inputs and weights.

    The formulas of the README's paragraph on memory; "chunk" with the square root of seq_len as the length of a chunk.
    """
    element = module.weight_ih_l0.element_size()  # type: ignore[operator]
    width = (2 if module.bidirectional else 1) * module.hidden_size * module.num_layers
    rows, chunk = seq_len * batch, max(1, math.isqrt(seq_len))
    states = -(-seq_len // chunk) * batch * width * (element + 4)
    return {
        "none": 6 * rows * width * element,
        "gates": 2 * rows * width * element,
        f"chunk:{chunk}": rows * width * element + states,
    }
