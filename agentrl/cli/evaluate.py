"""``agentrl eval``: success on held-out tasks, with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
    make_policy,
    rollout_settings,
    table,
)

if TYPE_CHECKING:
    from agentrl.config import RunConfig
    from agentrl.evaluate import EvalResult


def add_commands(app: typer.Typer) -> None:
    """Adds `eval`."""
    app.command("eval")(evaluate)


def evaluate(
    target: Annotated[str, typer.Argument(metavar="ENV|CONFIG", help="Environment id, or the YAML file of a run.")],
    policy: PolicyName = None,
    policy_arg: PolicyArg = None,
    model: ModelDir = None,
    episodes: Annotated[int | None, typer.Option(metavar="N", min=1, help="Tasks; default 256, or the file's.")] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of the first task; default 10^12, or the file's.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="X", min=0, help="Of a model's sampling; 0 = greedy.")
    ] = None,
    env_arg: EnvArg = None,
    max_turns: MaxTurns = None,
    instructions: Instructions = None,
    history: History = None,
    max_new_tokens: MaxNewTokens = None,
    threads: Threads = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result to this file.")
    ] = None,
) -> None:
    """Measure a policy or a model on held-out tasks, one episode each.

    With the YAML file of a run, environment, history, limits and evaluation settings come from there.

    Example:  [b]agentrl eval Sokoban-v0 --model models/sft --env-arg split=test --episodes 256[/b]
    """
    from agentrl.evaluate import evaluate as measure
    from agentrl.rollout import run

    config = _settings(target)
    env, arguments = config.env, assignments(env_arg, "--env-arg")
    env.kwargs, env.eval_kwargs = env.kwargs | arguments, env.eval_kwargs | arguments
    env.max_turns = max_turns or env.max_turns
    env.instructions = env.instructions if instructions is None else instructions
    if temperature is None:
        temperature = config.eval.temperature
    rollout, sampling = rollout_settings(config.rollout, history, temperature, max_new_tokens)
    if json is not None:
        check_output(json)
    count = episodes or config.eval.episodes
    player = make_policy(policy, model, assignments(policy_arg, "--policy-arg"), threads or config.model.threads)
    try:
        with EpisodeProgress(env.id, count) as progress:
            result = measure(
                player,
                env,
                episodes=count,
                seed=config.eval.seed if seed is None else seed,
                rollout=rollout,
                sampling=sampling,
                outcome=config.outcome,
                on_episode=progress,
            )
    finally:
        run(player.aclose())
    if json is not None:
        _write(result, json)
    console.print(table(f"{result.policy} in {result.env}", _rows(result)))


def _settings(target: str) -> RunConfig:
    """Returns the run's configuration, or the defaults with the environment called `target`."""
    from agentrl.config import RunConfig, load_config

    if target.endswith((".yaml", ".yml")):
        return load_config(target)
    config = RunConfig()
    config.env.id = target
    return config


def _rows(result: EvalResult) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        ("success", result.success),
        ("outcome, mean", result.outcome),
        ("turns, mean", result.turns),
        ("action tokens, mean", result.action_tokens or None),
        ("invalid actions", f"{result.invalid_action_rate:.1%}"),
        ("stopped by", result.stop_reasons),
        ("seeds", f"{result.seed}..{result.seed + result.episodes - 1}"),
        ("environment arguments", result.env_kwargs),
        ("temperature", result.temperature),
        ("seconds", result.seconds),
    ]
    if result.infrastructure_failures:
        rows.insert(1, ("failed (in no mean)", result.infrastructure_failures))
    return rows


def _write(result: EvalResult, path: Path) -> None:
    from agentrl.files import atomic_write

    with atomic_write(path) as file:
        file.write(result.model_dump_json(indent=2).encode() + b"\n")
