"""Kernels with a bug planted in them: a copy of a kernel module with one line of its text changed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import lstm_triton.kernels


def plant(folder: Path, name: str, *changes: tuple[str, str]) -> ModuleType:
    """Load kernels/`name`.py with every (old, new) applied; a change that finds nothing is an error."""
    source = Path(lstm_triton.kernels.__path__[0], f"{name}.py").read_text()
    for old, new in changes:
        if source.count(old) != 1:
            raise ValueError(f"{name}.py has {source.count(old)} places that read {old!r}, expected one")
        source = source.replace(old, new)
    path = folder / f"{name}.py"
    path.write_text(source)
    # Inside the package, so that its relative imports hold.
    full_name = f"lstm_triton.kernels.planted_{folder.name.replace('-', '_')}_{name}"
    spec = importlib.util.spec_from_file_location(full_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[full_name] = module
    spec.loader.exec_module(module)
    return module
