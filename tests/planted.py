"""Changed copies of kernel modules: with a bug planted in one line, or without what some arguments leave out."""

from __future__ import annotations

import ast
import copy
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import lstm_triton.kernels


def source_of(name: str) -> str:
    return Path(lstm_triton.kernels.__path__[0], f"{name}.py").read_text()


def plant(folder: Path, name: str, *changes: tuple[str, str]) -> ModuleType:
    """Load kernels/`name`.py with every (old, new) applied; a change that finds nothing is an error."""
    source = source_of(name)
    for old, new in changes:
        if source.count(old) != 1:
            raise ValueError(f"{name}.py has {source.count(old)} places that read {old!r}, expected one")
        source = source.replace(old, new)
    return load(folder, name, source)


def plant_everywhere(
    folder: Path, name: str, *changes: tuple[str, str], also: Mapping[str, tuple[str, str]] = MappingProxyType({})
) -> dict[str, ModuleType]:
    """kernels/`name`.py with every change applied, and copies of all modules that import it, which use the changed one.

    also: one change each of modules among those.

    Changing a module's globals would not do: compiled kernels are kept by the functions they were made of.
    """
    made = {name: plant(folder, name, *changes)}
    sources = {path.stem: path.read_text() for path in Path(lstm_triton.kernels.__path__[0]).glob("*.py")}
    waiting = {other: set(re.findall(r"^from \.(\w+) import", text, re.MULTILINE)) for other, text in sources.items()}
    affected = {name}
    while more := {other for other, used in waiting.items() if used & affected} - affected:
        affected |= more
    affected.remove(name)
    while affected:
        other = next(one for one in sorted(affected) if not waiting[one] & affected)
        source = sources[other]
        if other in also:
            old, new = also[other]
            if source.count(old) != 1:
                raise ValueError(f"{other}.py has {source.count(old)} places that read {old!r}, expected one")
            source = source.replace(old, new)
        for planted, module in made.items():
            source = source.replace(f"from .{planted} import", f"from .{module.__name__.rpartition('.')[2]} import")
        made[other] = load(folder, other, source)
        affected.remove(other)
    return made


class _Known(ast.NodeTransformer):
    """Puts the values of names and of fields ("masks.seed") in their place; `left` are those that have none."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.found = self.left = 0

    def visit_Name(self, node: ast.Name | ast.Attribute) -> Any:
        name = ast.unparse(node)
        if name not in self.values:
            self.left += 1
            return node
        self.found += 1
        return ast.Constant(self.values[name])

    visit_Attribute = visit_Name


class _Prune(ast.NodeTransformer):
    """Takes out what a condition over these names never reaches."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.removed = 0

    def _value(self, test: ast.expr) -> Any:
        """What a condition is, or an Ellipsis if more than these names decides it."""
        known = _Known(self.values)
        put = ast.fix_missing_locations(ast.Expression(known.visit(copy.deepcopy(test))))
        return eval(compile(put, "condition", "eval")) if known.found and not known.left else ...

    def _branch(self, node: Any) -> Any:
        value = self._value(node.test)
        if value is ...:
            return node
        self.removed += 1
        return node.body if value else node.orelse

    def visit_If(self, node: ast.If) -> Any:
        return self._branch(self.generic_visit(node))

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        return self._branch(self.generic_visit(node))

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        neutral = isinstance(node.op, ast.And)
        values = [value for value in node.values if self._value(value) is ... or bool(self._value(value)) != neutral]
        found = values[0] if len(values) == 1 else ast.BoolOp(node.op, values) if values else ast.Constant(neutral)
        return ast.copy_location(found, node)


def prune(folder: Path, name: str, values: dict[str, Any], *changes: tuple[str, str]) -> tuple[ModuleType, int]:
    """kernels/`name`.py without the lines that these values of its arguments leave out; how many places that were."""
    pruner = _Prune(values)
    source = ast.unparse(ast.fix_missing_locations(pruner.visit(ast.parse(source_of(name)))))
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    return load(folder, name, source), pruner.removed


def load(folder: Path, name: str, source: str) -> ModuleType:
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
