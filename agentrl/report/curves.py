"""Learning curves as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentrl.errors import UserError

Point = tuple[float, float, float, float]
"""x, value, low, high."""

Spread = tuple[Any, Any, Any, Any]
"""x, lowest, mean, highest: arrays of one length."""

TOGETHER = 4
"""Methods whose curves one picture holds."""


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
    plt = pyplot()
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
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    path: str | Path,
    title: str,
    xlabel: str,
    baseline: str | None = None,
) -> None:
    """Draws several methods: the mean over seeds on a common grid of x, and the range of the seeds around it.

    Up to `TOGETHER` methods share one picture. More would hide each other: then each has a panel of its own, in which
    the baseline is dashed and all others are grey.

    Args:
        curves: method -> one list of (x, value) for each seed.
        path: PNG file to write.
        title: above the picture.
        xlabel: what x is.
        baseline: method that the others are compared with.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = pyplot()
    seeds = max(len(runs) for runs in curves.values())
    spreads = {method: _spread(runs) for method, runs in curves.items()}
    columns = 1 if len(curves) <= TOGETHER else 4
    rows = 1 if columns == 1 else -(-len(curves) // columns)
    size = (7.5, 4.4) if columns == 1 else (12, 2.6 * rows + 0.6)
    figure, grid = plt.subplots(
        rows, columns, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    panels = list(grid.flat)
    if columns == 1:
        for number, (method, spread) in enumerate(spreads.items()):
            _draw(panels[0], spread, f"C{number}", f"{method} ({len(curves[method])} seeds)")
        panels[0].legend(frameon=False, loc="lower right")
    else:
        for number, (method, runs) in enumerate(curves.items()):
            _panel(panels[number], method, spreads, baseline)
            panels[number].set_title(method if len(runs) == seeds else f"{method} ({len(runs)} seeds)", fontsize=10)
            panels[number].tick_params(labelbottom=number >= len(curves) - columns)
        for axes in panels[len(curves) :]:
            axes.axis("off")
    for axes in panels[: len(spreads)]:
        axes.set(ylim=(0, 1))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        axes.grid(alpha=0.25)
    dashed = f"; dashed: {baseline}, grey: the others" if columns > 1 and baseline else ""
    figure.suptitle(f"{title}{f' ({seeds} seeds{dashed})' if columns > 1 else ''}", fontsize=11)
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel("held-out success", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axes: Any, method: str, spreads: Mapping[str, Spread], baseline: str | None) -> None:
    """Draws `method` with its spread over the others."""
    for other, (x, _, mean, _) in spreads.items():
        if other not in (method, baseline):
            axes.plot(x, mean, color="0.82", lw=0.8)
    if baseline in spreads and baseline != method:
        x, _, mean, _ = spreads[str(baseline)]
        axes.plot(x, mean, color="0.2", lw=1.2, ls="--")
    _draw(axes, spreads[method], "0.2" if method == baseline else "#1f5fa8", method)


def _draw(axes: Any, spread: Spread, colour: str, label: str) -> None:
    x, low, mean, high = spread
    axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
    axes.plot(x, mean, color=colour, lw=2, label=label)


def _spread(runs: Sequence[Sequence[tuple[float, float]]]) -> Spread:
    """Lowest, mean and highest of the runs at 100 values of x, to where the shortest ends."""
    import numpy as np

    grid = np.linspace(0, min(run[-1][0] for run in runs), 100)
    values = np.stack([np.interp(grid, [x for x, _ in run], [y for _, y in run]) for run in runs])
    return grid, values.min(0), values.mean(0), values.max(0)


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'agentrl[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
