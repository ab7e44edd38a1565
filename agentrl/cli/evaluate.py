"""``agentrl eval``: success on held-out tasks, with its interval, in one environment or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from agentrl.cli.common import (
    EnvArg,
    EpisodeProgress,
    History,
    Instructions,
    MaxNewTokens,
    MaxTurns,
    ModelDir,
    PolicyArg,
    PolicyName,
    Threads,
    assignments,
    check_output,
    console,
    errors,
    make_policy,
    may_leave,
    rollout_settings,
    success_bar,
    table,
    usage_rows,
)
from agentrl.errors import EnvironmentFailure, InfrastructureError, UserError
from agentrl.terminal import visible

if TYPE_CHECKING:
    from agentrl.config import EnvConfig, RunConfig
    from agentrl.evaluate import EvalReport, EvalResult, Proportion
    from agentrl.policy import Policy
    from agentrl.rollout import Summary

EXIT_BELOW = 3
"""``--fail-under`` was not reached."""
EXIT_FAILURES = 4
"""More infrastructure failures than ``--max-failures``, or nothing else: the figures say too little, or are none."""
_BETWEEN_S = 0.5
"""Seconds between two running intervals."""


def add_commands(app: typer.Typer) -> None:
    """Adds `eval`."""
    app.command("eval")(evaluate)


def evaluate(
    targets: Annotated[
        list[str], typer.Argument(metavar="ENV...|CONFIG", help="Environment ids, or the YAML file of a run.")
    ],
    policy: PolicyName = None,
    policy_arg: PolicyArg = None,
    model: ModelDir = None,
    episodes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="In each environment; default 256, or the file's.")
    ] = None,
    per_task: Annotated[
        int, typer.Option("--per-task", metavar="K", min=1, help="Episodes of each task: pass@k and pass^k.")
    ] = 1,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Of the first task; default 10^12, or the file's.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="X", min=0, help="Of a model's sampling; 0 = greedy.")
    ] = None,
    env_arg: EnvArg = None,
    max_turns: MaxTurns = None,
    instructions: Instructions = None,
    history: History = None,
    max_new_tokens: MaxNewTokens = None,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Episodes alive at once; default 256, or the file's.")
    ] = None,
    threads: Threads = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result to this file.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep every episode here; the same command again plays the rest.")
    ] = None,
    fail_under: Annotated[
        float | None,
        typer.Option("--fail-under", metavar="X", min=0, max=1, help="Exit with 3 where success is below this."),
    ] = None,
    max_failures: Annotated[
        int | None,
        typer.Option(
            "--max-failures",
            metavar="N",
            min=0,
            help="Exit with 4 where infrastructure ended more episodes; default: 0 with --fail-under, else any number.",
        ),
    ] = None,
) -> None:
    """Measure a policy or a model on held-out tasks.

    With the YAML file of a run, environment, history, limits and evaluation settings come from there. With
    [b]--env-arg[/b] and [b]--max-turns[/b] every environment is given the same.

    Example:  [b]agentrl eval Sokoban-v0 Lock-v0 --policy random --episodes 256 --out runs/random[/b]

    Example:  [b]agentrl eval Sokoban-v0 --model models/sft --per-task 4 --fail-under 0.8[/b]
    """
    from agentrl.evaluate import evaluate as measure
    from agentrl.evaluate.result import EvalReport, EvaluationFailed
    from agentrl.rollout import run

    config, envs = _settings(targets)
    arguments = assignments(env_arg, "--env-arg")
    for env in envs:
        env.kwargs, env.eval_kwargs = env.kwargs | arguments, env.eval_kwargs | arguments
        env.max_turns = max_turns or env.max_turns
        env.instructions = env.instructions if instructions is None else instructions
    if temperature is None:
        temperature = config.eval.temperature
    rollout, sampling = rollout_settings(config.rollout, history, temperature, max_new_tokens)
    rollout.concurrency = concurrency or rollout.concurrency
    if json is not None:
        check_output(json)
    count = episodes or config.eval.episodes
    options = assignments(policy_arg, "--policy-arg")
    player = make_policy(policy, model, options, threads or config.model.threads)
    watch = _Watch(player, [env.id for env in envs], count, per_task)
    failed: InfrastructureError | None = None
    try:
        with watch, may_leave(player):
            found = measure(
                player,
                envs,
                episodes=count,
                per_task=per_task,
                seed=config.eval.seed if seed is None else seed,
                rollout=rollout,
                sampling=sampling,
                outcome=config.outcome,
                out=out,
                policy_options={**options, "model": model},
                **watch.hooks,
            )
            watch.running.settle(found.results[-1].success)
    except EnvironmentFailure:
        raise
    except InfrastructureError as error:
        failed = error
        found = error.finished if isinstance(error, EvaluationFailed) else EvalReport(policy=player.name, results=[])
    except KeyboardInterrupt:
        if out is not None:
            of = f"{watch.episodes} of {count * len(envs)} episodes"
            errors.print(f"{out} holds {of}; the same command plays the rest", soft_wrap=True)
        raise
    finally:
        run(player.aclose())
    if failed is None or len(envs) > 1:
        result: EvalReport | EvalResult = found if len(envs) > 1 else found.results[0]
        if json is not None:
            _write(result, json)
        if isinstance(result, EvalReport) and len(result.results) > 1:
            console.print(across(result))
    for one in found.results:
        console.print(
            table(f"{one.policy} in {one.env}", [*_rows(one), *(usage_rows(player) if len(envs) == 1 else ())])
        )
    if len(envs) > 1 and (usage := usage_rows(player)):
        console.print(table("Cost", usage))
    if failed is not None:
        errors.print(Text(visible(f"Error: {failed}"), style="bold red"), soft_wrap=True)
        raise typer.Exit(EXIT_FAILURES)
    check_reached(found.results, fail_under, max_failures)


class Running:
    """The success of one policy in one environment so far, with the interval that its result will have.

    As text it is what a bar shows: ``45.0% [40.1, 50.2]``, "" without a scored episode. The interval is computed when
    the bar is drawn, and not each time.

    Args:
        per_task: episodes of each task; from 2 on the interval is over tasks.
        clock: seconds; for tests.
    """

    def __init__(self, per_task: int, clock: Callable[[], float] = monotonic) -> None:
        self._per_task, self._clock = per_task, clock
        self._computed = -_BETWEEN_S
        self.reset()

    def reset(self) -> None:
        """Begins anew, in another environment or with another policy."""
        self._episodes: list[tuple[bool, int]] = []
        self._text, self._of = "", 0

    def add(self, one: Summary) -> None:
        """Counts an episode; infrastructure failures are in no rate."""
        if one.scorable:
            self._episodes.append((one.success, one.seed))

    def __str__(self) -> str:
        if len(self._episodes) > self._of and self._clock() - self._computed >= _BETWEEN_S:
            self.settle()
        return self._text

    def settle(self, found: Proportion | None = None) -> None:
        """Takes the result, or computes what there is now."""
        from agentrl.evaluate import cluster_proportion, wilson

        episodes = self._episodes.copy()  # a bar is drawn by a thread of its own
        if not episodes:
            return
        successes, tasks = zip(*episodes, strict=True)
        if found is None:
            clustered = self._per_task > 1
            found = (
                cluster_proportion(successes, tasks, resamples=500)
                if clustered
                else wilson(sum(successes), len(successes))
            )
        self._text, self._of, self._computed = short(found), len(episodes), self._clock()


class _Watch:
    """Progress over the episodes of all environments, with the running success in the one that is being played."""

    def __init__(self, player: Policy, envs: Sequence[str], count: int, per_task: int) -> None:
        self.episodes = 0
        self.running = Running(per_task)
        self._plain = EpisodeProgress(envs[0], count, shown=False) if player.interactive else None
        self.hooks: dict[str, Any] = {"on_summary": self._add}
        if self._plain is not None:
            self.hooks["on_episode"] = self._plain
        self._bar = success_bar(shown=self._plain is None)
        self._envs, self._count = envs, count
        self._task = self._bar.add_task(envs[0], total=count * len(envs), success=self.running)

    def _add(self, one: Summary) -> None:
        place, inside = divmod(self.episodes, self._count)
        if inside == 0:
            self.running.reset()
        self.episodes += 1
        self.running.add(one)
        env = self._envs[min(place, len(self._envs) - 1)]
        self._bar.update(self._task, completed=self.episodes, description=env)

    def __enter__(self) -> _Watch:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self.running.settle()
        self._bar.live.transient = kind is not None and not self.episodes  # no empty bar above an error
        self._bar.stop()


def short(rate: Proportion) -> str:
    """Returns ``45.0% [40.1, 50.2]``."""
    return f"{rate.value:.1%} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def check_reached(results: Sequence[EvalResult], least: float | None, most_failures: int | None = None) -> None:
    """Exits where an environment's episodes failed or its success is too low, naming each.

    Args:
        results: one for each environment.
        least: success below it exits with 3; None: any will do.
        most_failures: more infrastructure failures in one environment exit with 4, whatever the success of the other
            episodes is; None is 0 where `least` is given, and any number otherwise.
    """
    if most_failures is None and least is not None:
        most_failures = 0
    below = [one for one in results if least is not None and one.success.value < least]
    for one in below:
        errors.print(
            f"{one.policy} in {one.env}: success {one.success.value:.1%} is below {least:.1%}", style="bold red"
        )
    failed = [one for one in results if most_failures is not None and one.infrastructure_failures > most_failures]
    for one in failed:
        errors.print(
            f"{one.policy} in {one.env}: infrastructure ended {one.infrastructure_failures} of {one.episodes} episodes "
            f"and --max-failures is {most_failures}; success is that of the other {one.success.episodes}. The first: "
            f"{one.first_failure}",
            style="bold red",
            soft_wrap=True,
        )
    if failed:
        raise typer.Exit(EXIT_FAILURES)
    if below:
        raise typer.Exit(EXIT_BELOW)


def _settings(targets: Sequence[str]) -> tuple[RunConfig, list[EnvConfig]]:
    """Returns the run's configuration, or the defaults, and the environments to evaluate in."""
    from agentrl.config import EnvConfig, RunConfig, load_config

    files = [target for target in targets if target.endswith((".yaml", ".yml"))]
    if not files:
        return RunConfig(), [EnvConfig(id=target) for target in targets]
    if len(targets) > 1:
        raise UserError(
            f"{files[0]!r} beside other targets: give environment ids, or the file of one run (agentrl leaderboard "
            "plays several policies in several environments)"
        )
    config = load_config(files[0])
    return config, [config.env]


