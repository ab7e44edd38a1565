"""``agentrl demo``: the whole story on one CPU, from nothing to an agent that solves held-out levels."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from agentrl.cli.common import ShownLessons, console
from agentrl.errors import UserError
from agentrl.files import atomic_write, check_writable

if TYPE_CHECKING:
    from agentrl.config import RunConfig
    from agentrl.evaluate import EvalResult

LESSONS = ((10 / 13, 0.8, 1e-3), (3 / 13, 0.25, 5e-4))
"""(share of the demonstrations, skill of the solver that plays them, learning rate), in this order.

The first lesson teaches the board: its solver plays a best move four times out of five. The second teaches indecision:
a best move once in four, else a random one. The base model then knows more than it shows, as a pretrained model does;
the table at the end says how much, by playing it greedily too."""


def add_commands(app: typer.Typer) -> None:
    """Adds `demo`."""
    app.command("demo")(demo)


def demo(
    config: Annotated[str, typer.Option(metavar="FILE", help="Run configuration.")] = "configs/sokoban_oprl.yaml",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Dotted settings.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything is written; replaced.")] = Path(
        "runs/demo"
    ),
    demonstrations: Annotated[int, typer.Option(metavar="N", min=1, help="Episodes of the noisy solver.")] = 18_000,
    levels: Annotated[int, typer.Option(metavar="N", min=1, help="Held-out levels that judge base and agent.")] = 512,
    seed: Annotated[int, typer.Option(metavar="N")] = 0,
) -> None:
    """Clone a noisy Sokoban player into a tiny language model, then train it with OPRL (about 10 minutes on 2 cores).

    Example:  [b]agentrl demo --out runs/demo[/b]
    """
    from agentrl.config import config_sha256, load_config
    from agentrl.train.preflight import check_task

    settings = load_config(config, [*(overrides or ()), f"seed={seed}"])
    sha256 = config_sha256(settings)
    settings.run_dir, settings.model.path = str(out / "train"), str(out / "base")
    check_task(settings)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "demo.txt").exists()):
        raise UserError(f"{str(out)!r} holds something that is no demo; give another folder (--out)")
    shutil.rmtree(out, ignore_errors=True)
    check_writable(out, need_bytes=200 * 2**20)
    (out / "demo.txt").write_text("Made by `agentrl demo`, which replaces this folder.\n")
    started = time.perf_counter()
    console.rule("1/3  base model: clone a noisy solver")
    make_base(settings, out, demonstrations)
    console.rule("2/3  train with OPRL")
    seconds = train(settings)
    console.rule("3/3  held-out levels")
    results = {name: played(settings, path, levels) for name, path in (("base", "base"), ("final", "train/model"))}
    summary = summarise(settings, results, seconds) | {"config_sha256": sha256}
    with atomic_write(out / "summary.json") as file:
        file.write(json.dumps(summary, indent=2).encode() + b"\n")
    plot(settings, out)
    write_page(settings, out / "report.html")
    console.print(report(settings, results))
    console.print(f"{time.perf_counter() - started:.0f} s, peak memory {summary['peak_rss_mb']:.0f} MB")
    console.print(f"Every turn and its credit, in a browser: {out / 'report.html'}")
    console.print(f"Curve: {out / 'learning_curve.png'}  Numbers: {out / 'summary.json'}")
    console.print(f"Agent: {out / 'train' / 'model'}")


def make_base(settings: RunConfig, out: Path, demonstrations: int) -> None:
    """Writes the base model: a tiny network cloned from a solver that is right only part of the time."""
    from agentrl.train import base

    lessons = [
        base.Lesson(
            policy="sokoban-noisy-solver",
            options={"skill": skill},
            episodes=max(1, round(share * demonstrations)),
            lr=lr,
        )
        for share, skill, lr in LESSONS
    ]
    base.make_base(
        settings.env,
        out / "base",
        lessons,
        history=settings.rollout.history,
        seed=settings.seed,
        threads=settings.model.threads,
        progress=ShownLessons(),
    )


def train(settings: RunConfig) -> dict[str, float]:
    """Trains; returns the wall seconds by part."""
    from agentrl.train import train as run
    from agentrl.train.metrics import read_metrics
    from agentrl.train.plan import batch_plan

    console.print(batch_plan(settings), highlight=False)
    if run(settings)["interrupted"]:
        console.print(f"Stopped early; go on with: agentrl train {settings.run_dir}/config.yaml --resume")
        raise typer.Exit()
    parts: dict[str, float] = {}
    for record in read_metrics(Path(settings.run_dir) / "metrics.jsonl"):
        for name, value in (record.get("seconds") or {}).items():
            parts[name] = parts.get(name, 0.0) + value
    return parts


def played(settings: RunConfig, model: str, levels: int) -> dict[str, EvalResult]:
    """Plays `levels` held-out levels at the training temperature and greedily."""
    from agentrl.evaluate import evaluate
    from agentrl.policy import Sampling, load_policy
    from agentrl.rollout import run

    player = load_policy("transformers", model=str(Path(settings.run_dir).parent / model))
    try:
        return {
            name: evaluate(
                player,
                settings.env,
                episodes=levels,
                seed=settings.eval.seed,
                rollout=settings.rollout,
                sampling=Sampling(temperature=temperature, max_new_tokens=settings.rollout.max_new_tokens),
                outcome=settings.outcome,
            )
            for name, temperature in (("sampled", settings.rollout.temperature), ("greedy", 0.0))
        }
    finally:
        run(player.aclose())


def summarise(
    settings: RunConfig, results: dict[str, dict[str, EvalResult]], seconds: dict[str, float]
) -> dict[str, Any]:
    """Returns what ``summary.json`` holds beside the hash of the settings."""
    from agentrl.train.metrics import peak_memory_mb

    return {
        "base_success": results["base"]["sampled"].success.model_dump(),
        "final_success": results["final"]["sampled"].success.model_dump(),
        "base_success_greedy": results["base"]["greedy"].success.model_dump(),
        "final_success_greedy": results["final"]["greedy"].success.model_dump(),
        "iterations": settings.iterations,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_rss_mb": round(peak_memory_mb(), 1),
        "seed": settings.seed,
    }


def plot(settings: RunConfig, out: Path) -> None:
    """Draws the learning curve."""
    from agentrl.report.curves import plot_run
    from agentrl.train.metrics import read_metrics

    title = f"{settings.credit.method.upper()} on {settings.env.id}: {settings.name}, seed {settings.seed}"
    plot_run(read_metrics(Path(settings.run_dir) / "metrics.jsonl"), out / "learning_curve.png", title)


def write_page(settings: RunConfig, path: Path) -> None:
    """Writes the report of the run, one HTML file."""
    from agentrl.report.data import make_report
    from agentrl.report.page import render

    with atomic_write(path) as file:
        file.write(render(make_report([settings.run_dir])))


def report(settings: RunConfig, results: dict[str, dict[str, EvalResult]]) -> Table:
    """Returns the table that ends the demo."""
    levels = results["base"]["sampled"].episodes
    table = Table(title=f"{levels} held-out levels (95 % Wilson interval)", title_justify="left")
    for column in ("agent", f"success, sampled at T={settings.rollout.temperature:g}", "success, greedy", "turns"):
        table.add_column(column)
    for name, label in (("base", "base (cloned)"), ("final", f"after {settings.iterations} iterations")):
        sampled, greedy = results[name]["sampled"], results[name]["greedy"]
        table.add_row(label, str(sampled.success), str(greedy.success), f"{sampled.turns:.1f}")
    return table
