"""LSTM_TRITON_AUTOTUNE=on: a problem that no table has an entry for is tuned when it is first met."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from ..planning import store
from ..planning.device import Device, is_capturing
from ..planning.planner import NoPlan, plan
from ..planning.problem import Bucket, Problem, bucket_of
from .search import RunLayer, search

SECONDS = 20.0  # for one pass of one bucket
_TRIED: set[tuple[Device, Bucket]] = set()
logger = logging.getLogger("lstm_triton")


def tune(problem: Problem, device: Device, where: torch.device, layer: RunLayer) -> None:
    """Tune once per process and bucket, and keep the result in the user's table; `layer` as in `search`."""
    bucket = bucket_of(problem)
    if (device, bucket) in _TRIED or bucket in store.active_table(device).entries:
        return
    if is_capturing(where):
        return  # nothing can be timed inside a graph; the first call outside one will
    _TRIED.add((device, bucket))
    if store.is_shared():
        logger.warning("LSTM_TRITON_AUTOTUNE=on tunes nothing under torch.distributed: run `tune` before")
        return
    if isinstance(plan(problem, device), NoPlan):
        return
    logger.warning("tuning %s, for at most %.0f seconds", problem, SECONDS)
    # In a thread of its own: inside an operator, where this is called, nothing records gradients.
    with ThreadPoolExecutor(1) as thread:
        try:
            entry = thread.submit(search, problem, device, where, layer, time.monotonic() + SECONDS).result()
        except Exception as error:  # the call itself must go on, by the heuristic's plan
            logger.warning("tuning failed, the heuristic's plan is used: %s: %s", type(error).__name__, error)
            return
    if entry is not None:
        store.keep(bucket, entry, device)