def across(report: EvalReport) -> Table:
    """Returns the table of several environments, one a row."""
    result = Table(
        title=f"{report.policy} in {len(report.results)} environments", title_justify="left", title_style="bold"
    )
    result.add_column("environment", style="cyan", overflow="fold")
    for column in ("success", "outcome", "turns", "failed"):
        result.add_column(column, justify="right")
    for one in report.results:
        failed = str(one.infrastructure_failures or "-")
        result.add_row(one.env, short(one.success), f"{one.outcome.value:.3g}", f"{one.turns:.1f}", failed)
    if len(report.results) > 1:
        result.add_section()
        result.add_row("mean", f"{report.success:.1%}")
    return result


def _rows(result: EvalResult) -> list[tuple[str, object]]:
    over = "over tasks (bootstrap)" if result.success_interval == "bootstrap" else "over episodes (Wilson)"
    if result.success_interval == "wilson" and result.per_task > 1:
        over = "over tasks, which all have the same rate (Wilson)"
    rows: list[tuple[str, object]] = [
        ("success", f"{result.success}, 95 % interval {over}"),
        ("outcome, mean", result.outcome),
        *_pass_rows(result),
        ("turns, mean", result.turns),
        ("action tokens, mean", result.action_tokens or None),
        ("invalid actions", f"{result.invalid_action_rate:.1%}"),
        ("stopped by", _stops(result)),
        ("seeds", f"{result.seed}..{result.seed + result.tasks - 1}"),
        ("environment arguments", result.env_kwargs),
        ("temperature", result.temperature),
        ("seconds", f"{_seconds(result.seconds)}, {_seconds(result.episode_seconds)} an episode"),
    ]
    if result.per_task > 1:
        rows.insert(0, ("episodes", f"{result.episodes} = {result.tasks} tasks x {result.per_task}"))
    if result.infrastructure_failures:
        failed = f"{result.infrastructure_failures}; the first: {result.first_failure}"
        rows.insert(1, ("failed (in no mean)", failed))
    return rows


def _seconds(value: float) -> str:
    """Two digits, and no exponent."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _pass_rows(result: EvalResult) -> list[tuple[str, object]]:
    """pass@k and pass^k for k = 1, 2, 4, ... and the last; ``--json`` has all."""
    last = max(result.pass_at_k, default=0)
    shown = [k for k in result.pass_at_k if k == last or k & (k - 1) == 0]
    rows: list[tuple[str, object]] = []
    for title, values in (("pass@k", result.pass_at_k), ("pass^k", result.pass_hat_k)):
        if shown:
            rows.append((title, ", ".join(f"{k}: {values[k].value:.1%}" for k in shown)))
    return rows


def _stops(result: EvalResult) -> str:
    parts = []
    for reason, one in result.by_stop_reason.items():
        rate = "" if one.success is None else f" ({one.success:.0%} success)"
        parts.append(f"{one.episodes:,} x {reason}{rate}")
    return ", ".join(parts)


def _write(result: EvalResult | EvalReport, path: Path) -> None:
    from agentrl.files import atomic_write

    with atomic_write(path) as file:
        file.write(result.model_dump_json(indent=2).encode() + b"\n")
