"""``agentrl replay`` and ``rescore``: stored trajectories, played in the terminal and scored again."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Group
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from agentrl.cli.common import assignments, console, errors, shown
from agentrl.errors import DataError, UserError
from agentrl.terminal import visible

if TYPE_CHECKING:
    from agentrl.types import Content, Trajectory, Turn

Wanted = Literal["success", "failure", "unscorable"]


def add_commands(app: typer.Typer) -> None:
    """Adds `replay` and `rescore`."""
    app.command("replay")(replay)
    app.command("rescore")(rescore)


SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Go on behind lines that cannot be read.")]


def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Trajectory file (JSONL).")],
    id: Annotated[str | None, typer.Option("--id", metavar="ID", help="Play the trajectory with this id.")] = None,
    index: Annotated[
        int | None, typer.Option(metavar="N", help="Play the N-th, from 0 (negative: from the end).")
    ] = None,
    outcome: Annotated[Wanted | None, typer.Option(help="Play the first that ended so.")] = None,
    step: Annotated[bool, typer.Option("--step", help="Wait for Enter before each turn; q leaves.")] = False,
    speed: Annotated[
        float, typer.Option(metavar="X", min=0.01, help="Turns a second, where this is a terminal.")
    ] = 1.0,
    list_all: Annotated[bool, typer.Option("--list", help="List the trajectories of the file instead.")] = False,
    skip_broken: SkipBroken = False,
) -> None:
    """Play a stored trajectory turn by turn, as the agent saw it.

    Example:  [b]agentrl replay runs/demo/train/trajectories/iteration-000000.jsonl --outcome success --step[/b]
    """
    episodes = read(file, skip_broken)
    if list_all:
        console.print(_listing(episodes))
        return
    place = choose(episodes, id, index, outcome)
    one = episodes[place]
    console.print(_heading(one, place, len(episodes)))
    live = console.is_terminal
    if step and not (live and sys.stdin.isatty()):
        raise UserError("--step waits for a key, and this is no terminal; leave it out to print all turns")
    for number, turn in enumerate(one.turns):
        if number and live and not step:
            time.sleep(1 / speed)
        if step and number and console.input("[dim]Enter: next turn, q: leave [/dim]").strip().lower() == "q":
            return
        console.print(_turn(number, turn))
    console.print(_ending(one))


def read(file: Path, skip_broken: bool) -> list[Trajectory]:
    """Returns the trajectories of a file.

    Raises:
        DataError: no such file, a broken line (without `skip_broken`), or no trajectory in it.
    """
    from agentrl.buffer import read_jsonl

    if file.is_dir():
        inside = sorted([*file.glob("*.jsonl"), *file.glob("trajectories/*.jsonl")])
        hint = f"; for instance {inside[0]}" if inside else ""
        raise DataError(f"{file} is a folder; give a trajectory file{hint}")

    def skipped(error: DataError) -> None:
        errors.print(_text(f"skipped {error}", "yellow"), soft_wrap=True)

    episodes = read_jsonl(file, on_error="skip" if skip_broken else "raise", on_skip=skipped)
    if not episodes:
        raise DataError(f"{file} holds no trajectory")
    return episodes


def choose(episodes: Sequence[Trajectory], id: str | None, index: int | None, outcome: Wanted | None) -> int:
    """Returns the place of the trajectory that was asked for; by default the first.

    Raises:
        UserError: no such trajectory, or two ways of asking.
    """
    if sum(value is not None for value in (id, index, outcome)) > 1:
        raise UserError("--id, --index and --outcome each name a trajectory; give one of them")
    if id is not None:
        for place, one in enumerate(episodes):
            if one.id == id:
                return place
        known = ", ".join(visible(one.id) for one in episodes[:5]) + (", ..." if len(episodes) > 5 else "")
        raise UserError(
            f"no trajectory with the id {id!r} among {len(episodes)}; there are: {known} (--list shows all)"
        )
    if index is not None:
        if not -len(episodes) <= index < len(episodes):
            raise UserError(f"--index {index}: the file has {len(episodes)} trajectories, 0 to {len(episodes) - 1}")
        return index % len(episodes)
    if outcome is not None:
        for place, one in enumerate(episodes):
            if _ended(one) == outcome:
                return place
        raise UserError(f"none of {len(episodes)} trajectories ended with {outcome}")
    return 0


def _text(said: str, style: str = "") -> Text:
    return Text(visible(said), style=style)


def _ended(one: Trajectory) -> Wanted:
    if not one.scorable:
        return "unscorable"
    return "success" if one.success else "failure"


def _listing(episodes: Sequence[Trajectory]) -> Table:
    result = Table(title=f"{len(episodes)} trajectories", title_justify="left", title_style="bold")
    for column in ("N", "id", "turns", "outcome", "success", "stopped by"):
        result.add_column(column, overflow="fold", justify="right" if column in ("N", "turns", "outcome") else "left")
    for number, one in enumerate(episodes):
        yes = shown(one.success) if one.scorable else "-"
        result.add_row(
            str(number), _text(one.id), str(len(one.turns)), f"{one.outcome:.4g}", yes, one.stop_reason.value
        )
    return result


def _heading(one: Trajectory, place: int, count: int) -> Group:
    who = f"{one.policy or 'policy'} in {one.env}, seed {one.seed}"
    parts: list[Any] = [Rule(_text(f"{one.id} ({place + 1} of {count})", "bold")), _text(who, "dim")]
    if arguments := {**one.task.get("kwargs", {}), **one.task.get("options", {})}:
        parts.append(_text(shown(arguments), "dim"))
    if one.instructions:
        parts.append(Panel(_text(one.instructions), title="instructions", title_align="left", border_style="dim"))
    return Group(*parts)


def _turn(number: int, turn: Turn) -> Group:
    facts = [f"reward {turn.reward:+.4g}"]
    if turn.info.get("valid_action") is False:
        facts.append("no action")
    if turn.action_ids:
        facts.append(f"{len(turn.action_ids)} tokens, log-prob {sum(turn.action_logprobs):.2f} nats")
    return Group(
        Rule(f"turn {number}", align="left", style="dim"),
        _text(_words(turn.observation)),
        _text("> " + turn.action, "bold cyan"),
        Text("  ".join(facts), style="dim"),
    )


def _ending(one: Trajectory) -> Group:
    parts: list[Any] = [Rule("end", align="left", style="dim")]
    if one.final_observation is not None:
        parts.append(_text(_words(one.final_observation)))
    colour = {"success": "green", "failure": "red", "unscorable": "yellow"}[_ended(one)]
    said = f"{_ended(one)}: outcome {one.outcome:.4g} after {len(one.turns)} turns, stopped by {one.stop_reason.value}"
    parts.append(Text(said, style=f"bold {colour}"))
    if one.error:
        parts.append(_text(one.error, colour))
    return Group(*parts)


def _words(content: Content) -> str:
    """An observation in words; a picture as its description and where it lies."""
    from agentrl.types import TextPart

    if isinstance(content, str):
        return content
    pieces = []
    for part in content:
        pieces.append(part.text if isinstance(part, TextPart) else f"[picture {part.path}] {part.alt}".rstrip())
    return "\n".join(pieces)


def rescore(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Trajectory files (JSONL).")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write trajectories/ (and credit/) here; report reads it.")
    ] = None,
    rule: Annotated[
        Literal["success", "return"] | None, typer.Option(help="The environment's word, or the sum of its rewards.")
    ] = None,
    success_above: Annotated[
        float | None, typer.Option("--success-above", metavar="X", help="With return: outcomes above this succeed.")
    ] = None,
    truncated: Annotated[Literal["scored", "failure"], typer.Option(help="Episodes that a limit cut off.")] = "scored",
    function: Annotated[
        str | None, typer.Option(metavar="MODULE:NAME", help="A judge of your own: Trajectory -> (outcome, success).")
    ] = None,
    credit: Annotated[
        str | None, typer.Option(metavar="METHOD", help="Assign credit, file by file ([b]agentrl credit[/b]).")
    ] = None,
    credit_arg: Annotated[
        list[str] | None, typer.Option("--credit-arg", metavar="K=V", help="Option of the method; repeatable.")
    ] = None,
    prm_url: Annotated[
        str | None, typer.Option("--prm-url", metavar="URL", help="Served PRM, for methods that need its scores.")
    ] = None,
    skip_broken: SkipBroken = False,
) -> None:
    """Score stored trajectories again: no environment, no model.

    Example:  [b]agentrl rescore demos.jsonl --rule return --success-above 0.5 --credit rloo --out runs/again[/b]
    """
    from agentrl.config import OutcomeConfig
    from agentrl.evaluate.rescore import credit_of, load_rule, rule_of
    from agentrl.evaluate.rescore import rescore as score_again

    if rule is not None and function is not None:
        raise UserError("--rule and --function both score episodes; give one of them")
    if success_above is not None and rule != "return":
        raise UserError("--success-above needs --rule return")
    if rule is None and function is None and credit is None and truncated == "scored":
        raise UserError("nothing to do: give --rule, --function, --truncated or --credit")
    if len({file.name for file in files}) < len(files) and out is not None:
        raise UserError("two files have the same name, and would be one in --out; rescore them one by one")
    if out is not None:
        _spare(files, out)
    judge = None
    if function is not None:
        judge = load_rule(function)
    elif rule is not None or truncated != "scored":
        judge = rule_of(OutcomeConfig(rule=rule or "success", success_above=success_above, truncated=truncated))
    options = assignments(credit_arg, "--credit-arg")
    before: list[Trajectory] = []
    after: list[Trajectory] = []
    credited: list[tuple[bool, dict[str, Any]]] = []
    groups: Counter[tuple[Path, str]] = Counter()
    for file in files:
        episodes = read(file, skip_broken)
        scored = score_again(episodes, judge) if judge is not None else episodes
        found = credit_of(scored, credit, options, prm_url=prm_url) if credit is not None else None
        if out is not None:
            _keep(out, file.name, scored, found)
        before, after = before + episodes, after + scored
        groups.update((file, one.group_id) for one in scored if one.scorable)
        won = {one.id: one.success for one in scored}  # ids say which episode within one file alone
        credited += [(won[line["id"]], line) for line in found or ()]
    console.print(_changed(before, after))
    if credit is not None:
        console.print(_credited(credit, credited))
        if max(groups.values()) == 1 and not any(value for _, line in credited for value in line["episode"]):
            errors.print(
                f"every group has one trajectory, and {credit} compares an outcome with others of its group: none "
                "counts; agentrl collect --group-size K (eval --per-task K) plays each task K times",
                style="yellow",
                soft_wrap=True,
            )
    if out is not None:
        console.print(f"written to {out}", soft_wrap=True)


def _spare(files: Sequence[Path], out: Path) -> None:
    """Refuses to write over what is read: the stored outcomes would be gone.

    Raises:
        UserError: a file of `out` is one of `files`, under whatever name.
    """
    for target in (out / folder / file.name for file in files for folder in ("trajectories", "credit")):
        for file in files:
            if target.exists() and file.exists() and target.samefile(file):
                raise UserError(f"--out {out} would write over {file}, which is read; choose another folder")


def _keep(out: Path, name: str, episodes: Sequence[Trajectory], credit: Sequence[dict[str, Any]] | None) -> None:
    import json

    from agentrl.buffer import write_jsonl
    from agentrl.files import atomic_write

    write_jsonl(out / "trajectories" / name, episodes)
    if credit is not None:
        with atomic_write(out / "credit" / name) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in credit)


def _changed(before: Sequence[Trajectory], after: Sequence[Trajectory]) -> Table:
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if new.scorable]
    result = Table(title=f"{len(pairs)} episodes", title_justify="left", title_style="bold")
    result.add_column("")
    for column in ("stored", "now", "changed"):
        result.add_column(column, justify="right")
    count = max(len(pairs), 1)
    wins = [sum(pair[side].success for pair in pairs) / count for side in (0, 1)]
    means = [sum(pair[side].outcome for pair in pairs) / count for side in (0, 1)]
    moved = sum(old.success != new.success for old, new in pairs)
    result.add_row("success", f"{wins[0]:.1%}", f"{wins[1]:.1%}", str(moved))
    moved = sum(old.outcome != new.outcome for old, new in pairs)
    result.add_row("outcome, mean", f"{means[0]:.4g}", f"{means[1]:.4g}", str(moved))
    if len(pairs) < len(after):
        result.add_row("unscorable, left out", str(len(after) - len(pairs)), str(len(after) - len(pairs)), "0")
    return result


def _credited(method: str, episodes: Sequence[tuple[bool, dict[str, Any]]]) -> Table:
    """Mean advantage of the turns of successes and failures, by term; `episodes` holds (success, credit)."""
    result = Table(title=f"Credit by {method}, mean of turns", title_justify="left", title_style="bold")
    for column in ("", "turns", "episode", "step"):
        result.add_column(column, justify="right" if column else "left")
    for name, success in (("successes", True), ("failures", False)):
        chosen = [line for won, line in episodes if won is success]
        values = {term: [value for line in chosen for value in line[term]] for term in ("episode", "step")}
        count = len(values["episode"])
        means = [f"{sum(values[term]) / count:+.4f}" if count else "-" for term in ("episode", "step")]
        result.add_row(name, str(count), *means)
    return result
