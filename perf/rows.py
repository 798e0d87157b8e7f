"""Rows, provenance and whole files, shared by the scripts of this folder."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import triton

from lstm_triton.commands.doctor import driver_version
from lstm_triton.tuning.clock import Times


@dataclass(frozen=True)
class Row:
    """One measurement, or why there is none.

    region .. dtype: the shape. mode: "forward" (no gradients), "train" (forward, backward, all
    gradients), "step" (T = 1, no gradients, until the result is there), "cold" (a fresh process until the
    first result). metric: "ms", "peak_mib" (device memory beyond weights and input), "saved_mib" (kept
    for backward), or a ceiling's own. value: the median; p20, p80: percentiles; empty where error is not.
    host_bound: "yes" where the GPU waited for the host (`lstm_triton/tuning/clock.py`), so that the time is the host's.
    """

    region: str
    label: str
    input_size: str
    hidden_size: str
    batch: str
    seq_len: str
    layers: str
    directions: str
    dtype: str
    provider: str
    mode: str
    metric: str
    value: str
    p20: str = ""
    p80: str = ""
    repeat: str = ""
    host_bound: str = ""
    floor: str = ""
    config: str = ""
    error: str = ""
    device: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    cudnn: str = ""
    commit: str = ""
    date: str = ""

    def key(self) -> tuple[str, ...]:
        """What was measured, without the result."""
        return tuple(getattr(self, name) for name in COLUMNS[: COLUMNS.index("value")])


SIZES = ("input_size", "hidden_size", "batch", "seq_len", "layers", "directions")
COLUMNS = [field.name for field in fields(Row)]
ADDED = "host_bound"  # a column that files of before do not have


class RowsError(ValueError):
    """A file that is no table of rows, with what is wrong."""


def needs_gpu() -> bool:
    """Whether there is no CUDA device; says so on stderr."""
    if torch.cuda.is_available():
        return False
    print("this script measures on a CUDA device, and there is none", file=sys.stderr)
    return True


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = "CPU"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    threads = torch.get_num_threads()
    return f"{model or platform.machine()}, {threads} thread{'s' * (threads > 1)}"


def provenance(device: torch.device) -> dict[str, str]:
    """Where and with what a row was measured."""
    return {
        "device": device_name(device),
        "driver": driver_version() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version() or ""),
        "commit": os.environ.get("LSTM_TRITON_COMMIT") or commit_here(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def commit_here() -> str:
    """Of the checkout that this file is in."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def start(path: Path, resume: bool = False) -> list[Row]:
    """The rows to go on from, none for a new file; OSError and RowsError are for the user. Nothing is overwritten."""
    if path.exists():
        if not resume:
            raise FileExistsError(f"{path} is there already" + (": --resume goes on with it" if path.is_file() else ""))
        return read_rows(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, [])
    return []


def read_rows(path: Path) -> list[Row]:
    """All rows of a file; RowsError says what is wrong with a truncated or foreign one."""
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise RowsError(f"{path}: not text: {error}") from None
    reader = csv.reader(text.splitlines())
    header = next(reader, None)
    columns = COLUMNS if header is not None and ADDED in header else [name for name in COLUMNS if name != ADDED]
    if header != columns:
        raise RowsError(f"{path}: not a table of measurements, its first line is {','.join(header or [])[:80]!r}")
    if not text.endswith("\n"):
        raise RowsError(f"{path}: truncated, its last line does not end")
    rows = []
    for number, cells in enumerate(reader, start=2):
        if len(cells) != len(columns):
            raise RowsError(f"{path}: line {number} has {len(cells)} of {len(columns)} cells")
        row = Row(**dict(zip(columns, cells)))
        try:
            numbers = [float(cell) for cell in (row.value, row.p20, row.p80, row.floor) if cell]
            numbers += [int(cell) - 0.5 for cell in (getattr(row, name) for name in SIZES) if cell]
        except ValueError as error:
            raise RowsError(f"{path}: line {number}: {error}") from None
        if row.host_bound not in ("", "yes"):
            raise RowsError(f"{path}: line {number}: host_bound is yes or nothing, not {row.host_bound!r}")
        if bool(row.value) == bool(row.error) or not all(0 <= one < float("inf") for one in numbers):
            raise RowsError(f"{path}: line {number} must have either a value or an error, and sizes of at least 1")
        rows.append(row)
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write the whole file or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(row, name) for name in COLUMNS] for row in rows)
    os.replace(temporary, path)


def host_bound(times: Times) -> str:
    """The column's cell."""
    return "yes" if times.host_bound else ""


def bound_said(row: Row) -> str:
    """What a line for the terminal ends with."""
    return "  host-bound" if row.host_bound else ""


def digits(number: float) -> str:
    """Five significant digits: more would be noise."""
    return f"{number:.5g}"
