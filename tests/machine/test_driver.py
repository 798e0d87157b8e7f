"""The library on CPU tensors, through the machine: its public surface, unchanged, and what a wrong use says."""

from __future__ import annotations

import pytest
import torch
from engines import Engine
from layers import Case, run_recurrence
from planted import plant_everywhere
from torch import nn

from lstm_triton import LSTM, LSTMCell, explain, functional
from lstm_triton.kernels.config import Config
from lstm_triton.kernels.launch import LaunchRefused

from .driver import Machine, _packed, running
from .faults import Deadlock, MachineError

pytestmark = pytest.mark.machine

GRID = Config("grid", "mailbox", True, False, 1, 16, 16, 32, 4)


@pytest.mark.every_target
def test_modules_work_unchanged(engine: Engine) -> None:
    """Two layers, two directions, packed and padded, forward and backward, against nn.LSTM."""
    theirs = nn.LSTM(6, 24, num_layers=2, bidirectional=True).half()
    ours = LSTM(6, 24, num_layers=2, bidirectional=True, backend="triton").half()
    ours.load_state_dict(theirs.state_dict())
    x, lengths = torch.randn(5, 3, 6).half(), torch.tensor([5, 1, 3])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    with engine() as machine:
        out, (h_n, c_n) = ours(packed)
        padded, _ = ours(x, lengths=lengths)
        out.data.float().square().sum().backward()
    assert {"lstm_forward_kernel", "lstm_backward_kernel"} <= set(machine.launches)
    want, (h, c) = theirs(packed)
    want.data.float().square().sum().backward()
    for a, b in ((out.data, want.data), (h_n, h), (c_n, c)):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3)
    assert torch.equal(nn.utils.rnn.pad_packed_sequence(out)[0], padded)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=3e-2, atol=1e-2)


def test_functions_cells_and_ensembles(engine: Engine) -> None:
    """functional.lstm, a step of LSTMCell with masked rows, and four members by vmap in one launch."""
    module = LSTM(4, 16, backend="triton", precision="ieee")
    x = torch.randn(3, 2, 4)
    cell, plain = LSTMCell(4, 16, backend="triton", precision="ieee"), nn.LSTMCell(4, 16)
    plain.load_state_dict(cell.state_dict())
    members = [LSTM(4, 16, backend="triton", precision="ieee") for _ in range(4)]
    parameters, _ = torch.func.stack_module_state(members)
    with engine() as machine:
        out, *_ = functional.lstm(x, None, list(module.parameters()), backend="triton", precision="ieee")
        torch.testing.assert_close(out, nn.LSTM.forward(module_like(module), x)[0], rtol=1e-5, atol=1e-5)
        h, c = cell(x[0], active=torch.tensor([True, False]))
        before = len(machine.launches)
        outs, _ = torch.func.vmap(lambda p: torch.func.functional_call(members[0], p, (x,)))(parameters)
        assert machine.launches[before:] == ["lstm_forward_kernel"]
        torch.testing.assert_close(outs, torch.stack([member(x)[0] for member in members]))
    for ours, theirs in zip((h, c), plain(x[0])):
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
        assert not ours[1].any()


def module_like(module: LSTM) -> nn.LSTM:
    plain = nn.LSTM(module.input_size, module.hidden_size)
    plain.load_state_dict(module.state_dict())
    return plain


@pytest.mark.every_target
def test_the_library_knows_what_it_runs_on(engine: Engine) -> None:
    module, x = LSTM(4, 256, backend="triton").bfloat16(), torch.randn(2, 3, 4, dtype=torch.bfloat16)
    with engine():
        text = str(explain(module, x))
    assert "triton" in text
    assert "grid" in text, "256 units are shared by several programs on every target"
    with pytest.raises(RuntimeError, match="the tensors are on cpu"):
        module(x)


