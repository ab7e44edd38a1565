"""Learning curves as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentrl.errors import UserError

Point = tuple[float, float, float, float]
"""x, value, low, high."""


def held_out_points(metrics: Sequence[Mapping[str, Any]], x: str = "iteration") -> list[Point]:
    """Returns the held-out success of every evaluation in a run's metrics, with its interval."""
    found = []
    for record in metrics:
        if record.get("eval"):
            success = record["eval"]["success"]
            found.append((float(record.get(x, 0.0)), success["value"], success["low"], success["high"]))
    return found


def plot_run(metrics: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> None:
    """Draws one run: held-out success with its 95 % interval, success of training episodes, PRM pair accuracy.

    Args:
        metrics: what `read_metrics` returns.
        path: PNG file to write.
        title: above the picture.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    trained = [m for m in metrics if "success" in m]
    axes.plot(
        [m["iteration"] for m in trained],
        [m["success"] for m in trained],
        color="#9ab8d8",
        lw=1.2,
        label="training episodes",
    )
    points = held_out_points(metrics)
    if points:
        x, value, low, high = zip(*points, strict=True)
        axes.fill_between(x, low, high, color="#1f5fa8", alpha=0.15, lw=0)
        axes.plot(x, value, color="#1f5fa8", marker="o", ms=4, lw=2, label="held-out levels (95 % interval)")
    accuracy = [(m["iteration"], m["pair_accuracy_per_turn"]) for m in trained if "pair_accuracy_per_turn" in m]
    if accuracy:
        axes.plot(
            *zip(*accuracy, strict=True),
            color="#c77b2b",
            lw=1,
            ls="--",
            label="PRM: new pairs ordered right (mean per turn)",
        )
    axes.set(title=title, xlabel="iteration", ylabel="share", ylim=(0, 1))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_methods(
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]], path: str | Path, title: str, xlabel: str
) -> None:
    """Draws several methods: the mean over seeds on a common grid of x, and the range of the seeds around it.

    Args:
        curves: method -> one list of (x, value) for each seed.
        path: PNG file to write.
        title: above the picture.
        xlabel: what x is.
    """
    import numpy as np

    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    for number, (method, seeds) in enumerate(curves.items()):
        end = min(seed[-1][0] for seed in seeds)
        grid = np.linspace(0, end, 100)
        values = np.stack([np.interp(grid, [x for x, _ in seed], [y for _, y in seed]) for seed in seeds])
        colour = f"C{number}"
        axes.fill_between(grid, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
        axes.plot(grid, values.mean(0), color=colour, lw=2, label=f"{method} ({len(seeds)} seeds)")
    axes.set(title=title, xlabel=xlabel, ylabel="held-out success", ylim=(0, 1))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'agentrl[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
