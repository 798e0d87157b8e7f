"""Training scripts written for nn.LSTM follow the same loss curve with one import changed.

Tolerance, as in `layers`: a curve may be at most twice as far from nn.LSTM's in fp64 as nn.LSTM's own
in fp32. The distance is the largest over the steps, relative to the largest loss; PyTorch's own is the
worst of four seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lstm_triton import LSTM

# Triton 3.6's interpreter makes NumPy warn.
pytestmark = pytest.mark.filterwarnings("error", "ignore:Conversion of an array with ndim")
FOLDER = Path(__file__).parent / "scripts"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
BACKENDS = ["auto", "triton"]
THEIRS, OURS = "from torch.nn import LSTM\n", "from lstm_triton import LSTM\n"
STEPS, SEED = 8, 0
EPS = torch.finfo(torch.float32).eps  # of the loss itself, which is rounded to fp32


def load(name: str, backend: str | None = None) -> dict:
    """The names of a script as it is written or, given a backend, with its one import line replaced."""
    path = FOLDER / f"{name}.py"
    source = path.read_text()
    assert source.count(THEIRS) == 1
    assert not {word for word in ("nn.LSTM", "lstm_triton") if word in source}
    names = {"__name__": name}
    exec(compile(source if backend is None else source.replace(THEIRS, OURS), path, "exec"), names)
    if backend is not None:
        assert names["LSTM"] is LSTM
        names["LSTM"] = partial(LSTM, backend=backend)
    return names


@lru_cache
def by_torch(name: str, dtype: torch.dtype, seed: int) -> list[float]:
    return load(name)["train"](dtype, STEPS, seed)


def error(losses: list[float], truth: list[float]) -> float:
    """The largest over the steps, NaN if there is one, over the largest loss."""
    assert len(losses) == len(truth) == STEPS
    got, want = (torch.tensor(values, dtype=torch.float64) for values in (losses, truth))
    return float((got - want).abs().max() / want.abs().max())


@lru_cache
def tolerance(name: str) -> float:
    curves = [[by_torch(name, dtype, seed) for dtype in (torch.float32, torch.float64)] for seed in range(SEED, SEED + 4)]  # fmt: skip
    return 2 * max(error(*pair) for pair in curves) + EPS


def assert_same_curve(losses: list[float], name: str) -> None:
    found = error(losses, by_torch(name, torch.float64, SEED))
    assert found <= tolerance(name), f"{found:.2e} from nn.LSTM in fp64, {tolerance(name):.2e} is allowed"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_one_changed_import_keeps_the_loss_curve(name: str, backend: str) -> None:
    losses = load(name, backend)["train"](torch.float32, STEPS, SEED)
    assert_same_curve(losses, name)
    if backend == "auto":
        assert losses == by_torch(name, torch.float32, SEED), "on the CPU it is the same operator"


def ppo_in_one_call(backend: str, mark: Callable[[Tensor], Tensor]) -> list[float]:
    """The PPO script with its loop over segments replaced by reset=."""
    names = load("ppo", backend)
    names["Agent"].recur = lambda agent, x, state, done: agent.lstm(x, state, reset=mark(done))
    return names["train"](torch.float32, STEPS, SEED)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ppo_in_one_call(backend: str) -> None:
    assert_same_curve(ppo_in_one_call(backend, lambda done: done), "ppo")


@pytest.mark.parametrize(
    "mark",
    [torch.zeros_like, lambda done: done.roll(1, dims=0), lambda done: done.roll(-1, dims=0)],
    ids=["never", "a step late", "a step early"],
)
def test_resets_at_other_steps_are_caught(mark: Callable[[Tensor], Tensor]) -> None:
    """The rollouts have episodes that end inside of them: the convention of `done` matters."""
    with pytest.raises(AssertionError, match=r"from nn\.LSTM in fp64"):
        assert_same_curve(ppo_in_one_call("auto", mark), "ppo")


@pytest.mark.parametrize("parameter", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_slightly_wrong_gradient_is_caught(name: str, parameter: str) -> None:
    """One unit's gradients off by a hundredth of the largest one."""

    def spoil(gradient: Tensor) -> Tensor:
        wrong = gradient.clone()
        wrong[1] += 1e-2 * gradient.abs().max()
        return wrong

    class Spoilt(LSTM):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            getattr(self, parameter).register_hook(spoil)

    names = load(name, "auto")
    names["LSTM"] = Spoilt
    with pytest.raises(AssertionError, match=r"from nn\.LSTM in fp64"):
        assert_same_curve(names["train"](torch.float32, STEPS, SEED), name)
