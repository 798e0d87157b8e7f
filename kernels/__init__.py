"""The Triton kernels of `lstm_triton`: recurrences, their exchange, their launchers.

Imports only torch, triton and itself. The folder is the package `lstm_triton.kernels` by a link inside `lstm_triton`,
however that is installed, or not installed. Another well-known distribution owns the top-level name `kernels`, so that
import is refused.
"""

if __name__ != "lstm_triton.kernels":
    raise ImportError(f"import lstm_triton.kernels, not {__name__}")
