"""A tuned table: which config measured fastest on one GPU, and where nn.LSTM measured faster still.

As JSON: {"format", "kernels", "gpu", "arch", "multiprocessors", "made", "entries", "contests"}.
A table speaks for one GPU model and one source of the kernels; whoever reads it checks both
(`Table.mismatch`). Reading is strict: what is not exactly a table raises TableError.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import tokenize
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..kernels import forward
from ..kernels.config import Config
from .cudnn import ALGORITHMS
from .device import Device
from .problem import Bucket

FORMAT = 1
MODES = ("inference", "training")
# What a binary or its launch is made from.
SOURCES = (
    *("cell.py", "norm.py", "masks.py", "tiles.py", "exchange.py", "product.py"),
    *("alarm.py", "forward.py", "backward.py", "launch.py", "records.py", "sums.py"),
)


class TableError(ValueError):
    """A text that is no table, with what is wrong."""


@dataclass(frozen=True)
class Entry:
    """The measurements of one bucket.

    config: the fastest, with max_batch_tiles = 0 (the planner sets it for the device at hand).
    measured: microseconds per step of every config timed, or the error, by `Config.encode`.
    complete: no candidate was left out for want of time.
    host_bound: those of `measured` whose time is the host's, see `clock.Times`.
    """

    config: Config
    measured: Mapping[str, float | str]
    complete: bool
    host_bound: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bout:
    """Where our layer met nn.LSTM.

    algorithm: what PyTorch asks cuDNN for: in the forward pass for mode "inference", in the backward
    pass for mode "training". single_step: T = 1, else a long sequence.
    """

    hidden_size: int
    aligned: bool
    batch: int
    directions: int
    dtype: str
    precision: str
    algorithm: str
    mode: str
    single_step: bool


@dataclass(frozen=True)
class Contest:
    """Median times of the same call in one run, in milliseconds; and whether each is the host's, see `clock.Times`."""

    ours: float
    torch: float
    ours_host_bound: bool = False
    torch_host_bound: bool = False

    @property
    def speedup(self) -> float:
        return self.torch / self.ours


@dataclass(frozen=True, eq=False)
class Table:
    """eq=False: a table is its own identity, so that plans can be cached by it."""

    name: str
    kernels: str = ""
    gpu: str = ""
    arch: str = ""
    multiprocessors: int = 0
    made: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[Bucket, Entry] = field(default_factory=dict)
    contests: Mapping[Bout, Contest] = field(default_factory=dict)

    def mismatch(self, device: Device) -> str:
        """Why this table does not speak for a device and these kernels; "" if it does."""
        if self.kernels != kernels_hash():
            return f"it was tuned for other kernels ({self.kernels[:12]}, these are {kernels_hash()[:12]})"
        theirs, ours = (self.gpu, self.arch, self.multiprocessors), (device.name, device.arch, device.multiprocessors)
        if theirs != ours:
            return "it was tuned on {} ({}, {} multiprocessors), this is {} ({}, {})".format(*theirs, *ours)
        return ""

    def over(self, other: Table) -> Table:
        """Both tables' entries, this one's where both have one."""
        if not other.entries and not other.contests:
            return self
        return replace(
            self,
            name=f"{self.name}, {other.name}",
            entries={**other.entries, **self.entries},
            contests={**other.contests, **self.contests},
        )

    def dump(self) -> str:
        """The table as JSON, one entry a line."""
        head = {"format": FORMAT, "kernels": self.kernels, "gpu": self.gpu, "arch": self.arch}
        head |= {"multiprocessors": self.multiprocessors, "made": dict(self.made)}
        entries = [
            {**asdict(bucket), "config": entry.config.encode(), "complete": entry.complete, "measured": entry.measured}
            | ({"host_bound": entry.host_bound} if entry.host_bound else {})
            for bucket, entry in self.entries.items()
        ]
        contests = [{**asdict(bout), **asdict(contest)} for bout, contest in self.contests.items()]
        fields = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        for key, rows in (("entries", entries), ("contests", contests)):
            lines = ",\n".join(json.dumps(row, sort_keys=False) for row in rows)
            fields.append(f"{json.dumps(key)}: [\n{lines}\n]" if rows else f"{json.dumps(key)}: []")
        return "{\n" + ",\n".join(fields) + "\n}\n"

    def save(self, path: Path) -> None:
        """Write the whole file or nothing: OSError leaves what was there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(self.dump())
            os.chmod(temporary, 0o644)  # a cache folder may be shared
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


NO_TABLE = Table("no table")


def parse(text: str, name: str) -> Table:
    """The inverse of `Table.dump`; TableError for anything else."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TableError(f"not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise TableError(f"format {found!r}, expected {FORMAT}")
    try:
        entries = dict(_entry(row) for row in data["entries"])
        contests = dict(_contest(row) for row in data["contests"])
        made = {str(key): str(value) for key, value in data["made"].items()}
        head = {key: _of_type(data[key], str) for key in ("kernels", "gpu", "arch")}
        return Table(name, **head, multiprocessors=_of_type(data["multiprocessors"], int), made=made,
                     entries=entries, contests=contests)  # fmt: skip
    except KeyError as error:
        raise TableError(f"the field {error} is missing") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise TableError(str(error)) from None


