"""The perf suite, as far as it runs without a GPU: rows, checks, ceilings, figures, wrong input."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import check
import figures
import floor
import measure
import plot
import ppo_resets
import providers
import pytest
import rows as rows_module
import sweep
import torch
from rows import Row, RowsError, read_rows, write_rows
from shapes import SETS, Shape, square

from lstm_triton.testing.interpreter import cooperative
from lstm_triton.tuning.clock import Times

ROOT = Path(__file__).parents[2]
PERF = ROOT / "perf"
CPU = torch.device("cpu")
TINY = square("tiny", 8, 2, 3, "float32-ieee")
SWEEP = ["--set", "tiny", "--provider", "nn_lstm", "ours", "per_step", "--mode", "forward", "train", "memory",
         "--repeat", "1", "--out"]  # fmt: skip


pytestmark = pytest.mark.usefixtures("own_precision")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(floor, "MATRIX", {"cpu": 16})


@pytest.mark.parametrize("protocol", ["flags", "mailbox"])
def test_the_floor_kernel_exchanges_every_tile(protocol: str) -> None:
    with cooperative(2):
        sums = floor.exchange(4, 5, protocol, "cpu")
    assert torch.equal(sums, torch.full((4,), floor.expected_sum(4, 5)))


def test_floors_add_up() -> None:
    """By hand: H = 512, B = 16, T = 10, one program at a 100th of the rate, or 32 with a hop of 1 us."""
    shape = square("x", 512, 16, 10, "bfloat16")
    ceilings = floor.Ceilings(1e12, {"bfloat16": 1e14}, 5e-6, {("flags", 32): 1e-6}, 100)
    recurrent = 8 * 16 * 512 * 512
    step = min(recurrent / 1e12, 1e-6 + recurrent / 32e12)
    # Four tiles of rows in two directions go side by side without a hop.
    apart = floor.Ceilings(1e12, {"bfloat16": 1e14}, multiprocessors=100)
    assert apart.step_seconds(replace(shape, batch=64, directions=2)) == pytest.approx(8 * recurrent / (8 * 1e12))
    assert ceilings.step_seconds(shape) == pytest.approx(step)
    product = 2 * 160 * 512 * 2048
    moved = 160 * (512 + 2 * 2048 + 512) * 2
    forward = max(product / 1e14, moved / 1e12) + 10 * step + 5e-6
    assert ceilings.floor_ms(shape, "forward") == pytest.approx(forward * 1e3)
    train = max(4 * product / 1e14, 3 * moved / 1e12) + 20 * step + 10e-6
    assert ceilings.floor_ms(shape, "train") == pytest.approx(train * 1e3)
    assert ceilings.floor_ms(replace(shape, layers=2), "forward") == pytest.approx(2e3 * forward)


LOOPS = ("separate_gates", "combined_gates", "per_step")


@pytest.mark.parametrize("name", ["nn_lstm", "ours", *LOOPS])
def test_providers_agree_with_nn_lstm(name: str) -> None:
    truth = check.Truth(TINY, CPU)
    assert truth.complaint(providers.PROVIDERS[name](truth.base, TINY)) == ""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ours_kernels", "needs a CUDA device"),
        ("ours_autocast", "autocast is for 16-bit types"),
        ("nn_lstm_autocast", "autocast is for 16-bit types"),
        ("flashrnn", "flashrnn is not installed"),
        ("torchrl", "torchrl is not installed"),
    ],
)
def test_providers_say_why_not(name: str, reason: str) -> None:
    with pytest.raises(providers.Unsupported, match=reason):
        providers.PROVIDERS[name](check.Truth(TINY, CPU).base, TINY)


def test_autocast_providers() -> None:
    shape = replace(TINY, dtype="bfloat16")
    truth = check.Truth(shape, CPU)
    for name in ("nn_lstm", "nn_lstm_autocast", "ours", "ours_autocast", "combined_gates"):
        assert truth.complaint(providers.PROVIDERS[name](truth.base, shape)) == ""


@pytest.mark.parametrize("kind", ["separate", "combined", "hoisted"])
def test_a_wrong_provider_is_caught(kind: str) -> None:
    """One weight off by a thousandth: further than twice nn.LSTM's own error."""
    truth = check.Truth(TINY, CPU)
    module = providers.Loop(truth.base, TINY, kind, compiled=False)
    with torch.no_grad():
        next(module.parameters()).flatten()[0] += 1e-3
    assert truth.complaint(module).startswith("wrong output: relative rms error")


