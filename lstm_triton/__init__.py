"""lstm_triton: an LSTM for PyTorch whose recurrence is one persistent Triton kernel.

from lstm_triton import LSTM  # in place of torch.nn.LSTM
"""

from . import convert, diagnostics, functional, init
from ._version import __version__
from .cell import LSTMCell
from .explain import explain
from .exporting import decompositions
from .module import LSTM
from .patching import patch, unpatch

__all__ = [
    "LSTM",
    "LSTMCell",
    "__version__",
    "convert",
    "decompositions",
    "diagnostics",
    "explain",
    "functional",
    "init",
    "patch",
    "unpatch",
]
