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
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..modules.lstm import LSTM
from ..modules.patching import patch, unpatch
from .statistics import Layer, layer_of, norm_of, time_first
from .symptoms import ADVICE, Finding

GATES = "ifgo"
STATES = ("c", "layers", "gates")  # of every step


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
class Seen:
    """What a `watch` has collected, of each module's last call and of the last gradient that each parameter got.

    parameters: norm of .grad by parameter, which sums over backward passes until it is cleared. layers: by name of the
    module, and "[layer]". input_gradients: norm of the loss's gradient for the module's input at every step, [T], by
    name of the module. loose: modules that were given a state whose graph had been through a backward pass.
    accumulated: how many gradients have arrived, by module that is watched.
    """

    model: nn.Module
    thresholds: Thresholds
    parameters: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    input_gradients: dict[str, Tensor] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)
    accumulated: Counter[str] = field(default_factory=Counter)
    both_ways: dict[str, bool] = field(default_factory=dict)

    def findings(self) -> list[Finding]:
        """All symptoms, the worst kinds first."""
        found = [*self._of_parameters(), *self._of_time(), *self._of_layers()]
        found += [Finding("state not detached", name, 1.0) for name in self.loose]
        order = list(ADVICE)
        return sorted(found, key=lambda finding: order.index(finding.kind))

    def _of_parameters(self) -> Iterator[Finding]:
        limits = self.thresholds
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad or not self.parameters:
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
            # What comes after the largest may simply not be asked for; with two directions both ends are.
            asked = norms if self.both_ways[name] else norms[: int(norms.argmax()) + 1]
            where = f"{name or 'the model'}, input at step {int(asked.argmin())}, against the largest of all steps"
            if float(asked.min()) < self.thresholds.vanishing * largest:
                yield Finding("gradient lost over time", where, float(asked.min()) / largest)
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
            if last > limits.large and last > 1.5 * float(layer.c[len(layer.c) // 2].max()):
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
        from .figure import inside_figure

        return inside_figure(self)


OPEN_WATCHES: WeakSet[nn.Module] = WeakSet()


class watch:
    """A context manager that collects a `Seen` from every LSTM of a model, ours or nn.LSTM, while it is open.

    Inside, forward passes also give the states of every step (on the CPU: step by step in plain PyTorch) and backward
    passes the gradient of every LSTM's input. Results are the same up to rounding; nn.LSTM modules run as ours
    meanwhile. Cells (LSTMCell) are left alone. Not for compiled models.

    Raises:
        ValueError: there is no LSTM in the model.
        TypeError: an LSTM in it is a subclass of nn.LSTM, whose forward may be another.
        RuntimeError: an LSTM in it is watched already.
    """

    def __init__(self, model: nn.Module, **thresholds: float) -> None:
        self.seen = Seen(model, Thresholds(**thresholds))
        self.handles: list[Any] = []
        self.patched: list[nn.Module] = []
        self.frugal: list[tuple[LSTM, str]] = []
        self.asked: dict[str, tuple[str, ...]] = {}  # the states that a module's caller asked for
        self.calls: Counter[str] = Counter()
        self.modules: list[nn.Module] = []
        self.key = object()  # what graph nodes know this watch by; they must not hold the watch itself

    def __enter__(self) -> Seen:
        modules = {name: m for name, m in self.seen.model.named_modules() if isinstance(m, (nn.LSTM, LSTM))}
        if not modules:
            raise ValueError(f"there is no LSTM in {type(self.seen.model).__name__}")
        for name, module in modules.items():
            if isinstance(module, nn.LSTM) and not isinstance(module, LSTM) and type(module) is not nn.LSTM:
                raise TypeError(f"{name or 'the model'} is a {type(module).__name__}, a subclass of nn.LSTM")
            if module in OPEN_WATCHES:
                raise RuntimeError(f"{name or 'the model'} is being watched already")
        self.modules = list(modules.values())
        OPEN_WATCHES.update(self.modules)
        for name, module in modules.items():
            self.seen.both_ways[name] = bool(module.bidirectional)
            if type(module) is nn.LSTM:
                patch(module)
                self.patched.append(module)
            if module.recompute != "none":  # else there are no gates to be seen
                self.frugal.append((module, module.recompute))  # type: ignore[arg-type]
                module.recompute = "none"
            self.handles += [
                module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                module.register_forward_hook(self._after(name), with_kwargs=True, prepend=True),
            ]
        for name, parameter in self.seen.model.named_parameters():
            if parameter.requires_grad:
                owners = [of for of, module in modules.items() if any(parameter is p for p in module.parameters())]
                self.handles.append(parameter.register_post_accumulate_grad_hook(self._accumulated(name, owners)))
        return self.seen

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        for lstm, recompute in self.frugal:
            lstm.recompute = recompute
        for module in self.patched:
            unpatch(module)
        OPEN_WATCHES.difference_update(self.modules)

    def _before(self, name: str):
        def hook(module: nn.Module, given: tuple, named: dict) -> tuple[tuple, dict]:
            state = given[1] if len(given) > 1 else named.get("hx")
            made = _made_at(None if state is None else state[0].grad_fn, self.key)
            if made is not None and made < self.seen.accumulated[name] and name not in self.seen.loose:
                self.seen.loose.append(name)
            asked = named.get("return_states") or ()
            self.asked[name] = (asked,) if isinstance(asked, str) else tuple(asked)
            named = named | {"return_states": tuple(dict.fromkeys((*self.asked[name], *STATES)))}
            self.calls[name] += 1
            if given:
                return (self._seen_input(name, module, given[0], named.get("lengths")), *given[1:]), named
            return (), named | {"input": self._seen_input(name, module, named["input"], named.get("lengths"))}

        return hook

    def _seen_input(self, name: str, module: nn.Module, x: Any, lengths: Tensor | None) -> Any:
        """The input, made to want a gradient, whose norm by step is kept."""
        data = x.data if isinstance(x, PackedSequence) else x
        learns = any(parameter.requires_grad for parameter in module.parameters())
        if not torch.is_grad_enabled() or not data.is_floating_point() or not (data.requires_grad or learns):
            return x
        data = data if data.requires_grad else data.detach().requires_grad_()
        data = data.view_as(data)  # a tensor of this call alone, to hang the hook on
        seen, calls, call = self.seen, self.calls, self.calls[name]  # the graph must not hold this object: a cycle
        sizes = x.batch_sizes.tolist() if isinstance(x, PackedSequence) else None

        def keep(gradient: Tensor) -> None:
            if call < calls[name]:
                return
            if sizes is not None:
                steps = torch.stack([norm_of(part) for part in gradient.split(sizes)])
            else:
                steps = norm_of(time_first(gradient, module).flatten(1), dim=1)
            longest = len(steps) if lengths is None else int(lengths.max())
            seen.input_gradients[name] = steps[:longest].detach()

        data.register_hook(keep)
        return x._replace(data=data) if isinstance(x, PackedSequence) else data

    def _after(self, name: str):
        def hook(module: nn.Module, given: tuple, named: dict, result: Any) -> Any:
            output, state, states = result
            if state[0].grad_fn is not None:
                state[0].grad_fn.metadata[self.key] = self.seen.accumulated[name]
            for number in range(module.num_layers):  # type: ignore[arg-type]
                layer = f"{name}[{number}]" if name else f"[{number}]"
                of_layer = (states.layers[number], states.c[number], states.gates[number])
                found = layer_of(*of_layer, module, named.get("lengths"))
                if found is not None:
                    self.seen.layers[layer] = found
            asked = self.asked[name]
            if not asked:
                return output, state
            return output, state, states._replace(**{other: None for other in STATES if other not in asked})

        return hook

    def _accumulated(self, name: str, owners: list[str]):
        seen = self.seen

        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            seen.parameters[name] = norm_of(parameter.grad.detach())
            seen.accumulated.update(owners)

        return hook


def _made_at(node: Any, key: object) -> int | None:
    """What was noted under `key` at a state's graph node, or at one from which the state was made in a few steps."""
    nodes = [node]
    for _ in range(4):
        for one in nodes:
            if one is not None and key in one.metadata:
                return one.metadata[key]
        nodes = [parent for one in nodes if one is not None for parent, _ in one.next_functions]
    return None


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
