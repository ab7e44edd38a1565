"""What a person sees while a run trains: a bar for the episodes of this iteration, and a line for each finished one."""

from __future__ import annotations

from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from agentrl.config.schema import RunConfig
from agentrl.types import Trajectory


class Console:
    """Progress of a training run; a context manager."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.console = RichConsole(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        self._done = 0
        self._bar = self.progress.add_task("episodes", total=config.rollout.groups * config.rollout.group_size)

    def __enter__(self) -> Console:
        self.progress.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.progress.__exit__(*exc)

    def episode(self, trajectory: Trajectory) -> None:
        """Counts a finished training episode."""
        self.progress.advance(self._bar)

    def iteration(self, metrics: dict[str, Any]) -> None:
        """Prints the line of a finished iteration."""
        self.progress.reset(self._bar, description=f"iteration {metrics['iteration'] + 1}/{self.config.iterations}")
        self.console.print(line_of(metrics, self.config.iterations), highlight=False)


def line_of(metrics: dict[str, Any], iterations: int) -> str:
    """Returns one line of at most 80 columns.

    Success and turns of the training episodes, share of new pairs that the PRM ordered right, entropy (nats per token),
    seconds, and held-out success with its interval where it was measured.
    """
    parts = [f"[bold]{metrics['iteration']:>4}[/]/{iterations}"]
    if "success" in metrics:
        parts.append(f"train {metrics['success']:4.0%}  turns {metrics['turns']:4.1f}")
    if "pair_accuracy_per_turn" in metrics:
        parts.append(f"prm {metrics['pair_accuracy_per_turn']:.2f}")
    if "entropy" in metrics:
        parts.append(f"ent {metrics['entropy']:.2f}")
    if "seconds" in metrics:
        parts.append(f"{sum(metrics['seconds'].values()):.1f}s")
    if metrics.get("episodes_failed"):
        parts.append(f"[red]{metrics['episodes_failed']} failed[/]")
    if "eval" in metrics:
        success = metrics["eval"]["success"]
        low, high = 100 * success["low"], 100 * success["high"]
        parts.append(f"[green]held-out {success['value']:.0%} ({low:.0f}-{high:.0f})[/]")
    return "  ".join(parts)
