"""Records keep the kernels readable: few arguments, short bodies, and every list written once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lstm_triton.kernels
from lstm_triton.kernels import backward, forward, records
from lstm_triton.kernels.config import Config
from lstm_triton.kernels.launch import given, how_of
from lstm_triton.layer.records import Choices, Cotangents, Inputs, Kept, keep_of, plans_of, read, schema_of

MOST_ARGUMENTS = {"kernel": 25, "device function": 8}
MOST_LINES = 120
LOCAL = Config("local", "none", True, False, 1, 16, 16, 16, 4)


def jitted() -> Iterator[tuple[str, ast.FunctionDef]]:
    """(kind, function) of everything that Triton compiles."""
    for path in sorted(Path(lstm_triton.kernels.__path__[0]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                yield ("kernel" if node.name.endswith("_kernel") else "device function"), node


@pytest.mark.parametrize(("kind", "function"), list(jitted()), ids=lambda one: getattr(one, "name", one))
def test_few_arguments_and_lines(kind: str, function: ast.FunctionDef) -> None:
    assert len(function.args.args) <= MOST_ARGUMENTS[kind]
    assert (function.end_lineno or 0) - function.lineno < MOST_LINES


@pytest.mark.parametrize("kernel", [forward.lstm_forward_kernel, backward.lstm_backward_kernel])
def test_what_changes_from_call_to_call_is_no_part_of_a_record(kernel) -> None:
    """Triton would compile anew for an integer inside of one."""
    assert set(records.RUNTIME) <= set(kernel.arg_names)


def test_what_a_launch_is_compiled_for_is_equal_where_its_call_is() -> None:
    made = [how_of(LOCAL, 16, 1, "forward", "ieee", torch.float16) for _ in range(2)]
    assert made[0] == made[1]
    assert hash(given(made[0])) == hash(given(made[1]))
    assert given(how_of(LOCAL, 16, 1, "forward", "ieee", torch.float32)) != given(made[0])


def test_operators_have_the_fields_of_records() -> None:
    """And nothing else: a new tensor is one field."""
    forward_names = [a.name for a in torch.ops.lstm_triton.layer.default._schema.arguments]
    assert forward_names == [*Inputs._fields, *Choices._fields]
    backward_names = [a.name for a in torch.ops.lstm_triton.layer_backward.default._schema.arguments]
    given_names = [f"d{name}" for name in Cotangents._fields]
    assert backward_names == [*given_names, *Inputs._fields, *Kept._fields, *Choices._fields, "wanted"]
    assert schema_of(Choices)[:3] == ["bool batch_first", "bool bidirectional", "str keep"]


def test_arguments_are_read_as_records() -> None:
    v, choices, last = read([*range(len(Inputs._fields)), *"abcdefg", "wanted"], Inputs, Choices)
    assert (v.x, v.seed, choices.batch_first, choices.cell, last) == (0, 14, "a", "g", "wanted")


@pytest.mark.parametrize("text", ["", "some", "chunk", "chunk:", "chunk:0", "chunk:-1", "all:3", "nothing:"])
def test_what_is_to_be_kept_is_one_of_four(text: str) -> None:
    with pytest.raises(ValueError, match="keep should be one of"):
        keep_of(text)


def test_a_plan_is_read_once() -> None:
    assert plans_of("") is None
    both = plans_of(f"{LOCAL.encode()}|{LOCAL.encode()}")
    assert both == (LOCAL, LOCAL)
    single = Config("single", "none", False, False, 1, 16, 16, 16, 4)
    assert plans_of(single.encode()) == (single, None)
    for text in (LOCAL.encode(), "|".join([LOCAL.encode()] * 3)):
        with pytest.raises(ValueError, match="two configs"):
            plans_of(text)
