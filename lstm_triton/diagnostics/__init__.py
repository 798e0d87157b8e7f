"""What goes wrong in a model while it trains: `watch(model)` looks inside, `of_losses` reads a curve of losses."""

from .statistics import Layer
from .symptoms import Finding, of_losses
from .watch import Seen, Thresholds, kept_bytes, watch

__all__ = ["Finding", "Layer", "Seen", "Thresholds", "kept_bytes", "of_losses", "watch"]