def load(path: Path) -> Table:
    """The table of a file, named after it; TableError or OSError."""
    try:
        return parse(path.read_text(), path.stem)
    except UnicodeDecodeError as error:
        raise TableError(f"not text: {error}") from None


def _of_type(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value


def _key(row: dict[str, Any], cls: type) -> Any:
    kinds = {"str": str, "int": int, "bool": bool}
    return cls(**{name: _of_type(row[name], kinds[str(kind)]) for name, kind in cls.__annotations__.items()})


def _entry(row: dict[str, Any]) -> tuple[Bucket, Entry]:
    measured = {str(key): value for key, value in row["measured"].items()}
    for text, value in measured.items():
        Config.decode(text)
        if not isinstance(value, str) and not _of_type(value, float) > 0:
            raise ValueError(f"a time must be positive, got {value!r}")
    config = Config.decode(row["config"])
    if isinstance(measured.get(row["config"], ""), str):
        raise ValueError(f"the fastest config has no time: {row['config']!r}")
    host_bound = tuple(_of_type(row.get("host_bound", []), list))  # which tables of before do not have
    if any(isinstance(measured.get(text, ""), str) for text in host_bound):
        raise ValueError(f"host-bound configs that have no time: {host_bound!r}")
    return _key(row, Bucket), Entry(config, measured, _of_type(row["complete"], bool), host_bound)


def _contest(row: dict[str, Any]) -> tuple[Bout, Contest]:
    bout = _key(row, Bout)
    if bout.algorithm not in ALGORITHMS or bout.mode not in MODES:
        raise ValueError(f"unknown algorithm or mode: {bout.algorithm!r}, {bout.mode!r}")
    host_bound = (_of_type(row.get(f"{name}_host_bound", False), bool) for name in ("ours", "torch"))
    contest = Contest(_of_type(row["ours"], float), _of_type(row["torch"], float), *host_bound)
    if not (contest.ours > 0 and contest.torch > 0):
        raise ValueError(f"a time must be positive, got {contest}")
    return bout, contest


@cache
def kernels_hash() -> str:
    """Of the kernels' source: what the programs say, whatever their comments say."""
    digest = hashlib.sha256()
    folder = Path(forward.__file__).parent
    for name in SOURCES:
        digest.update(repr((name, significant_tokens((folder / name).read_text()))).encode())
    return digest.hexdigest()


def significant_tokens(source: str) -> list[str]:
    """The tokens of a module without comments, docstrings and line breaks inside of statements."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)
    tokens: list[str] = []
    at_start = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in skipped or (at_start and token.type == tokenize.STRING):
            continue
        layout = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        if not (token.type == tokenize.NEWLINE and at_start):  # what a docstring leaves behind
            tokens.append(tokenize.tok_name[token.type] if layout else token.string)
        at_start = layout
    return tokens
