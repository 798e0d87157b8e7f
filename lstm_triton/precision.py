"""The precision of float32 products on a GPU: the recurrence's and cuBLAS's alike."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor


def resolve_precision(precision: str) -> str:
    """The precision of float32 products: as asked, else what nn.LSTM would use on a GPU.

    That is TF32 unless `torch.backends.cudnn.allow_tf32` or its `rnn.fp32_precision` says otherwise.
    (Not read by that name: importing the module `torch.backends.cudnn.rnn` hides it.)
    """
    if precision:
        return precision
    return "tf32" if torch._C._get_fp32_precision_getter("cuda", "rnn") == "tf32" else "ieee"


_MATMUL_PRECISION = threading.Lock()


@contextlib.contextmanager
def matmul_precision(x: Tensor, precision: str) -> Iterator[None]:
    """Let cuBLAS use TF32 exactly where the recurrence does.

    The setting belongs to the process: it is touched only where it differs, under a lock (backward
    passes of several GPUs run in threads), and given back as it was, inherited or explicit.
    """
    settings, wanted = torch.backends.cuda.matmul, "tf32" if precision == "tf32" else "ieee"
    if x.dtype != torch.float32 or not x.is_cuda:
        yield
        return
    with _MATMUL_PRECISION:
        saved = settings.fp32_precision
        if saved == wanted or (saved == "none" and wanted == "ieee"):
            yield
            return
        settings.fp32_precision = wanted
        try:
            yield
        finally:
            settings.fp32_precision = "none"
            if settings.fp32_precision != saved:
                settings.fp32_precision = saved
