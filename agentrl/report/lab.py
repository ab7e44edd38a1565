"""The credit lab as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentrl.report.curves import pyplot

PANELS = (
    ("fresh_rank", "rank correlation with the truth, fresh batches", 0.0),
    ("sign", "right sign on decisive turns", 0.5),
    ("luck", "share of luck (lower is better)", None),
)
"""(figure, title, where knowing nothing lies)."""


def plot_lab(methods: Mapping[str, Mapping[str, Sequence[float | None]]], path: str | Path, title: str) -> None:
    """Draws one environment: a dot per method (mean over seeds) and a line over the range of its seeds, OPRL in blue.

    Args:
        methods: method -> figure -> one value per seed; methods are sorted by their first panel.
        path: PNG file to write.
        title: above the picture.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = pyplot()
    order = sorted(methods, key=lambda name: _mean(methods[name]["fresh_rank"]))
    figure, panels = plt.subplots(
        1, len(PANELS), figsize=(11, 0.32 * len(order) + 1.5), sharey=True, layout="constrained"
    )
    for axes, (name, label, nothing) in zip(panels, PANELS, strict=True):
        for place, method in enumerate(order):
            values = [v for v in methods[method][name] if v is not None]
            if not values:
                continue
            colour = "#1f5fa8" if method.startswith("oprl") else "#777777"
            axes.plot([min(values), max(values)], [place, place], color=colour, lw=2.5, alpha=0.45)
            axes.plot(_mean(values), place, "o", color=colour, ms=6)
        if nothing is not None:
            axes.axvline(nothing, color="black", lw=0.8, ls=":")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.25)
        axes.set_ylim(-0.6, len(order) - 0.4)
    panels[0].set_yticks(range(len(order)), order)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _mean(values: Sequence[Any]) -> float:
    kept = [v for v in values if v is not None]
    return sum(kept) / len(kept) if kept else 0.0
