"""Test set-up. Kernels run in Triton's interpreter, unless `-m` asks for the aot, machine or gpu tests."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from engines import INTERPRETED, TARGETS, Engine, is_chosen

COMPILED = ("aot", "machine", "gpu")  # what needs compiled kernels, and so a process of its own


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="compiled code on every target, by more seeds and plans")


if importlib.util.find_spec("hypothesis"):  # tests on a GPU do without
    import hypothesis

    # The same draws in every run, however long they take.
    hypothesis.settings.register_profile(
        "tests", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    if not re.findall(rf"(?<!not )\b({'|'.join(COMPILED)})\b", config.option.markexpr or ""):
        # Triton reads this when a kernel is defined, so it must stand before the first import.
        if "triton" in sys.modules:
            raise pytest.UsageError("triton was imported before the tests could turn its interpreter on")
        os.environ["TRITON_INTERPRET"] = "1"
    # No test may depend on the tables of whoever runs it, nor write there.
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    os.environ["LSTM_TRITON_CACHE_DIR"] = folder.name
    os.environ["LSTM_TRITON_CHECK"] = "off"  # configs are what most tests are about
    import torch

    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from lstm_triton.testing import interpreter

        interpreter.patch_language_once()
        interpreter.repair_bf16()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The fixture `engine`: what kernels can run on in this process."""
    if "engine" in metafunc.fixturenames:
        if os.environ.get("TRITON_INTERPRET") == "1":
            engines = [INTERPRETED]
        else:
            engines = [pytest.param(target, marks=pytest.mark.machine) for target in TARGETS]
        metafunc.parametrize("engine", engines, indirect=True)


@pytest.fixture(autouse=True)
def nothing_decided_yet() -> None:
    """What a test puts in the place of something counts for its first call, too."""
    from lstm_triton.planning import memory

    memory.forget()


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    unchosen = [item for item in items if not is_chosen(item, config.option.long)]
    if unchosen:
        config.hook.pytest_deselected(items=unchosen)
        items[:] = [item for item in items if item not in set(unchosen)]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if interpreted and any(item.get_closest_marker(marker) for marker in COMPILED):
            reason = 'needs compiled kernels: run pytest -m "aot or machine or gpu"'
            item.add_marker(pytest.mark.skip(reason=reason))
        elif item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.fixture
def own_precision() -> Iterator[None]:
    """A measuring script owns its process's TF32 settings; here other tests have a right to theirs."""
    import torch

    # torch.testing._internal, imported by another test of this process, forbids to set them.
    with getattr(torch.backends, "__allow_nonbracketed_mutation")():
        yield
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.fixture
def clock_of_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search's deadline is a number of configs: its clock goes on by one for each."""
    from lstm_triton.tuning import search

    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=itertools.count(1).__next__))


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch):
    """Uninitialised floating memory is NaN: an output that nobody wrote cannot look right."""
    import torch

    def poisoned(make):
        def call(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

        return call

    from lstm_triton.kernels import backward, forward

    for module in (forward, backward):
        fake = _Torch(torch, empty_like=poisoned(torch.empty_like), empty=poisoned(torch.empty))
        monkeypatch.setattr(module, "torch", fake)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


class _Torch:
    """torch with some of its functions replaced, for one module only."""

    def __init__(self, torch, **replaced) -> None:
        self.__dict__.update(replaced)
        self._torch = torch

    def __getattr__(self, name: str):
        return getattr(self._torch, name)


@pytest.fixture(autouse=True)
def own_compilations() -> Iterator[None]:
    """Dynamo counts recompilations over the whole process: past eight, tests to come would run uncompiled."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(autouse=True)
def seed() -> None:
    import torch

    torch.manual_seed(0)
