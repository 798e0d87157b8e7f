"""Two processes train as one does: DDP, FSDP2 and the recipe, over gloo on the CPU."""

from __future__ import annotations

import datetime
import gc
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from processes import FOREVER, side_by_side
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lstm_triton import LSTM
from lstm_triton.recipes import distributed

STEPS, BATCH, STEPS_OF_TIME, RANKS = 3, 4, 3, 2
WRAPPERS = {"ddp": {}, "ddp-static-graph": dict(static_graph=True), "ddp-unused": dict(find_unused_parameters=True)}
MARKS = {
    "plain": {},
    "marks": dict(
        lengths=torch.tensor([3, 1, 2, 3]),
        reset=torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.bool),
    ),
}
CASES = [
    ("ddp", "plain"),
    ("ddp", "marks"),
    ("ddp-static-graph", "plain"),
    ("ddp-unused", "marks"),
    ("fsdp", "plain"),
    ("fsdp", "marks"),
]


class Model(nn.Module):
    """Both ways through a layer's weights: stacked for two directions, a view of the parameter for one."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(7, 3)
        self.lstm = LSTM(3, 4, 2, bidirectional=True, backend=backend, dtype=torch.float64)
        self.top = LSTM(8, 4, backend=backend, dtype=torch.float64)
        self.head = nn.Linear(4, 2)
        self.double()

    def forward(self, codes: Tensor, **marks: Tensor) -> Tensor:
        out, _ = self.lstm(self.embedding(codes), **marks)
        return self.head(self.top(out, **marks)[0])


class Outcome(NamedTuple):
    losses: list[float]
    state: dict[str, Tensor]
    lstm: dict[str, Tensor]


def rows(marks: dict[str, Tensor], rank: int | None) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Codes and targets of every step, and the marks: one rank's rows of the batch, or all of them."""
    mine = slice(None) if rank is None else slice(rank, None, RANKS)
    generator = torch.Generator().manual_seed(9)
    codes = [torch.randint(7, (STEPS_OF_TIME, BATCH), generator=generator)[:, mine] for _ in range(STEPS)]
    targets = [torch.randint(2, (STEPS_OF_TIME, BATCH), generator=generator)[:, mine] for _ in range(STEPS)]
    return codes, targets, {name: mark[..., mine].contiguous() for name, mark in marks.items()}


