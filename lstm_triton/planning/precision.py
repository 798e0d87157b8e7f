"""The precision of float32 products on a GPU: the recurrence's and cuBLAS's alike."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch


def resolve_precision(precision: str) -> str:
    """The precision of float32 products: as asked, else what nn.LSTM would use on a GPU.

    That is TF32 unless `torch.backends.cudnn.allow_tf32` or its `rnn.fp32_precision` says otherwise.
    (Not read by that name: importing the module `torch.backends.cudnn.rnn` hides it.)
    """
    if precision:
        return precision
    return "tf32" if torch._C._get_fp32_precision_getter("cuda", "rnn") == "tf32" else "ieee"


class _Setting:
    """The process's precision of fp32 GEMMs, as long as one or more threads need it to be what it is.

    Who needs the same goes along, who needs another waits; the last one gives it back as it was, inherited or explicit.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.own = threading.local()  # how often the thread that asks holds it
        self.waiting = 0
        self.users, self.saved = 0, ""  # saved: empty where nothing was changed

    def hold(self, wanted: str) -> None:
        settings = torch.backends.cuda.matmul
        with self.changed:
            inside = getattr(self.own, "count", 0)
            # Who comes while another waits for another precision lets it pass, or it might wait for ever.
            while self.users and not inside and (self.waiting or not _is(settings.fp32_precision, wanted)):
                self.waiting += 1
                self.changed.wait()
                self.waiting -= 1
            self.own.count = inside + 1
            if not self.users and not _is(settings.fp32_precision, wanted):
                self.saved, settings.fp32_precision = settings.fp32_precision, wanted
            self.users += 1

    def release(self) -> None:
        settings = torch.backends.cuda.matmul
        with self.changed:
            self.own.count -= 1
            self.users -= 1
            if not self.users and self.saved:
                settings.fp32_precision = "none"  # inherited, as it mostly is
                if settings.fp32_precision != self.saved:
                    settings.fp32_precision = self.saved
                self.saved = ""
            self.changed.notify_all()


def _is(precision: str, wanted: str) -> bool:
    return precision == wanted or (precision == "none" and wanted == "ieee")


_SETTING = _Setting()


def matmul_precision(dtype: torch.dtype, precision: str) -> contextlib.AbstractContextManager[None]:
    """Let cuBLAS use TF32 exactly where the recurrence does: one such block around a whole pass.

    The setting belongs to the process. It is touched only where it differs, and while GEMMs are queued; another thread
    of the process that computes in fp32 meanwhile gets it too.
    """
    return _held("tf32" if precision == "tf32" else "ieee") if dtype == torch.float32 else _AS_IT_IS


_AS_IT_IS = contextlib.nullcontext()


@contextlib.contextmanager
def _held(wanted: str) -> Iterator[None]:
    _SETTING.hold(wanted)
    try:
        yield
    finally:
        _SETTING.release()
