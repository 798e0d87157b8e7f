"""What `auto` goes by before anybody has measured: it never takes what is predicted to be much slower than nn.LSTM."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lstm_triton import LSTM, explain
from lstm_triton.planning import prediction, route
from lstm_triton.planning.cudnn import UNDER_AUTOCAST, Call
from lstm_triton.planning.device import KNOWN, STAND_IN, Device
from lstm_triton.planning.prediction import MARGIN, RIVALS, Prediction, predict, rival_step

H100 = KNOWN["sm_90"]
HIDDEN_SIZES = (64, 128, 160, 192, 256, 384, 512, 640, 650, 768, 1024, 1150, 1280, 1536, 2048)
TYPES = (("float16", "tf32"), ("bfloat16", "tf32"), ("float32", "tf32"), ("float32", "ieee"))


def of(hidden_size: int, batch: int, dtype: str = "float16", layers: int = 1, directions: int = 1, **changes) -> Call:
    return replace(Call(hidden_size, hidden_size, batch, layers, directions, dtype), **changes)


def predicted(call: Call, seq_len: int = 1000, training: bool = True, device: Device = H100, **more) -> Prediction:
    found = predict(call, device, "tf32", training, seq_len, **more)
    assert found is not None
    return found


@pytest.mark.parametrize("arch", RIVALS)
@pytest.mark.parametrize(("dtype", "precision"), TYPES)
def test_auto_is_nowhere_predicted_to_be_much_slower(arch: str, dtype: str, precision: str) -> None:
    calls = itertools.product(HIDDEN_SIZES, (1, 16, 64, 512), (1, 4), (False, True), (1, 32, 1000))
    for hidden_size, batch, layers, training, seq_len in calls:
        call = of(hidden_size, batch, dtype, layers)
        found = predict(call, KNOWN[arch], precision, training, seq_len)
        if found is not None and found.speedup < 1 / 1.2:
            assert route.slower_on(KNOWN[arch], call, precision, training, seq_len), (call, seq_len, found)


def test_what_was_published() -> None:
    """FlashRNN's figure, to which the persistent kernel is fitted: 1.96 us forward and 3.11 backward."""
    figure = of(768, 16)
    assert rival_step(figure, H100, "forward", "tf32")[0] == pytest.approx(1.96, rel=0.1)
    assert rival_step(figure, H100, "backward", "tf32")[0] == pytest.approx(3.11, rel=0.2)
    # KernelBench's problem 35: 27.2 ms on an H100, which are launches.
    six = Call(128, 256, 10, 6, 1, "float32")
    assert predicted(six, 512, training=False).torch == pytest.approx(27_200, rel=0.1)


def test_reasons() -> None:
    large = route.slower_on(H100, of(1024, 256, "bfloat16"), "tf32", True, 1000)
    assert large.startswith("nn.LSTM is 1.")
    assert "predicted, not measured (`python -m lstm_triton tune` measures), by large products, by B x H^2: " in large
    assert "(us a step: forward " in large
    short = route.slower_on(H100, of(64, 16, layers=4), "tf32", True, 32)
    assert "Python before the launches" in short
    assert "cuDNN's persistent kernel" in route.slower_on(H100, of(1024, 8), "tf32", True, 1000)
    assert route.slower_on(H100, of(256, 16, "bfloat16"), "tf32", True, 1000) == ""


def test_no_host_has_to_keep_up_in_a_graph() -> None:
    call = of(64, 512)
    assert predicted(call, 32).leaves_it
    captured = predicted(call, 32, captured=True)
    assert not captured.leaves_it
    # Both sides lose their host; nn.LSTM's launches were most of its time.
    standard = of(256, 16, "bfloat16")
    assert predicted(standard, captured=True).torch < 0.6 * predicted(standard).torch


def test_what_is_not_predicted() -> None:
    assert predict(of(256, 16, proj_size=8), H100, "tf32", True, 100) is None
    assert predict(of(256, 16, packed=True), H100, "tf32", True, 100) is None
    assert predict(of(256, 16, "float64"), H100, "tf32", True, 100) is None
    assert predict(of(256, 16, "float32"), H100, "tf32x3", True, 100) is None
    assert predict(of(64, 16), KNOWN["gfx942"], "tf32", True, 100) is None
    assert predict(of(64, 16), replace(H100, name=STAND_IN), "tf32", True, 100) is None
    assert predict(of(64, 16), replace(H100, cooperative=False), "tf32", True, 100) is not None


def test_fewer_multiprocessors_are_slower() -> None:
    call = of(1024, 512, "bfloat16")
    half = replace(H100, multiprocessors=66)
    assert rival_step(call, half, "forward", "tf32")[0] > 1.5 * rival_step(call, H100, "forward", "tf32")[0]


