"""The figure of what `diagnostics.watch` has seen of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure

from .drawing import BLUE, GATES, panels

if TYPE_CHECKING:
    from .watch import Seen


def inside_figure(seen: Seen) -> Figure:
    """Gradients by parameter and by step, saturated gates by layer, and states by step."""
    figure, axes = panels(2, 2, 11, 7)
    limits = seen.thresholds
    norms = {name: min(float(norm), 1e30) if norm == norm else 1e30 for name, norm in seen.parameters.items()}
    tiny = limits.vanishing / 100
    axes[0].barh(list(norms), [max(norm, tiny) for norm in norms.values()], color=BLUE)
    axes[0].set(
        xscale="log", title="gradient norm by parameter", xlim=(tiny, 3 * max([limits.exploding * 10, *norms.values()]))
    )
    axes[0].tick_params(axis="y", labelsize=7)
    for limit in (limits.vanishing, limits.exploding):
        axes[0].axvline(limit, color="grey", linestyle="--")
    for name, gradients in seen.input_gradients.items():
        gradients = gradients.cpu()
        (line,) = axes[1].semilogy(gradients.masked_fill(gradients == 0, torch.nan), label=name or "the model")
        largest = float(gradients.max())
        if 0 < largest < float("inf"):
            level, label = limits.vanishing * largest, f"lost: {limits.vanishing:g} of the largest"
            axes[1].axhline(level, color=line.get_color(), linestyle=":", linewidth=1, label=label)
        axes[1].set_xlim(-0.02 * len(gradients), 1.02 * len(gradients))
    axes[1].set(title="gradient of the input, by step (zeros left out)", xlabel="step")
    for number, (name, layer) in enumerate(seen.layers.items()):
        for gate, share in zip(GATES, layer.saturation.mean((0, 2)).tolist()):
            place = number + 0.2 * (list(GATES).index(gate) - 1.5)
            axes[2].bar(place, 100 * share, 0.18, color=GATES[gate][1], label=gate if not number else None)
        axes[3].plot(layer.c.max(1).values, label=f"c of {name}")
        axes[3].plot(layer.h.max(1).values, linestyle="--", label=f"h of {name}")
    if not any(float(layer.saturation.max()) for layer in seen.layers.values()):
        axes[2].text(0.5, 0.5, "none", ha="center", transform=axes[2].transAxes)
    axes[2].set(title="saturated values of each gate", ylabel="%", ylim=(0, 103))
    axes[2].set_xticks(range(len(seen.layers)), list(seen.layers))
    axes[3].set(title="root mean square of the states", xlabel="step")
    for axis in axes[1:]:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    return figure