def test_loops_refuse_what_they_do_not_do() -> None:
    shape = replace(TINY, layers=2)
    truth = check.Truth(shape, CPU)
    with pytest.raises(providers.Unsupported, match="one layer in one direction"):
        providers.combined_gates(truth.base, shape)


def test_a_sweep_writes_rows_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "deep" / "rows.csv"
    assert sweep.main([*SWEEP, str(out)]) == 0
    first = read_rows(out)
    measured = [row for row in first if row.provider != "ceiling"]
    assert len(measured) == 2 * 3 * 3
    assert not [row.error for row in measured if row.error]
    assert all(float(row.value) > 0 and row.commit and row.torch == torch.__version__ for row in measured)
    assert all(bool(row.floor) == (row.mode != "memory") for row in measured)
    assert "floor/measured" in capsys.readouterr().out
    assert sweep.main([*SWEEP, str(out), "--resume"]) == 0
    assert read_rows(out) == first
    assert "nothing is left to measure" in capsys.readouterr().out


def test_an_interrupted_sweep_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    real, calls = sweep.rows_for, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sweep, "rows_for", interrupted)
    out = tmp_path / "rows.csv"
    assert sweep.main([*SWEEP, str(out)]) == 130
    kept = read_rows(out)
    assert {row.provider for row in kept} == {"ceiling", "nn_lstm", "ours"}
    assert "--resume goes on" in capsys.readouterr().err
    assert sweep.main([*SWEEP, str(out), "--resume"]) == 0
    again = read_rows(out)
    assert [row for row in again if row in kept and row.provider != "ceiling"] == [
        row for row in kept if row.provider != "ceiling"
    ]
    assert len(calls) == 3 + 4


def test_an_error_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(base, shape):
        raise RuntimeError("no luck\nwith details")

    monkeypatch.setitem(providers.PROVIDERS, "per_step", broken)
    out = tmp_path / "rows.csv"
    assert sweep.main([*SWEEP, str(out)]) == 0
    failed = [row for row in read_rows(out) if row.error]
    assert {(row.provider, row.error, row.value) for row in failed} == {("per_step", "RuntimeError: no luck", "")}
    assert len(failed) == 6
    monkeypatch.setitem(providers.PROVIDERS, "per_step", providers.per_step)
    assert sweep.main([*SWEEP, str(out), "--resume"]) == 0, "an error is tried again"
    assert not [row for row in read_rows(out) if row.error]
    assert len({row.key() for row in read_rows(out)}) == len(read_rows(out))


def test_a_mode_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments):
        raise RuntimeError("no process")

    monkeypatch.setattr(sweep, "cold_ms", broken)
    out = tmp_path / "rows.csv"
    assert sweep.main([*SWEEP[:-1], "--mode", "forward", "cold", "--out", str(out)]) == 0
    errors = {(row.mode, row.error) for row in read_rows(out) if row.provider != "ceiling"}
    assert errors == {("forward", ""), ("cold", "RuntimeError: no process")}


