"""Columns of a CSV file, for the recipes that take a user's own data."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence

from .command import Refused


def read_columns(path: str, wanted: Sequence[str]) -> list[tuple[str, ...]]:
    """The values of the named columns, row by row, of a UTF-8 file whose first line names its columns.

    Rows where one is empty are an error: what a gap means is for the user to say. Raises Refused in one line.
    """
    found = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            for name in wanted:
                if name not in (reader.fieldnames or ()):
                    named = ", ".join(map(repr, reader.fieldnames or ())) or "none"
                    raise Refused(f"{path} has no column {name!r}; its columns: {named}")
            for row in reader:
                if None in row:
                    raise Refused(
                        f"{path}, line {reader.line_num}: more values than columns; a comma in a text needs quotes"
                    )
                values = tuple((row[name] or "").strip() for name in wanted)
                if not all(values):
                    raise Refused(f"{path}, line {reader.line_num}: no value for {wanted[values.index('')]!r}")
                found.append(values)
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not UTF-8 text (byte {error.start})") from error
    except csv.Error as error:
        raise Refused(f"{path} is not CSV: {error}") from error
    if not found:
        raise Refused(f"{path} has no rows")
    return found


def numbers(path: str, column: str) -> list[float]:
    """The values of one column as finite numbers. Raises Refused in one line."""
    values = []
    for i, (text,) in enumerate(read_columns(path, [column]), 1):
        try:
            values.append(float(text))
        except ValueError:
            raise Refused(f"{path}, row {i}: {column!r} is {text!r}, not a number") from None
        if not math.isfinite(values[-1]):
            raise Refused(f"{path}, row {i}: {column!r} is {text}")
    return values
