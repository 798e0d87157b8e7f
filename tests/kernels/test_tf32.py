"""What TF32 costs in the kernels, whose matrix units truncate, by a model of them in plain PyTorch.

The interpreter multiplies in full precision, so the kernels themselves show it on a GPU only (`tests/test_gpu.py`).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers import Case, assert_as_good_as_torch, by_reference, relative_errors, to_tf32, truncated

from lstm_triton.kernels.product import DROPPED

RESTORED = 1 + 2 * DROPPED.value

CASES = {
    "one step": Case(1, 3, 5, 16),
    "short": Case(4, 3, 5, 16),
    "long": Case(50, 3, 5, 16),
    "wide": Case(10, 37, 16, 64),
    "both ways": Case(20, 16, 16, 128, directions=2),
    "large": Case(5, 37, 64, 256),
    "normalised": Case(10, 8, 16, 64, norm=True),
    "marked": Case(20, 8, 16, 64, lengths=True, reset=True),
}


def test_rounding_and_truncation() -> None:
    x = torch.tensor([1 + 2**-11, 1 + 2**-11 - 2**-23, -1 - 2**-11, 3e38, float("inf"), float("nan")])
    assert to_tf32(x)[:3].tolist() == [1 + 2**-10, 1, -1 - 2**-10]
    assert to_tf32(x)[4].isinf()
    assert to_tf32(x)[5].isnan()
    assert truncated(x)[:3].tolist() == [1, 1, -1]


@pytest.mark.parametrize("name", CASES)
def test_restored_products_are_as_good_as_rounded_ones(name: str) -> None:
    assert_as_good_as_torch(by_reference(CASES[name], torch.float32, "tf32", RESTORED), CASES[name], "tf32")


def test_what_truncation_alone_costs() -> None:
    """The mean over results and draws of the rms error, by that of rounding."""
    ratios: dict[float, list[float]] = {RESTORED: [], 1.0: []}
    for seed in range(8):
        case = replace(CASES["wide"], seed=seed)
        truth = by_reference(case, torch.float64)
        rounded = relative_errors(by_reference(case, torch.float32, "tf32"), truth)
        for longer, found in ratios.items():
            ours = relative_errors(by_reference(case, torch.float32, "tf32", longer), truth)
            found += [ours[name][1] / rms for name, (_, rms) in rounded.items()]
    restored, left = (sum(found) / len(found) for found in ratios.values())
    assert restored < 1.1
    assert left > 1.4
