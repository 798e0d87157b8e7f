"""`patch(model)`: every nn.LSTM and nn.LSTMCell of a model becomes ours, in place; `unpatch` undoes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from ..functional.checks import check_options
from ..variant import PLAIN
from .cell import LSTMCell
from .lstm import LSTM

OURS: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}
Patterns = str | Sequence[str]


@dataclass(frozen=True)
class Change:
    """What became of one module. name: as in `named_modules`, "" for the model itself. left: why it stays as it is."""

    name: str
    kind: str
    left: str = ""

    def __str__(self) -> str:
        return f"{self.name or '(the model)'}: {self.kind}" + (f", left as it is: {self.left}" if self.left else "")


def patch(
    model: nn.Module,
    *,
    include: Patterns = "*",
    exclude: Patterns = (),
    dry_run: bool = False,
    backend: str = "auto",
    precision: str | None = None,
    recompute: str = "none",
    batch_invariant: bool = False,
) -> list[Change]:
    """Let every nn.LSTM and nn.LSTMCell inside a model run as `lstm_triton.LSTM` and `LSTMCell`.

    The modules stay the same objects with the same parameters, hooks and state dicts; only their class changes, so
    optimizers and references hold. `isinstance(module, nn.LSTM)` is then false: see `LSTM`.

    Args:
        include, exclude: shell patterns (`fnmatch`) of module names, one or several: "encoder.*".
        dry_run: change nothing, only say what would be changed.
        backend, precision: as for `LSTM` and `LSTMCell`.
        recompute, batch_invariant: as for `LSTM`.

    Returns:
        a `Change` for every LSTM found, also for those that are left, with the reason.

    Raises:
        ValueError: an unknown backend, precision or recompute mode, or a pattern that no LSTM's name matches. Nothing
            is changed then.
    """
    check_options(backend, precision, recompute)
    found = list(_lstms(model, nn.LSTM, nn.LSTMCell))
    wanted, unwanted = _listed(include), _listed(exclude)
    for pattern in (*wanted, *unwanted):
        if found and pattern != "*" and not any(fnmatchcase(name, pattern) for name, _ in found):
            names = ", ".join(repr(name) for name, _ in found)
            raise ValueError(f"no LSTM's name matches {pattern!r}; there are {names}")
    changes = []
    for name, module in found:
        left = _left(name, module, wanted, unwanted)
        changes.append(Change(name, type(module).__name__, left))
        if not left and not dry_run:
            module.__class__ = OURS[type(module)]
            module.backend, module.precision = backend, precision  # type: ignore[assignment]
            if isinstance(module, LSTM):
                module.recompute, module.batch_invariant = recompute, batch_invariant
    return changes


def unpatch(model: nn.Module) -> list[Change]:
    """Make every `LSTM` and `LSTMCell` of ours inside a model PyTorch's again, also those that never were.

    Those with variants of the cell or a learned initial state are left, and their `Change` says so.
    """
    changes = []
    for name, module in _lstms(model, LSTM, LSTMCell):
        left = _beyond_torch(module) if type(module) in THEIRS else _subclass(module)
        changes.append(Change(name, type(module).__name__, left))
        if not left:
            module.__class__ = THEIRS[type(module)]
            for option in (
                "backend",
                "precision",
                "recompute",
                "batch_invariant",
                "variant",
                "forget_bias",
                "learn_initial_state",
            ):
                module.__dict__.pop(option, None)
            if isinstance(module, nn.LSTM):
                module.flatten_parameters()
    return changes


def _lstms(model: nn.Module, *kinds: type[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Modules of these kinds; ours count as PyTorch's only where ours are asked for."""
    for name, module in model.named_modules():
        if isinstance(module, kinds) and (kinds[0] is LSTM or not isinstance(module, (LSTM, LSTMCell))):
            yield name, module


def _listed(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _left(name: str, module: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> str:
    if not any(fnmatchcase(name, pattern) for pattern in include):
        return "not included"
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return "excluded"
    if "forward" in vars(module):
        return "something has replaced its own forward, as hooks of other libraries do: patch first"
    return "" if type(module) in OURS else _subclass(module)


def _beyond_torch(module: nn.Module) -> str:
    """What of ours nn.LSTM does not have."""
    asked = list(getattr(module, "variant", PLAIN).asked())
    asked += ["learn_initial_state"] * getattr(module, "learn_initial_state", False)
    return f"nn.LSTM has no {', '.join(asked)}" if asked else ""


def _subclass(module: nn.Module) -> str:
    if nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized: patch first, parametrize afterwards"
    return "a subclass may do more than PyTorch's forward"
