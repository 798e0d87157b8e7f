"""In place of Hypothesis where it is not installed: what tests/conftest.py asks of it. GPU tests draw nothing by it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

HealthCheck = SimpleNamespace(too_slow=None)


class settings:
    @staticmethod
    def register_profile(name: str, **options: Any) -> None: ...

    @staticmethod
    def load_profile(name: str) -> None: ...