def train(model: nn.Module, marks: dict[str, Tensor], rank: int | None) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    codes, targets, marks = rows(marks, rank)
    losses = []
    for step in range(STEPS):
        loss = F.cross_entropy(model(codes[step], **marks).flatten(0, 1), targets[step].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach()
        if rank is not None:
            dist.all_reduce(mean)
            mean /= RANKS
        losses.append(float(mean))
    return losses


def by_ddp(backend: str, marks: dict[str, Tensor], rank: int, options: dict) -> Outcome:
    model = Model(backend)
    losses = train(DistributedDataParallel(model, **options), marks, rank)
    return Outcome(losses, model.state_dict(), model.lstm.state_dict())


def by_fsdp(backend: str, marks: dict[str, Tensor], rank: int) -> Outcome:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, mesh = Model(backend), init_device_mesh("cpu", (RANKS,))
    fully_shard(model.lstm, mesh=mesh)
    fully_shard(model, mesh=mesh)
    calls = []

    def see_whole_weights(module: nn.Module, _) -> None:
        names = module._flat_weights_names
        for weight, name in zip(module._flat_weights, names, strict=True):
            assert weight is getattr(module, name), name
            assert not isinstance(weight, DTensor), name
        calls.append(module)

    for module in (model.lstm, model.top):
        module.register_forward_pre_hook(see_whole_weights)
    losses = train(model, marks, rank)
    assert len(calls) == 2 * STEPS
    assert all(isinstance(parameter.grad, DTensor) for parameter in model.parameters())
    whole = [{name: shard.full_tensor() for name, shard in m.state_dict().items()} for m in (model, model.lstm)]
    return Outcome(losses, *whole)


def main(rank: int, backend: str, folder: Path) -> None:
    """One of two processes: all cases, the outcomes to a file."""
    from lstm_triton.testing import interpreter

    torch.set_num_threads(1)
    interpreter.patch_language_once()
    forever = datetime.timedelta(seconds=FOREVER)
    store = dist.FileStore(str(folder / "rendezvous"), RANKS)
    store.set_timeout(forever)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=forever)
    warnings.simplefilter("error")
    # Of in-place changes of views, which the outputs of nn.Linear and of our operator are: we make none.
    warnings.filterwarnings("ignore", message="Conversion of an array with ndim")  # Triton 3.6's interpreter
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    found = {}
    for name, kind in CASES:
        marks = MARKS[kind]
        outcome = by_fsdp(backend, marks, rank) if name == "fsdp" else by_ddp(backend, marks, rank, WRAPPERS[name])
        found[name, kind] = tuple(outcome)
    torch.save(found, folder / f"{rank}.pt")
    gc.collect()  # see recipes/distributed.py
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=["auto", "triton"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict]]:
    """The backend, and of each of two processes the outcomes of all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    side_by_side([[sys.executable, __file__, str(rank), request.param, str(folder)] for rank in range(RANKS)])
    return request.param, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("kind", MARKS)
def test_two_processes_train_as_one(ranks: tuple[str, list[dict]], kind: str) -> None:
    backend, found = ranks
    model, before = Model(backend), Model(backend).state_dict()
    losses = train(model, MARKS[kind], None)
    assert all((tensor != before[name]).any() for name, tensor in model.state_dict().items())
    for case in (case for case in CASES if case[1] == kind):
        for outcome in (Outcome(*each[case]) for each in found):
            torch.testing.assert_close(outcome.losses, losses, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(outcome.state, dict(model.state_dict()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_their_state_dict_loads_into_plain_lstms(ranks: tuple[str, list[dict]], name: str) -> None:
    backend, found = ranks
    outcome = Outcome(*found[0][name, "plain"])
    model, theirs = Model(backend), nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    model.load_state_dict(outcome.state)
    theirs.load_state_dict(outcome.lstm)
    x = torch.randn(STEPS_OF_TIME, BATCH, 3, dtype=torch.float64)
    torch.testing.assert_close(model.lstm(x)[0], theirs(x)[0])


SMALL = ["--steps", "4", "--evaluations", "2", "--batch", "4", "--seq-len", "3", "--hidden-size", "5", "--layers", "2"]
RECIPE = "lstm_triton.recipes.distributed"
# The port is the system's choice; no wait has an end, and no process counts as lost because it was slow.
RENDEZVOUS = ",".join(f"{key}={FOREVER}" for key in ("read_timeout", "join_timeout", "keep_alive_max_attempt"))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_the_recipe_on_two_processes_and_on_one(tmp_path: Path, backend: str, capsys) -> None:
    """By torchrun: the loss of one process, printed once, and a checkpoint that nn.LSTM takes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--rdzv-conf", RENDEZVOUS]
    torchrun += ["--nproc-per-node", "2", "-m", RECIPE]
    options = [*SMALL, "--backend", backend, "--device", "cpu", "--quiet", "--out"]
    (printed,) = side_by_side([[*torchrun, *options, str(tmp_path / "two")]])
    assert printed.startswith("2 x cpu, validation loss ")
    assert printed.count("\n") == 2
    assert distributed.main([*options, str(tmp_path / "one")]) == 0
    assert capsys.readouterr().out.startswith("1 x cpu, validation loss ")
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["best.pt"]
    two, one = (torch.load(tmp_path / name / "best.pt", weights_only=True) for name in ("two", "one"))
    assert two["step"] == one["step"]
    torch.testing.assert_close(two["valid_loss"], one["valid_loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-4, atol=1e-5)
    distributed.Adder(**two["sizes"]).load_state_dict(two["model"])
    of_lstm = {name.removeprefix("lstm."): tensor for name, tensor in two["model"].items() if "lstm." in name}
    nn.LSTM(2, 5, 2).load_state_dict(of_lstm)


def test_the_recipe_learns(tmp_path: Path, capsys) -> None:
    """Better than always answering 1, and from the seed alone."""
    options = ["--steps", "250", "--batch", "32", "--seq-len", "4", "--hidden-size", "16", "--learning-rate", "0.02"]
    assert distributed.main([*options, "--device", "cpu", "--evaluations", "1", "--quiet", "--out", str(tmp_path)]) == 0
    assert torch.load(tmp_path / "best.pt", weights_only=True)["valid_loss"] < distributed.BASELINE / 4
    _, _, answers = distributed.draw(1, 10_000, 20, distributed.Place(), torch.device("cpu"))
    assert abs(float(answers.var()) - distributed.BASELINE) < 0.01


def test_ranks_share_out_a_batch() -> None:
    cpu = torch.device("cpu")
    x, lengths, answers = distributed.draw(3, 4, 6, distributed.Place(), cpu)
    for rank in (0, 1):
        mine = distributed.draw(3, 4, 6, distributed.Place(rank, rank, 2), cpu)
        for part, whole in zip(mine, (x[:, rank::2], lengths[rank::2], answers[rank::2])):
            assert torch.equal(part, whole)
    marks = x[:, :, 1]
    assert (marks.sum(0) == 2).all()
    assert (marks * (torch.arange(6).unsqueeze(1) >= lengths) == 0).all()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--seq-len", "1"],
        ["--clip", "nan"],
        ["--layers", "two"],
        ["--seed", "-1"],
        ["--device", "meta"],
        ["--batch", "5"],
        ["--what"],
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_wrong_options_are_one_line_of_rank_0_and_status_2(arguments, rank: int, monkeypatch, capsys) -> None:
    for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as end:
        distributed.main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == (rank == 0)
    assert rank or (error.startswith("distributed: ") and arguments[0] in error)


def test_what_cannot_be_written_is_one_line_and_status_2(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert distributed.main([*SMALL, "--device", "cpu", "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("distributed: ")
    assert error.count("\n") == 1


def test_divergence_is_one_line_and_status_1(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(distributed.F, "mse_loss", lambda answers, _: answers.sum() * float("nan"))
    assert distributed.main([*SMALL, "--device", "cpu", "--quiet", "--out", str(tmp_path)]) == 1
    assert "the loss is nan at step 1; try a lower --learning-rate" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
