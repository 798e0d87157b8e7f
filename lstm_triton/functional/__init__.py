"""The LSTM as a function of explicit weights: layers on top of each other, and what a call may ask for."""

from .stack import States, lstm

__all__ = ["States", "lstm"]
