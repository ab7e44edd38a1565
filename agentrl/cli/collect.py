"""``agentrl collect``: episodes of any policy, written to a JSONL file."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

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
    errors,
    make_policy,
    may_leave,
    rollout_settings,
    table,
    usage_rows,
)
from agentrl.errors import UserError

if TYPE_CHECKING:
    from agentrl.rollout import Collected


def add_commands(app: typer.Typer) -> None:
    """Adds `collect`."""
    app.command("collect")(collect)


def collect(
    env: Annotated[str, typer.Argument(metavar="ENV", help="Environment id ([b]agentrl envs[/b] lists all).")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSONL file to write.")],
    policy: PolicyName = None,
    policy_arg: PolicyArg = None,
    model: ModelDir = None,
    episodes: Annotated[int, typer.Option(metavar="N", min=1, help="Episodes, a multiple of the group size.")] = 64,
    group_size: Annotated[int, typer.Option(metavar="N", min=1, help="Episodes of each task.")] = 1,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of the first task (the next has seed + 1) and of the actions.")
    ] = 0,
    env_arg: EnvArg = None,
    max_turns: MaxTurns = None,
    instructions: Instructions = None,
    history: History = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="X", min=0, help="Of a model's sampling; 0 = greedy.")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    threads: Threads = None,
) -> None:
    """Play episodes with any policy and store them, for instance as demonstrations.

    Example:  [b]agentrl collect Sokoban-v0 --policy random --episodes 100 --out demos.jsonl[/b]
    """
    from agentrl.buffer import write_jsonl
    from agentrl.config import EnvConfig, OutcomeConfig
    from agentrl.rollout import Collector, Task, run

    if episodes % group_size:
        raise UserError(f"--episodes {episodes} is no multiple of --group-size {group_size}")
    kwargs = assignments(env_arg, "--env-arg")
    settings = EnvConfig(id=env, kwargs=kwargs, max_turns=max_turns, instructions=instructions)
    rollout, sampling = rollout_settings(None, history, temperature, max_new_tokens)
    check_output(out)
    player = make_policy(policy, model, assignments(policy_arg, "--policy-arg"), threads)
    tasks = [Task(seed + i, f"{seed + i}", group_size) for i in range(episodes // group_size)]
    progress = EpisodeProgress(env, episodes, shown=not player.interactive)
    try:
        with (
            progress,
            may_leave(player),
            Collector(player, settings, rollout, OutcomeConfig(), on_episode=progress) as collector,
        ):
            collected = collector.collect(tasks, sampling=sampling, seed=seed)
    except KeyboardInterrupt:
        write_jsonl(out, progress.episodes)
        errors.print(
            f"{out} holds the {len(progress.episodes)} of {episodes} episodes that were finished", soft_wrap=True
        )
        raise
    finally:
        run(player.aclose())
    write_jsonl(out, collected.trajectories)
    console.print(table(f"{player.name} in {env}", [*_summary(collected), *usage_rows(player), ("written to", out)]))


def _summary(collected: Collected) -> list[tuple[str, Any]]:
    episodes = collected.trajectories
    turns = [turn for t in episodes for turn in t.turns]
    tokens = sum(t.action_tokens for t in episodes)
    seconds = collected.seconds["total"]
    rows: list[tuple[str, Any]] = [
        ("episodes", len(episodes)),
        ("groups", len({t.group_id for t in episodes})),
        ("success", f"{fmean(t.success for t in episodes):.1%}" if episodes else None),
        ("outcome, mean", fmean(t.outcome for t in episodes) if episodes else None),
        ("turns, mean", len(turns) / len(episodes) if episodes else None),
        ("action tokens", tokens or None),
        ("invalid actions", f"{fmean(t.info.get('valid_action') is False for t in turns):.1%}" if turns else None),
        ("stopped by", collected.counts),
        ("seconds", seconds),
        ("episodes per second", len(episodes) / seconds if seconds else None),
    ]
    if collected.failed or collected.retried:
        rows += [("failed (not written)", len(collected.failed)), ("played again", collected.retried)]
        rows += [("first failure", collected.failed[0].error)] if collected.failed else []
    return rows