def test_rows_of_another_machine_are_not_continued(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "rows.csv"
    write_rows(out, [replace(good_rows()[0], device="NVIDIA H200")])
    before = out.read_text()
    assert sweep.main([*SWEEP, str(out), "--resume"]) == 2
    assert "has rows of NVIDIA H200, this is" in capsys.readouterr().err
    assert out.read_text() == before


def test_the_commit_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert rows_module.commit_here() == "unknown"
    monkeypatch.setenv("LSTM_TRITON_COMMIT", "abc")
    assert rows_module.provenance(CPU)["commit"] == "abc"


@pytest.mark.parametrize("scale", [0.0, 7.0])
def test_wrong_weight_gradients_are_caught(scale: float) -> None:
    """Output and input gradient are right, the weights' gradients missing or wrong."""
    truth = check.Truth(TINY, CPU)
    module = providers.per_step(truth.base, TINY)
    module.w_hh.register_hook(lambda gradient: gradient * scale)
    assert truth.complaint(module).startswith("wrong weight gradients: their norm is off by")


def test_a_provider_that_fails_the_check_gets_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(base, shape):
        module = providers.Loop(base, shape, "hoisted", False)
        with torch.no_grad():
            module.bias.add_(1e-3)
        return module

    monkeypatch.setitem(providers.PROVIDERS, "per_step", wrong)
    out = tmp_path / "rows.csv"
    assert sweep.main([*SWEEP, str(out)]) == 0
    for row in read_rows(out):
        assert (row.provider == "per_step") == bool(row.error)
        assert row.provider != "per_step" or (row.error.startswith("wrong output") and not row.value)


@pytest.mark.parametrize(
    "arguments",
    [["--set", "nowhere"], ["--provider", "magic"], ["--mode", "warp"], ["--repeat", "0"], ["--threads", "0"]],
)
def test_unknown_names_end_with_2(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        sweep.main([*arguments, "--out", str(tmp_path / "rows.csv")])
    assert ended.value.code == 2
    assert not any(tmp_path.iterdir())


def good_rows() -> list[Row]:
    return [replace(sweep.blank(TINY, "nn_lstm", "forward", "ms"), value="1.5")]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda text: text[:-20], "truncated"),
        (lambda text: text[:-20] + "\n", "of 27 cells"),
        (lambda text: "a,b\n1,2\n", "not a table of measurements"),
        (lambda text: "", "not a table of measurements"),
        (lambda text: text.replace("1.5", "fast"), "could not convert"),
        (lambda text: text.replace("1.5", "nan"), "either a value or an error"),
        (lambda text: text.replace("1.5", ""), "either a value or an error"),
        (lambda text: text.replace("1.5", "inf"), "either a value or an error"),
        (lambda text: text.replace("tiny,,8,8,2,3", "tiny,,8,8,2,0"), "sizes of at least 1"),
    ],
)
def test_spoilt_rows_are_refused_and_left_alone(spoil, complaint: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, good_rows())
    assert read_rows(path) == good_rows()
    spoilt = spoil(path.read_text())
    path.write_text(spoilt)
    with pytest.raises(RowsError, match=complaint):
        read_rows(path)
    for command in (lambda: sweep.main([*SWEEP, str(path), "--resume"]), lambda: plot.main(["--rows", str(path)])):
        assert command() == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert error.count("\n") == 1
    assert path.read_text() == spoilt
    assert list(tmp_path.iterdir()) == [path]


