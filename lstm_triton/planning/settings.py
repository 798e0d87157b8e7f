"""The environment variables of the library: read when they are needed, never at import.

An argument of a call goes before a variable, a variable before the default. The README's section
"Environment variables" lists them; `python -m lstm_triton doctor` prints their values.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Variable:
    """One environment variable. choices: the values it may have; empty for any text."""

    name: str
    default: str
    choices: tuple[str, ...]
    meaning: str

    def read(self) -> str:
        """The value; ValueError names the choices if it is none of them."""
        value = os.environ.get(self.name) or self.default
        if self.choices and value not in self.choices:
            raise ValueError(f"{self.name} should be one of {', '.join(self.choices)}, got: {value!r}")
        return value


AUTOTUNE = Variable(
    "LSTM_TRITON_AUTOTUNE",
    "cached",
    ("off", "cached", "on"),
    "off: plans come from the heuristic alone; cached: from a tuned table where it has an entry; "
    "on: as cached, and a problem without an entry is tuned at its first call",
)
CACHE_DIR = Variable(
    "LSTM_TRITON_CACHE_DIR",
    "",
    (),
    "folder of the tables that `tune` writes and of what has been checked; default: the platform's cache folder",
)
STRICT = Variable(
    "LSTM_TRITON_STRICT",
    "0",
    ("0", "1"),
    '1: on a GPU backend="auto" means "triton": a call that the kernels cannot run raises, with the reason',
)
COOPERATIVE = Variable(
    "LSTM_TRITON_COOPERATIVE",
    "1",
    ("0", "1"),
    "0: no plan whose programs wait for each other inside a launch; what does not fit one program then takes one "
    'launch a step with backend="triton", and PyTorch\'s path with "auto"',
)
CHECK = Variable(
    "LSTM_TRITON_CHECK",
    "first",
    ("first", "off", "always"),
    "first: before a GPU runs a config for the first time it is compared with plain PyTorch on a tiny problem, and "
    "left out if it is wrong; always: in every process anew; off: never",
)
VARIABLES = (AUTOTUNE, CACHE_DIR, CHECK, COOPERATIVE, STRICT)
PREFIX = CACHE_DIR.name.removesuffix("CACHE_DIR")
OF_SCRIPTS = ("COMMIT", "LIMITS", "REHEARSAL")  # with that prefix; perf/ reads these


_NAMES = [os.fsencode(variable.name) for variable in VARIABLES]
_get = os.environb.get if os.supports_bytes_environ else lambda name: os.environ.get(os.fsdecode(name))


def as_they_are() -> tuple[Any, ...]:
    """All values, unread: to be compared with what they were."""
    return tuple(map(_get, _NAMES))


def misspelt() -> list[str]:
    """Variables of the environment that look like ours and are not."""
    known = {*(variable.name for variable in VARIABLES), *(PREFIX + name for name in OF_SCRIPTS)}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def cache_dir() -> Path:
    """Where this user's tuned tables and checks are; it need not exist."""
    folder = CACHE_DIR.read()
    if folder:
        return Path(folder)
    import platformdirs

    return platformdirs.user_cache_path("lstm_triton", appauthor=False)


def strict() -> bool:
    return STRICT.read() == "1"
