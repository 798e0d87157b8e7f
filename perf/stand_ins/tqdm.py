"""In place of tqdm where it is not installed: no bar, and what is written is printed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class tqdm:
    def __init__(self, iterable: Iterable[Any] = (), **options: Any) -> None:
        self.iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self.iterable)

    def __enter__(self) -> tqdm:
        return self

    def __exit__(self, *error: object) -> None: ...

    def update(self, count: int = 1) -> None: ...

    def set_description(self, text: str) -> None: ...

    def set_postfix_str(self, text: str) -> None: ...

    def close(self) -> None: ...

    @staticmethod
    def write(text: str) -> None:
        print(text, flush=True)
