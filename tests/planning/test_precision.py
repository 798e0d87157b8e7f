"""The precision of fp32 GEMMs: one block around a pass, the user's setting as it was, threads that need different ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from lstm_triton import LSTM
from lstm_triton.kernels import forward
from lstm_triton.layer import forward as forward_pass
from lstm_triton.planning import precision
from lstm_triton.planning.precision import matmul_precision

VARIANTS = dict(
    plain={}, peephole=dict(peephole=True), layer_norm=dict(layer_norm=True), zoneout=dict(zoneout=(0.2, 0.3)),
    variational=dict(variational_dropout=0.3), coupled=dict(coupled_gates=True),
    coupled_norm=dict(coupled_gates=True, layer_norm=True), clips=dict(cell_clip=0.5, recurrent_grad_clip=0.1),
    projected=dict(proj_size=4), invariant=dict(batch_invariant=True),
)  # fmt: skip


class Settings:
    """PyTorch's, with every change noted. inherited: what "none" stands for."""

    def __init__(self, value: str) -> None:
        self.value, self.changes = value, []

    @property
    def fp32_precision(self) -> str:
        return self.value

    @fp32_precision.setter
    def fp32_precision(self, value: str) -> None:
        self.changes.append(value)
        self.value = value


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    found = Settings("none")
    fake = SimpleNamespace(float32=torch.float32, backends=SimpleNamespace(cuda=SimpleNamespace(matmul=found)))
    monkeypatch.setattr(precision, "torch", fake)
    yield found
    assert precision._SETTING.users == 0


@pytest.mark.parametrize("recompute", ["none", "gates", "chunk:2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pass_holds_it_once(variant: str, recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never inside of itself: a thread that needed two at once could wait for itself."""
    held: list[int] = []
    real = precision._SETTING.hold

    def noted(wanted: str) -> None:
        real(wanted)
        held.append(precision._SETTING.users)

    monkeypatch.setattr(precision._SETTING, "hold", noted)
    module = LSTM(
        5, 16, bidirectional=len(variant) % 2 == 0, backend="triton", recompute=recompute, **VARIANTS[variant]
    )
    x = torch.randn(4, 3, 5, requires_grad=True)
    marks = dict(lengths=torch.tensor([4, 2, 3]), reset=torch.rand(4, 3) < 0.3) if recompute == "none" else {}
    module(x, **marks)[0].sum().backward()
    assert len(held) >= 2
    assert set(held) == {1}


def test_gemms_and_recurrence_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cuBLAS would read while a pass is computed, and afterwards."""
    seen = []
    real = forward_pass.projected_input

    def noted(*arguments):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return real(*arguments)

    monkeypatch.setattr(forward_pass, "projected_input", noted)
    x = torch.randn(2, 2, 4)
    for asked in ("tf32", "ieee", "tf32x3"):
        LSTM(4, 16, backend="triton", precision=asked)(x)
    assert [one == "tf32" for one in seen] == [True, False, False]
    assert torch.backends.cuda.matmul.fp32_precision == "none"


@pytest.mark.parametrize(
    ("mine", "wanted", "inside"),
    [("none", "tf32", "tf32"), ("none", "ieee", "none"), ("ieee", "ieee", "ieee"), ("tf32", "tf32", "tf32"),
     ("ieee", "tf32", "tf32"), ("tf32", "ieee", "ieee"), ("tf32", "tf32x3", "ieee")],
)  # fmt: skip
def test_a_setting_is_changed_only_where_it_differs(mine: str, wanted: str, inside: str, settings: Settings) -> None:
    settings.value = mine
    with matmul_precision(torch.float32, wanted):
        assert settings.value == inside
    assert settings.value == mine
    assert bool(settings.changes) == (mine != inside)


def test_other_types_change_nothing(settings: Settings) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        with matmul_precision(dtype, "tf32"):
            assert precision._SETTING.users == 0
    assert not settings.changes


def test_an_error_gives_it_back(settings: Settings) -> None:
    with pytest.raises(KeyError), matmul_precision(torch.float32, "tf32"):
        raise KeyError
    assert settings.value == "none"


def test_who_needs_the_same_goes_along(settings: Settings) -> None:
    """A thread may also need it twice; the last one of all gives it back."""
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with matmul_precision(torch.float32, "tf32"):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with matmul_precision(torch.float32, "tf32"), matmul_precision(torch.float32, "tf32"):
        thread.start()
        inside.wait()
    assert settings.value == "tf32", "the other thread is still at it"
    leave.set()
    thread.join()
    assert settings.value == "none"


def test_who_needs_another_waits(settings: Settings) -> None:
    order = []

    def other() -> None:
        with matmul_precision(torch.float32, "ieee"):
            order.append(("other", settings.value))

    thread = threading.Thread(target=other)
    with matmul_precision(torch.float32, "tf32"):
        thread.start()
        # Once it waits it has given the lock away, and stands among the waiters.
        while not precision._SETTING.changed._waiters:  # type: ignore[attr-defined]
            pass
        order.append(("first", settings.value))
    thread.join()
    assert order == [("first", "tf32"), ("other", "none")]


def test_nobody_waits_for_ever(settings: Settings) -> None:
    """Who comes while another waits for another precision lets it pass."""
    order: list[str] = []

    def hold(name: str, wanted: str) -> threading.Thread:
        def run() -> None:
            with matmul_precision(torch.float32, wanted):
                order.append(name)

        thread = threading.Thread(target=run)
        waiters = len(precision._SETTING.changed._waiters)  # type: ignore[attr-defined]
        thread.start()
        while len(precision._SETTING.changed._waiters) == waiters:  # type: ignore[attr-defined]
            pass
        return thread

    with matmul_precision(torch.float32, "tf32"):
        threads = [hold("ieee", "ieee"), hold("late", "tf32")]
        assert not order, "the second does not go along, though it could"
    for thread in threads:
        thread.join()
    assert sorted(order) == ["ieee", "late"]


def test_the_kernels_get_what_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an argument: what nn.LSTM would use on a GPU."""
    seen = []
    real = forward.run

    def noted(kernel, recurrence, arguments) -> None:
        seen.append(recurrence.how.PRECISION)
        real(kernel, recurrence, arguments)

    own = {"launch": noted}
    monkeypatch.setattr(forward_pass, "lstm_forward", lambda *a, **k: forward.lstm_forward(*a, **(k | own)))
    LSTM(4, 16, backend="triton")(torch.randn(2, 2, 4))
    with torch.backends.cudnn.flags(allow_tf32=False):
        LSTM(4, 16, backend="triton")(torch.randn(2, 2, 4))
    assert seen == ["tf32", "ieee"]
