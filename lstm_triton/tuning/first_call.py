"""LSTM_TRITON_AUTOTUNE=on: a problem that no table has an entry for is tuned when it is first met."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import torch

from ..device import Device
from ..planner import NoPlan, plan
from ..problem import Bucket, Problem, bucket_of
from . import store
from .search import search

SECONDS = 20.0  # for one pass of one bucket
_TRIED: set[tuple[Device, Bucket]] = set()
logger = logging.getLogger("lstm_triton")


def tune(problem: Problem, device: Device, where: torch.device) -> None:
    """Tune once per process and bucket, and keep the result in the user's table."""
    bucket = bucket_of(problem)
    if (device, bucket) in _TRIED or bucket in store.active_table(device).entries:
        return
    if where.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return  # nothing can be timed inside a graph; the first call outside one will
    _TRIED.add((device, bucket))
    if store.is_shared():
        logger.warning("LSTM_TRITON_AUTOTUNE=on tunes nothing under torch.distributed: run `tune` before")
        return
    if isinstance(plan(problem, device), NoPlan):
        return
    logger.warning("tuning %s, for at most %.0f seconds", problem, SECONDS)
    entry = search(problem, device, where, time.monotonic() + SECONDS)
    if entry is not None:
        table = store.user_table(device)
        store.keep(replace(table, entries={**table.entries, bucket: entry}), device)
