"""Compiled kernels on a CUDA device: `pytest -m gpu`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from layers import assert_like, use_configs, with_exact_products
from torch import nn

from lstm_triton import LSTM, LSTMCell, explain
from lstm_triton.commands import contest
from lstm_triton.commands.doctor import self_check
from lstm_triton.kernels.config import Config
from lstm_triton.layer import comparison, op
from lstm_triton.planning import store
from lstm_triton.planning.device import Device, device_of
from lstm_triton.planning.planner import candidates, plan
from lstm_triton.planning.problem import PASSES, Problem
from lstm_triton.planning.table import Contest
from lstm_triton.tuning.search import search

pytestmark = pytest.mark.gpu

TYPES = {
    "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
    "ieee": (torch.float32, "ieee"),
}
SHAPES = {
    "local": dict(sizes=(40, 64), batch=37, steps=50),
    "grid": dict(sizes=(128, 512), batch=20, steps=40),
    "grid-tails": dict(sizes=(33, 650), batch=33, steps=21),
    "grid-streamed": dict(sizes=(64, 2048), batch=16, steps=8),
    "layers-directions": dict(sizes=(48, 256), batch=17, steps=30, num_layers=2, bidirectional=True),
    "batch-first": dict(sizes=(64, 320), batch=12, steps=25, batch_first=True),
    "waves": dict(sizes=(32, 1024), batch=300, steps=5),
}


def results(module: nn.Module, x: torch.Tensor, hx: tuple) -> list[torch.Tensor]:
    module.zero_grad()
    leaves = [t.detach().clone().requires_grad_() for t in (x, *hx)]
    out, (h_n, c_n) = module(leaves[0], tuple(leaves[1:]))
    generator = torch.Generator("cuda").manual_seed(3)
    total = sum(
        (t * torch.randn(t.shape, generator=generator, device="cuda").to(t.dtype)).sum() for t in (out, h_n, c_n)
    )
    total.backward()
    return [
        t.detach() for t in (out, h_n, c_n, *(leaf.grad for leaf in leaves), *(p.grad for p in module.parameters()))
    ]


def build(kind: str, sizes: tuple, batch: int, steps: int, **options):
    """Ours, nn.LSTM in the same type, nn.LSTM in fp64, an input and a state."""
    dtype, precision = TYPES[kind]
    torch.manual_seed(0)
    theirs = nn.LSTM(*sizes, **options).cuda().to(dtype)
    ours = LSTM(*sizes, **options, backend="triton", precision=precision).cuda().to(dtype)
    ours.load_state_dict(theirs.state_dict())
    exact = nn.LSTM(*sizes, **options).cuda().double()
    exact.load_state_dict(theirs.state_dict())
    shape = (batch, steps) if options.get("batch_first") else (steps, batch)
    states = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    x = torch.randn(*shape, sizes[0], device="cuda", dtype=dtype)
    hx = tuple(torch.randn(states, batch, sizes[1], device="cuda", dtype=dtype) for _ in range(2))
    return ours, theirs, exact, x, hx


def assert_as_good_as_nn_lstm(ours, theirs, exact, x, hx, allow_tf32: bool) -> None:
    with torch.backends.cudnn.flags(allow_tf32=allow_tf32):
        got, own = results(ours, x, hx), results(theirs, x, hx)
    want = results(exact, x.double(), tuple(t.double() for t in hx))
    for index, (a, b, c) in enumerate(zip(got, own, want)):
        assert torch.isfinite(a).all(), f"result {index}"
        error, theirs_error = ((one.double() - c).abs() for one in (a, b))
        assert error.max() <= 2 * theirs_error.max(), (
            f"result {index}: {error.max():.2e}, nn.LSTM {theirs_error.max():.2e}"
        )
        assert error.square().mean() <= 4 * theirs_error.square().mean(), f"result {index}: rms"


@triton.jit
def product_kernel(a, b, out, M: tl.constexpr):
    row, k = tl.arange(0, M)[:, None], tl.arange(0, 16)[None, :]
    left, right = tl.load(a + row * 16 + k), tl.load(b + tl.arange(0, 16)[:, None] * 16 + k)
    tl.store(out + row * 16 + k, tl.dot(left, right, input_precision="tf32"))


@pytest.mark.skipif(torch.version.hip is not None, reason="AMD's matrix unit is left as it is")
@pytest.mark.parametrize("rows", [16, 128])  # mma.sync, and wgmma or tcgen05 where there is one
def test_the_matrix_unit_truncates_to_tf32(rows: int) -> None:
    """What `kernels.product.restored` takes for granted, of both factors."""
    one, more = torch.eye(16, device="cuda"), 1 + 2**-10 - 2**-20
    for left, right in ((one * more, one), (one, one * more)):
        out = left.new_empty(rows, 16)
        product_kernel[(1,)](left.repeat(rows // 16, 1), right, out, rows)
        assert out.max() == 1


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_default_plans(kind: str, shape: str) -> None:
    """Outputs and all gradients at most twice as far from fp64 as cuDNN in the same type and TF32 setting."""
    assert_as_good_as_nn_lstm(*build(kind, **SHAPES[shape]), allow_tf32=kind == "tf32")


SMALL = dict(sizes=(32, 272), batch=20, steps=6)
SMALL_KINDS = ("bf16", "tf32")


def small_launches(kind: str, which: str, device: Device) -> list[dict[str, Config]]:
    """By pass: all that the planner could choose for one of them, some of each kind, with the other's default plan."""
    dtype, precision = TYPES[kind]
    hidden_size, name = SMALL["sizes"][1], str(dtype).removeprefix("torch.")
    problem = Problem(which, hidden_size, SMALL["batch"], 1, name, precision or "tf32")
    kinds: dict[tuple, list[Config]] = {}
    for config in candidates(problem, device):
        kinds.setdefault((config.placement, config.protocol, config.resident), []).append(config)
    default = {w: plan(replace(problem, which=w), device).config for w in PASSES}
    some = (configs[:: max(1, len(configs) // 4)] for configs in kinds.values())
    return [default | {which: config} for configs in some for config in configs]


@pytest.mark.parametrize("kind", SMALL_KINDS)
@pytest.mark.parametrize("which", PASSES)
def test_small_launch_of_every_candidate(kind: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Placements, protocols, tiles."""
    modules = build(kind, **SMALL)
    for configs in small_launches(kind, which, device_of(torch.device("cuda"))):
        with monkeypatch.context() as patch:
            noted = use_configs(patch, configs)
            assert_as_good_as_nn_lstm(*modules, allow_tf32=kind == "tf32")
        assert noted == list(configs.items()), "one forward and one backward pass, by these configs"


@pytest.mark.parametrize("hidden_size", [64, 512])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_small_launch_with_nan_and_inf_ends(hidden_size: int, value: float) -> None:
    module = LSTM(16, hidden_size, bidirectional=True, backend="triton").cuda().half()
    x = torch.randn(5, 20, 16, device="cuda", dtype=torch.float16)
    clean = module(x)[0]
    x[2, 3] = value
    x.requires_grad_()
    out, _ = module(x)
    out.sum().backward()
    torch.cuda.synchronize()
    others = torch.arange(20, device="cuda") != 3
    assert torch.equal(out[:, others], clean[:, others])


@pytest.mark.parametrize("hidden_size", [64, 512])
def test_configs_are_compared_in_both_passes(hidden_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also inside of a backward pass, which is autograd's own thread on a device: by a loss on the last state."""
    monkeypatch.setenv("LSTM_TRITON_CHECK", "always")
    made = []
    real = comparison.complaint

    def noted(*arguments) -> str:
        made.append((arguments[0].which, real(*arguments)))
        return made[-1][1]

    monkeypatch.setattr(comparison, "complaint", noted)
    module = LSTM(16, hidden_size, backend="triton").cuda()
    _, (h_n, _) = module(torch.randn(5, 20, 16, device="cuda"))
    before = len(made)
    h_n.sum().backward()
    assert len(made) == before + 1
    assert {found for _, found in made} == {""}


def test_lengths_equal_packing() -> None:
    ours, theirs, _, x, _ = build("bf16", sizes=(64, 512), batch=9, steps=30, bidirectional=True, num_layers=2)
    lengths = torch.tensor([30, 1, 7, 30, 2, 15, 9, 28, 3])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    want, (h_1, c_1) = theirs(packed)
    want, _ = nn.utils.rnn.pad_packed_sequence(want)
    out, (h_2, c_2) = ours(x, lengths=lengths.cuda())
    for a, b in ((out, want), (h_2, h_1), (c_2, c_1)):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_packed_rows_are_padded_rows_in_another_order() -> None:
    """Bit by bit in one layer, whose input's product is exact. A second layer's is not, and which sums cuBLAS makes of a
    row may depend on where it stands: there a few roundings of the type are allowed."""
    lengths = torch.tensor([30, 1, 7, 30, 2, 15, 9, 28, 3])
    for layers in (1, 2):
        ours = LSTM(64, 512, layers, bidirectional=True, backend="triton").cuda().bfloat16()
        x = with_exact_products(ours, 30, 9, 64)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        unpacked, _ = nn.utils.rnn.pad_packed_sequence(ours(packed)[0])
        assert_like([unpacked], [ours(x, lengths=lengths.cuda())[0]], bits=layers == 1)


def test_runs_are_bitwise_equal_and_streams_do_not_disturb_each_other() -> None:
    ours, _, _, x, hx = build("bf16", sizes=(64, 512), batch=16, steps=64)
    x = with_exact_products(ours, *x.shape)
    first = results(ours, x, hx)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(20):
        outs = []
        for stream in streams:
            with torch.cuda.stream(stream), torch.no_grad():
                outs.append(ours(x, hx)[0])
        torch.cuda.synchronize()
        assert all(torch.equal(out, first[0]) for out in outs)
    assert_like(results(ours, x, hx), first)


def test_no_host_synchronisation() -> None:
    ours, _, _, x, hx = build("bf16", sizes=(64, 512), batch=16, steps=8)
    results(ours, x, hx)  # compiles
    lengths = torch.full((16,), 5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(x, hx, lengths=lengths)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_batch_or_length_compiles_anew() -> None:
    """After one call per batch bucket and one of a single step, no B and no T leads to a new binary."""
    from lstm_triton.kernels.backward import lstm_backward_kernel
    from lstm_triton.kernels.forward import lstm_forward_kernel

    module = LSTM(30, 96, backend="triton").cuda().half()
    # A step alone is a launch of its own kind, with the input's product in it, up to 64 rows.
    for steps, batch in ((1, 8), *((3, batch) for batch in (1, 2, 4, 8, 16, 32, 64))):
        module(torch.randn(steps, batch, 30, device="cuda", dtype=torch.float16))[0].sum().backward()

    def binaries() -> int:
        kernels = (lstm_forward_kernel, lstm_backward_kernel)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    before = binaries()
    for steps, batch in ((1, 1), (1, 33), (7, 16), (17, 33), (64, 48), (100, 63), (5, 5)):
        module(torch.randn(steps, batch, 30, device="cuda", dtype=torch.float16))[0].sum().backward()
    assert binaries() == before


def test_what_is_compiled_ahead_is_what_is_launched(tmp_path: Path) -> None:
    """Compiling for this GPU by name fills Triton's cache with the binary that the launch then loads."""
    code = """
import os, pathlib, torch
from lstm_triton.planning.device import device_of
from lstm_triton.kernels.compile import compile_pass
from lstm_triton.kernels.config import Layout
from lstm_triton.kernels.forward import lstm_forward
from lstm_triton.planning.planner import plan
from lstm_triton.planning.problem import Problem
where = torch.device("cuda")
device = device_of(where)
config = plan(Problem("forward", 512, 32, 1, "bfloat16", "tf32"), device).config
compile_pass("forward", config, device.arch, 512, torch.bfloat16, state=False)
gates = torch.randn(32 * 5, 1, 2048, device=where, dtype=torch.bfloat16)
w_hh = torch.randn(1, 2048, 512, device=where, dtype=torch.bfloat16) * 0.04
lstm_forward(gates, w_hh, None, Layout(32, 5, False), config, "tf32", True)
torch.cuda.synchronize()
found = pathlib.Path(os.environ["TRITON_CACHE_DIR"]).glob("*/lstm_forward_kernel.cubin")
print("binaries", len(list(found)))
"""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "binaries 1"


@pytest.mark.parametrize("which", PASSES)
def test_the_search_finds_a_config_that_is_right(which: str, clock_of_configs) -> None:
    """Of the twelve whose estimates are best."""
    device, where = device_of(torch.device("cuda")), torch.device("cuda")
    entry = search(Problem(which, 128, 16, 1, "bfloat16", "tf32"), device, where, op.layer, deadline=12)
    assert entry is not None
    failed = {key: value for key, value in entry.measured.items() if isinstance(value, str)}
    assert not failed, failed
    assert entry.measured[entry.config.encode()] > 0


def test_auto_takes_nn_lstm_where_it_was_faster() -> None:
    device, where = device_of(torch.device("cuda")), torch.device("cuda")
    torch.manual_seed(0)
    theirs = nn.LSTM(128, 128, device=where, dtype=torch.bfloat16)
    ours = LSTM(128, 128, device=where, dtype=torch.bfloat16)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(40, 8, 128, device=where, dtype=torch.bfloat16)
    held = dict(contest.hold(contest.calls_of(128, 8, 1, "bfloat16", device)[0], "tf32", device, where))
    assert len(held) == 4
    for faster, path in ((0.5, "torch"), (2.0, "triton")):
        contests = {bout: Contest(1.0, faster) for bout in held}
        with store.using(replace(store.new_table(device, {}), contests=contests), device):
            assert {layer.path for layer in explain(ours, x).layers} == {path}
            out, _ = ours(x)
            assert torch.equal(out, theirs(x)[0]) or path == "triton"
            out.sum().backward()


def test_the_self_check() -> None:
    assert self_check(torch.device("cuda")).startswith("kernels ran")


def test_auto_takes_the_kernels_and_says_so() -> None:
    module = LSTM(64, 256, 2).cuda().bfloat16()
    x = torch.randn(400, 8, 64, device="cuda", dtype=torch.bfloat16)
    assert all(layer.path == "triton" for layer in explain(module, x).layers)
    assert "float64" in str(explain(module.double(), x.double()))


def test_cell() -> None:
    theirs = nn.LSTMCell(20, 96).cuda()
    ours = LSTMCell(20, 96, backend="triton", precision="ieee").cuda()
    ours.load_state_dict(theirs.state_dict())
    x, h, c = (torch.randn(7, n, device="cuda") for n in (20, 96, 96))
    for a, b in zip(ours(x, (h, c)), theirs(x, (h, c))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


CROWDED = """
import torch
from lstm_triton import LSTM
streams = [torch.cuda.Stream(priority=priority) for priority in (0, -1)]
module = LSTM(64, 1024, backend="triton").cuda().bfloat16()
x = torch.randint(-1, 2, (200, 128, 64), device="cuda").bfloat16()
with torch.no_grad():
    # The input's product is exact: on another stream cuBLAS may make its sums in another order.
    for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
        getattr(module, name).copy_(torch.randint(-2, 3, getattr(module, name).shape) / 16)
    want = module(x)[0]
    torch.cuda.synchronize()
    for _ in range(20):
        outs = []
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(module(x)[0])
    torch.cuda.synchronize()
assert all(torch.equal(out, want) for out in outs)
"""


def test_launches_that_fill_the_device_do_not_starve_each_other() -> None:
    """Two grids that wait, on streams of different priority, neither of which fits beside the other; in a process of
    its own, since a wrong schedule would never end."""
    done = subprocess.run([sys.executable, "-c", CROWDED], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    module = LSTM(16, 256, backend="triton").to("cuda:1")
    x = torch.randn(4, 3, 16, device="cuda:1")
    assert module(x)[0].device.index == 1