def test_rows_from_before_a_column_was_added(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    found = good_rows()
    write_rows(path, found)
    header, line = path.read_text().splitlines()
    assert header.count(",host_bound,floor") == 1
    path.write_text("\n".join((header.replace(",host_bound", ""), line.replace(",1.5,,,,,", ",1.5,,,,"))) + "\n")
    assert read_rows(path) == found
    path.write_text(header.replace(",host_bound", ""))
    with pytest.raises(RowsError, match="truncated"):
        read_rows(path)
    write_rows(path, [replace(found[0], host_bound="perhaps")])
    with pytest.raises(RowsError, match="host_bound is yes or nothing, not 'perhaps'"):
        read_rows(path)


def test_a_row_says_that_its_time_is_the_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    times = Times(1.0, 2.0, 3.0, 1, host_bound=True)
    monkeypatch.setattr(measure, "times_of", lambda *_, **__: times)
    out = tmp_path / "rows.csv"
    assert sweep.main([*SWEEP, str(out)]) == 0
    found = {(row.provider == "ceiling", row.mode, row.host_bound) for row in read_rows(out)}
    assert found == {(True, "", ""), (False, "forward", "yes"), (False, "train", "yes"), (False, "memory", "")}
    assert "(1 to 3)  host-bound  floor/measured" in capsys.readouterr().out


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("mine\n")
    assert sweep.main([*SWEEP, str(path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert path.read_text() == "mine\n"
    for command in (lambda out: sweep.main([*SWEEP, out]), lambda out: floor.main(["--out", out])):
        assert command(str(path / "below" / "rows.csv")) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert plot.main(["--rows", str(tmp_path / "none.csv")]) == 2


def test_ceilings_alone(tmp_path: Path) -> None:
    out = tmp_path / "floor.csv"
    assert floor.main(["--out", str(out)]) == 0
    assert floor.main(["--out", str(out)]) == 2, "nothing is overwritten"
    assert [row.metric for row in read_rows(out)] == ["GB/s", "TFLOP/s"]
    assert plot.main(["--rows", str(out)]) == 2, "ceilings alone draw nothing"


def invented_rows() -> list[Row]:
    """Rows as a GPU would give them: every region and provider, a loss, an error. No measurement."""
    found = [
        replace(good_rows()[0], provider="ceiling", label=label, dtype=dtype, mode="", metric=metric, value="100")
        for label, dtype, metric in (("copy", "", "GB/s"), ("product 8192", "bfloat16", "TFLOP/s"))
    ]
    names = ("small", "home", "open", "users", "scaling", "scratch")
    for index, shape in enumerate(shape for name in names for shape in SETS[name]):
        for step, provider in enumerate(figures.STYLES):
            for mode, metric in (
                ("forward", "ms"),
                ("train", "ms"),
                ("step", "ms"),
                ("cold", "ms"),
                ("memory", "peak_mib"),
            ):
                row = sweep.blank(shape, provider, mode, metric)
                if (index + step) % 11 == 5:
                    found.append(replace(row, error="out of memory"))
                else:
                    value = f"{1 + (index * 7 + step * 3) % 10:g}"
                    found.append(replace(row, value=value, p20=value, p80=value, floor="0.5"))
    return [replace(row, device="a GPU that is none", torch="0", triton="0", date="never") for row in found]


def test_every_figure_can_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, invented_rows())
    assert plot.main(["--rows", str(path), "--out", str(tmp_path / "out")]) == 0
    drawn = {file.stem for file in (tmp_path / "out").glob("*.png")}
    assert drawn == set(figures.figures(invented_rows()))
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "| home | lstm_triton | training step |" in text


def test_the_summary_counts_losses_and_errors() -> None:
    shapes = [square("home", h, 8, 256, "float16") for h in (256, 512, 768)]
    found = []
    for shape, ms in zip(shapes, ("1", "4", "")):
        found.append(replace(sweep.blank(shape, "nn_lstm", "train", "ms"), value="2", floor="0.5"))
        row = sweep.blank(shape, "ours", "train", "ms")
        found.append(replace(row, value=ms, floor="0.5") if ms else replace(row, error="wrong output"))
    line = plot.summary(found).splitlines()[-1]
    # 2 / 1 and 2 / 4: the mean is 1, one loss, one error; the floor's share is sqrt(0.5 * 0.125).
    assert line == "| home | lstm_triton | training step | 2 | 1.00 | 0.50 | 2.00 | 1 | 0.25 | 1 |"


def test_recorded_figures_are_redrawn_from_recorded_rows(tmp_path: Path) -> None:
    """Every committed figure and summary comes from the rows committed next to it."""
    folders = [folder for folder in sorted((PERF / "results").iterdir()) if folder.is_dir()]
    assert folders
    for folder in folders:
        found = [row for file in sorted(folder.glob("*.csv")) for row in read_rows(file)]
        plot.draw(found, tmp_path / folder.name)
        committed = {path.name for path in folder.iterdir() if path.suffix in (".png", ".md")}
        assert {path.name for path in (tmp_path / folder.name).iterdir()} == committed
        assert (tmp_path / folder.name / "summary.md").read_text() == (folder / "summary.md").read_text()


PPO = ["--steps", "6", "--batch", "4", "--hidden-size", "8", "--input-size", "5", "--dtype", "float32-ieee",
       "--repeat", "1", "--density", "0", "0.1", "1"]  # fmt: skip


@pytest.mark.parametrize(("backend", "path"), [("auto", "step by step in plain PyTorch"), ("triton", "the kernels")])
@pytest.mark.filterwarnings("error", "ignore:Conversion of an array with ndim")  # Triton 3.6's interpreter
def test_resets_are_timed_against_segments(backend: str, path: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(ppo_resets, "device_here", lambda: CPU)
    monkeypatch.setattr(ppo_resets, "LSTM", partial(ppo_resets.LSTM, backend=backend))
    assert ppo_resets.main(PPO) == 0
    sizes, ours, header, *lines = capsys.readouterr().out.splitlines()
    assert sizes.startswith("T=6 B=4 I=5 H=8 float32-ieee")
    assert ours.startswith(f"ours: {path}")
    assert header.split()[:2] == ["density", "segments"]
    table = [[float(cell) for cell in line.partition("(")[0].split()] for line in lines]
    assert [row[0] for row in table] == [0, 0.1, 1]
    assert table[0][1] == 1
    assert 1 < table[1][1] < table[2][1] == 6
    assert all(ms > 0 for row in table for ms in row[2:4])


def test_wrong_resets_get_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def wrong(lstm, rollout):
        return lstm(rollout.x, rollout.state, reset=rollout.done.roll(1, dims=0))[0]

    monkeypatch.setattr(ppo_resets, "device_here", lambda: CPU)
    monkeypatch.setattr(ppo_resets, "in_one_call", wrong)
    assert ppo_resets.main(PPO) == 1
    complaints = ["wrong out: rms error" in line for line in capsys.readouterr().out.splitlines()[3:]]
    assert complaints == [False, True, False], "a shift changes nothing where no row or every row is marked"


@pytest.mark.parametrize("arguments", [["--density", "1.5"], ["--density", "often"], ["--steps", "0"]])
def test_resets_refuse_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ppo_resets.main(arguments)
    assert ended.value.code == 2


# What that process's clock says: seconds, 1 for each of these modules that is imported by now.
CLOCK = "import sys, time\ntime.perf_counter = lambda: len({'torch', 'providers', 'lstm_triton'} & set(sys.modules))\n"


def test_cold_start_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from measure import cold_ms

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    with monkeypatch.context() as patched:
        patched.setenv("PYTHONPATH", str(tmp_path))
        assert cold_ms(TINY, "ours", CPU) == 3000, "the time of all imports is in it"
    assert cold_ms(TINY, "ours", CPU) > 0
    with pytest.raises(RuntimeError, match="Unsupported: needs a CUDA device"):
        cold_ms(TINY, "ours_kernels", CPU)


def test_shapes_are_of_the_region_they_stand_in() -> None:
    """By what PyTorch asks cuDNN for in training on an H100."""
    from lstm_triton.planning.cudnn import Call, algorithm
    from lstm_triton.planning.device import KNOWN

    def of(shape: Shape) -> str:
        sizes = (shape.input_size, shape.hidden_size, shape.batch, shape.layers, shape.directions, shape.torch_dtype)
        return algorithm(Call(*sizes), KNOWN["sm_90"], "forward").name

    for name, wanted in (("small", "persistent-small"), ("home", "persistent"), ("open", "standard")):
        assert {of(shape) for shape in SETS[name]} == {wanted}
    assert rows_module.COLUMNS[-1] == "date"
