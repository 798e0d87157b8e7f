"""lstm_triton: an LSTM for PyTorch whose recurrence is one persistent Triton kernel.

from lstm_triton import LSTM  # in place of torch.nn.LSTM
"""

from . import convert, diagnostics, functional, init
from ._version import __version__
from .explain import explain
from .layer.export import decompositions
from .modules.cell import LSTMCell
from .modules.lstm import LSTM
from .modules.patching import patch, unpatch

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