def test_corrections_move_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, call = tmp_path / "corrections.json", of(1024, 256, "bfloat16")
    before = predicted(call)
    monkeypatch.setattr(prediction, "CORRECTIONS", path)
    path.write_text(json.dumps({"sm_90": {"products": 2.0, "ours": 0.5}}))
    for cached in (prediction.corrections, prediction.steps_of):
        cached.cache_clear()
    try:
        after = predicted(call)
    finally:
        for cached in (prediction.corrections, prediction.steps_of):
            cached.cache_clear()
    for old, new in zip(before.steps, after.steps):
        assert new.gpu == pytest.approx(2 * old.gpu)
        assert new.ours == pytest.approx(old.ours / 2)
    assert before.leaves_it
    assert not after.leaves_it


@pytest.fixture
def on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the way of a GPU's, up to the choice of the path."""
    from lstm_triton.modules import lstm as module
    from lstm_triton.modules import path

    for place in (route, sys.modules["lstm_triton.explain"]):
        monkeypatch.setattr(place, "kernel_device", lambda device: H100)
    for place in (route, module, path):
        monkeypatch.setattr(place, "on_gpu", lambda device: True)


def test_the_module_takes_it(on_an_h100: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = LSTM(64, 64, 4).half(), torch.randn(32, 2, 64).half()
    reason = module.slower(x)
    assert "predicted, not measured" in reason
    taken = []
    monkeypatch.setattr(LSTM, "_forward_by_torch", lambda self, input, hx: taken.append(input))
    module(x)
    assert taken == [x]
    for other in ("triton", "torch"):
        assert LSTM(64, 64, 4, backend=other).half().slower(x) == ""
    assert module.slower(torch.randn(4000, 2, 64).half()) == "", "a long sequence is worth our launches"
    with torch.no_grad():
        assert module.slower(x) != ""
    monkeypatch.setenv("LSTM_TRITON_AUTOTUNE", "on")
    assert module.slower(x) == "", "who tunes at the first call wants the kernels"
    monkeypatch.delenv("LSTM_TRITON_AUTOTUNE")
    monkeypatch.setenv("LSTM_TRITON_STRICT", "1")
    assert module.slower(x) == ""


def test_nn_lstm_is_no_replacement_where_it_computes_otherwise(on_an_h100: None) -> None:
    x = torch.randn(32, 2, 64)
    assert LSTM(64, 64, 4).slower(x)
    assert LSTM(64, 64, 4, precision="tf32").slower(x)
    assert LSTM(64, 64, 4, precision="ieee").slower(x) == "", "nn.LSTM would use TF32"
    with torch.autocast("cpu", torch.bfloat16):
        assert LSTM(64, 64, 4).slower(x) == "", f"nn.LSTM would compute in {UNDER_AUTOCAST}"


def test_explain_says_what_is_predicted(on_an_h100: None) -> None:
    module = LSTM(256, 256).bfloat16()
    text = str(explain(module, torch.randn(500, 16, 256).bfloat16()))
    assert "times slower, predicted, not measured" in text
    assert MARGIN <= 1.2


def test_what_nn_lstm_cannot_do_is_not_left_to_it(on_an_h100: None) -> None:
    """cuDNN has no backward pass in evaluation, and aten's LSTM no vmap."""
    module, x = LSTM(64, 64, 4).half(), torch.randn(32, 2, 64).half()
    assert module.slower(x)
    module.eval()
    assert module.slower(x) == "", "who asks for gradients in evaluation"
    with torch.no_grad():
        assert module.slower(x)
    frozen = LSTM(64, 64, 4).half().eval().requires_grad_(False)
    assert frozen.slower(x)
    assert frozen.slower(x.clone().requires_grad_()) == ""
    asked = []

    def noted(given: torch.Tensor) -> torch.Tensor:
        asked.append(frozen.slower(given))
        return given

    torch.func.vmap(noted)(x.unsqueeze(0))
    assert asked == [""]


def test_explain_is_silent_where_nn_lstm_is_no_choice(on_an_h100: None) -> None:
    x = torch.randn(500, 256, 1024)
    for options in (
        dict(recompute="gates"),
        dict(precision="ieee"),
        dict(batch_invariant=True),
        dict(backend="triton"),
    ):
        text = str(explain(LSTM(1024, 1024, **options), x))
        assert text.startswith("layer 0: triton"), options
        assert "predicted" not in text, options
    assert "predicted" in str(explain(LSTM(1024, 1024, precision="tf32"), x))


def test_a_precision_means_nothing_in_16_bit(on_an_h100: None) -> None:
    assert LSTM(64, 64, 4, precision="ieee").half().slower(torch.randn(32, 2, 64).half())
