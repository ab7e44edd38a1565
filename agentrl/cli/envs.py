"""``agentrl envs``, ``check-env`` and ``new-env``: find an environment, prove one, begin one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from agentrl.cli.common import EnvArg, EpisodeProgress, assignments, check_output, console, errors, table
from agentrl.cli.listing import signature
from agentrl.errors import AgentRLError, UserError
from agentrl.terminal import visible

if TYPE_CHECKING:
    from agentrl.envs.check import Check
    from agentrl.evaluate.environments import AgentStats

EXIT_FAILED = 1


def add_commands(app: typer.Typer) -> None:
    """Adds `envs`, `check-env` and `new-env`."""
    app.command("envs")(envs)
    app.command("check-env")(check_env)
    app.command("new-env")(new_env)


def envs(
    env: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ENV]...", help="Show these: arguments, instructions and first view.", show_default=False
        ),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Play the scripted agents and show how they fare (of all, or of ENV).")
    ] = False,
    episodes: Annotated[int, typer.Option(metavar="N", min=1, help="With --stats: episodes of each agent.")] = 200,
    out: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="With --stats: write the numbers as JSON.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="DIR", help="With --stats: count tokens with this model's tokenizer."),
    ] = None,
) -> None:
    """List the environments, show some, or measure them.

    Example:  [b]agentrl envs Sokoban-v0[/b]
    """
    from agentrl.envs import environment_ids
    from agentrl.envs.registry import load_plugins

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken plugins are listed below
        broken = load_plugins()
    if stats:
        _show_stats(env or list(environment_ids()), episodes, out, model)
        return
    if out is not None or model is not None:
        raise UserError("--json and --model go with --stats")
    for env_id in env or ():
        _show_environment(env_id)
    if not env:
        _list_environments(broken)


def check_env(
    env: Annotated[str, typer.Argument(metavar="ENV", help="Environment id, or module:Id-v0.")],
    env_arg: EnvArg = None,
    actions: Annotated[int, typer.Option(metavar="N", min=1, help="Random and hostile actions to survive.")] = 1000,
    seeds: Annotated[int, typer.Option(metavar="N", min=2, help="Seeds whose episodes are compared.")] = 5,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")] = None,
) -> None:
    """Prove that an environment keeps the contract; a failed check says how to mend it (exit code 1).

    Example:  [b]agentrl check-env Lock-v0 --env-arg length=4[/b]
    """
    from agentrl.envs.check import check_env as run

    if out is not None:
        check_output(out)
    report = run(
        env, kwargs=assignments(env_arg, "--env-arg"), seeds=range(seeds), actions=actions, on_check=_show_check
    )
    if out is not None:
        out.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    failed = sum(not check.passed for check in report.checks)
    if failed:
        console.print(Text(f"{failed} of {len(report.checks)} checks failed", style="bold red"))
        raise typer.Exit(EXIT_FAILED)
    console.print(Text(f"{env} passes all {len(report.checks)} checks", style="bold green"), soft_wrap=True)


def new_env(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call it, for instance treasure-hunt.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write to.")] = Path("."),
) -> None:
    """Write a small working environment and its test, to make your own out of.

    Example:  [b]agentrl new-env treasure-hunt[/b]
    """
    from agentrl.envs.scaffold import new_environment

    made = new_environment(name, out)
    where = "" if out == Path(".") else f"cd {out} && "
    console.print(f"{made.module}\n{made.test}", highlight=False, soft_wrap=True)
    for command in (f"agentrl check-env {made.env_id}", f"pytest {made.test.name}"):
        console.print(f"{where}python -m {command}", style="cyan", highlight=False, soft_wrap=True)


def _show_check(check: Check) -> None:
    verdict, _, rest = str(check).partition(" ")
    line = Text(verdict, style="bold red" if not check.passed else "yellow" if check.warning else "green")
    console.print(line.append(f" {rest}", style="default not bold"), soft_wrap=True)


def _list_environments(broken: dict[str, str]) -> None:
    import gymnasium as gym

    from agentrl.envs import environment_ids

    listing = Table(title="Environments", title_justify="left", title_style="bold")
    listing.add_column("id", style="cyan", no_wrap=True)
    listing.add_column("what the agent does")
    listing.add_column("turn limit", justify="right")
    for env_id, summary in environment_ids().items():
        limit = gym.registry[env_id].max_episode_steps
        listing.add_row(env_id, Text(summary), "none" if limit is None else str(limit))
    console.print(listing)
    for name, reason in broken.items():
        errors.print(Text(f"plugin {name!r} could not be loaded: {reason}", style="yellow"), soft_wrap=True)


def _show_environment(env_id: str) -> None:
    from agentrl.envs import environment_ids, make
    from agentrl.envs.registry import scripted_agents
    from agentrl.remote.address import is_ours, name_of
    from agentrl.types import text_of

    world = make(env_id)
    observation, _ = world.reset(seed=0)
    base: Any = world.unwrapped
    limit = None if world.spec is None else world.spec.max_episode_steps
    agents = [f"{role}: {_called(agent)}" for role, agent in scripted_agents(env_id).items()]
    if is_ours(env_id):
        summary = base.fleet.description.summary
        arguments = "\n".join(f"{name}={value!r}" for name, value in base.arguments.items()) or "none"
    else:
        summary = environment_ids().get(name_of(env_id), "")
        arguments = signature(type(base), leave_out=("render_mode",))
    rows = [
        ("what the agent does", summary),
        ("turn limit", limit),
        ("arguments (--env-arg)", arguments),
        ("scripted agents", "\n".join(agents)),
    ]
    console.print(table(env_id, rows))
    if instructions := getattr(base, "instructions", ""):
        console.print(Panel(Text(visible(instructions.strip())), title="instructions", title_align="left"))
    console.print(Panel(Text(visible(text_of(observation))), title="first observation of seed 0", title_align="left"))
    world.close()


def _called(agent: Any) -> str:
    """Returns the options of `collect` and `eval` that name an agent's policy."""
    return " ".join([agent.policy, *(f"--policy-arg {key}={value}" for key, value in agent.options.items())])