@pytest.mark.every_target
def test_batch_invariance(engine: Engine) -> None:
    """A row has the same bits in any company; runs with other schedules have them too."""
    module = LSTM(5, 20, bidirectional=True, backend="triton", batch_invariant=True).half()
    x = torch.randn(3, 18, 5).half()
    found = []
    for seed, rows in enumerate((range(18), [17], [2, 17, 1])):
        own = x[:, list(rows)].requires_grad_()
        with engine(seed):
            out, _ = module(own)
            out.float().sum().backward()
        at = list(rows).index(17)
        found.append((out.detach()[:, at], own.grad[:, at]))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others))


def test_a_call_with_an_unaligned_pointer(engine: Engine) -> None:
    """A view that starts in the middle of a 16-byte word takes the same path, or a copy."""
    storage = torch.randn(2 * 3 * 5 + 1)
    module = LSTM(5, 20, backend="triton", precision="ieee")
    with engine():
        found = module(storage[1:].view(2, 3, 5))[0]
        assert torch.equal(found, module(storage[1:].clone().view(2, 3, 5))[0])


def test_batch_sizes_and_lengths_share_a_binary(engine: Engine) -> None:
    """As `test_no_batch_or_length_compiles_anew` of the GPU: both passes, odd sizes, and steps alone after one of them."""
    from lstm_triton.kernels.backward import lstm_backward_kernel
    from lstm_triton.kernels.forward import lstm_forward_kernel

    module = LSTM(5, 20, backend="triton").half()

    def call(steps: int, batch: int) -> int:
        """Runs both passes; the number of binaries by then."""
        module(torch.randn(steps, batch, 5).half())[0].sum().backward()
        kernels = (lstm_forward_kernel, lstm_backward_kernel)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    with engine() as machine:
        before = [call(2, 3), call(2, 9), call(1, 4)][-1]
        launched = len(machine.launches)
        for steps, batch in ((2, 1), (3, 8), (5, 13), (4, 16), (1, 1), (1, 7)):
            assert call(steps, batch) == before, f"T={steps}, B={batch}"
    assert machine.launches[launched:].count("lstm_backward_kernel") == 6


def test_a_launch_that_does_not_fit() -> None:
    """Three programs that wait for each other, on a device of one multiprocessor that holds two."""
    with running(Machine("sm_80", multiprocessors=1)), pytest.raises(LaunchRefused, match="of which only 2 fit"):
        run_recurrence(Case(hidden_size=40), GRID)


def test_programs_that_wait_need_a_cooperative_launch(tmp_path) -> None:
    cooperative = 'options["launch_cooperative_grid"] = True'
    planted = plant_everywhere(tmp_path, "launch", (cooperative, "pass"))
    with running(Machine("sm_80")), pytest.raises(Deadlock, match=r"not cooperative[\s\S]*waits at ld.volatile"):
        run_recurrence(Case(hidden_size=40), GRID, planted["forward"].lstm_forward, planted["backward"].lstm_backward)


@pytest.mark.parametrize("target", ["sm_70", "sm_100", "gfx942", ""])
def test_a_target_that_it_does_not_know(target: str) -> None:
    with pytest.raises(MachineError, match="the machine stands for sm_80, "):
        Machine(target)


def test_arguments_of_a_wrong_kind() -> None:
    from lstm_triton.kernels.masks import sequence_mask_kernel

    mask, seed = torch.empty(1, 2, 8), torch.tensor([3])

    def launch(**changes) -> None:
        given = dict(seed=seed, mask=mask, batch=2, threshold=5, N=8, KIND=1, ORDER="forward", BLOCK=256) | changes
        sequence_mask_kernel[2, 1, 1](**given)

    with running(Machine("sm_90")):
        launch()
        assert mask.isfinite().all()
        with pytest.raises(MachineError, match="mask should be a tensor on the CPU, got: meta"):
            launch(mask=mask.to("meta"))
    with pytest.raises(MachineError, match="x should be a tensor on the CPU, got: int"):
        _packed({"x": "u64"}, [("x", "*fp32", 3)])
    with pytest.raises(MachineError, match="n of type i32 goes into a parameter of type u64"):
        _packed({"n": "u64"}, [("n", "i32", 3)])
    with pytest.raises(MachineError, match="takes 1 parameters, the launch has 2"):
        _packed({"n": "u32"}, [("n", "i32", 3)] * 2)