def _show_stats(env_ids: list[str], episodes: int, out: Path | None, model: str | None) -> None:
    if out is not None:
        check_output(out)
    count = None if model is None else _tokenizer(model)
    measured, left_out = [], []
    for env_id in env_ids:
        stats, problems = _measure(env_id, episodes, count)
        measured += stats
        left_out += problems
        if out is not None:  # after each: one that takes hours or dies costs no other's numbers
            report = {"episodes": episodes, "agents": [s.model_dump() for s in measured], "left_out": left_out}
            out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if measured:
        console.print(_stats_table(measured, episodes, "words" if count is None else "tokens"))
    for problem in left_out:
        errors.print(Text(problem, style="yellow"), soft_wrap=True)


def _stats_table(measured: list[AgentStats], episodes: int, unit: str) -> Table:
    """Returns a block of rows for each environment, narrow enough for 80 columns."""
    from agentrl.envs.registry import ROLES

    note = f"{unit}: mean over observations; steps/s: of the environment alone"
    shown = Table(title=f"{episodes} episodes of each agent, with 95 % intervals", caption=note, box=SIMPLE_HEAD)
    shown.title_justify = shown.caption_justify = "left"
    shown.title_style, shown.caption_style = "bold", "dim"
    shown.padding = 0  # the box has a space between columns
    shown.add_column("agent", no_wrap=True)
    for name in ("success, %", "outcome", "turns", unit, "steps/s"):
        shown.add_column(name, justify="right", no_wrap=True)
    for env_id in dict.fromkeys(s.env for s in measured):
        shown.add_row(Text(env_id, style="cyan"))
        found = {s.role: s for s in measured if s.env == env_id}
        for role in ROLES:
            if (s := found.get(role)) is None:
                shown.add_row(Text(f"  {role}: none", style="dim"))
                continue
            rate = f"{100 * s.success.value:.3g} [{100 * s.success.low:.3g}, {100 * s.success.high:.3g}]"
            length = s.words if s.tokens is None else s.tokens
            numbers = (f"{s.turns:.1f}", f"{length:.0f}", f"{s.steps_per_second:,.0f}")
            shown.add_row(f"  {role}", rate, str(s.outcome), *numbers)
    return shown


def _measure(env_id: str, episodes: int, tokens: Callable[[str], int] | None) -> tuple[list[AgentStats], list[str]]:
    """Returns the numbers of an environment's agents, and what could not be measured."""
    from agentrl.envs import make
    from agentrl.envs.registry import scripted_agents
    from agentrl.evaluate.environments import agent_stats

    try:
        make(env_id).close()  # says what to install where an extra is missing; module:Id is registered by it
    except UserError as error:
        return [], [f"{env_id}: {error}"]
    stats: list[AgentStats] = []
    agents = scripted_agents(env_id)
    problems = [] if agents else [f"{env_id}: registered without scripted agents"]
    for role in agents:
        with EpisodeProgress(f"{env_id}, {role}", episodes) as progress:
            try:
                stats.append(agent_stats(env_id, role, episodes=episodes, tokens=tokens, on_episode=progress))
            except AgentRLError as error:
                problems.append(f"{env_id}, {role}: {error}")
    return stats, problems


def _tokenizer(model: str) -> Callable[[str], int]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: no tokenizer can be loaded from it: {error}") from error
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
