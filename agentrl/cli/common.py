"""What the commands share: error lines, option types, tables, the progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from agentrl.errors import EnvironmentFailure, UserError
from agentrl.terminal import visible

if TYPE_CHECKING:
    from agentrl.config import RolloutConfig
    from agentrl.policy import Policy, Sampling
    from agentrl.train.base import Lesson
    from agentrl.types import Trajectory

# No markup, no emoji: names, paths, settings and error messages are shown as they are written. Style comes with `Text`.
console = Console(markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

EnvArg = Annotated[list[str] | None, typer.Option("--env-arg", metavar="K=V", help="Environment argument; repeatable.")]
PolicyName = Annotated[
    str | None,
    typer.Option(
        "--policy", metavar="NAME", help="Policy by name ([b]agentrl policies[/b] lists all), or module:function."
    ),
]
PolicyArg = Annotated[list[str] | None, typer.Option("--policy-arg", metavar="K=V", help="Policy option; repeatable.")]
ModelDir = Annotated[str | None, typer.Option("--model", metavar="DIR", help="Model that acts (a directory).")]
MaxTurns = Annotated[
    int | None, typer.Option("--max-turns", metavar="N", min=1, help="Turn limit; default: the environment's.")
]
History = Annotated[
    str | None, typer.Option("--history", metavar="MODE", help="What a model sees of the past: full or window(k).")
]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", metavar="N", min=1, help="Token limit of one turn.")
]
Instructions = Annotated[
    str | None,
    typer.Option("--instructions", metavar="TEXT", help="System prompt instead of the environment's own; '' for none."),
]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", min=1, help="CPU threads of the model.")]


class Commands(TyperGroup):
    """Prints a `UserError`, or that a server does not answer, as one red line (exit code 2). All else keeps its
    traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, EnvironmentFailure) as error:
            errors.print(Text(visible(f"Error: {error}"), style="bold red"), soft_wrap=True)
            raise typer.Exit(EXIT_USER_ERROR) from None
        except KeyboardInterrupt:
            errors.print("Interrupted.")
            raise typer.Exit(EXIT_INTERRUPTED) from None


def assignments(values: Sequence[str] | None, option: str) -> dict[str, Any]:
    """Returns ``{"size": 6}`` for ``["size=6"]``; values are YAML. `option` names the option in errors."""
    from agentrl.config.load import parse_assignments

    return parse_assignments(values or (), f"{option} size=6")


def make_policy(name: str | None, model: str | None, options: Mapping[str, Any], threads: int | None = None) -> Policy:
    """Returns the policy called `name`, or the one that plays the model directory `model`.

    Raises:
        UserError: neither is given, no such policy, or an option that it does not take.
    """
    from agentrl.policy import load_policy

    if name is None and model is None:
        raise UserError(
            "who acts? give --policy NAME (agentrl policies lists all; module:function is one) or --model DIR"
        )
    given = dict(options)
    if model is not None:
        name = name or "transformers"
        given["model"] = model
        if threads is not None:
            given["threads"] = threads
    try:
        return load_policy(str(name), **given)
    except TypeError as error:
        shown_by = "scripted" if ":" in str(name) else name
        raise UserError(
            f"policy {name!r} cannot be made with {given}: {error} (agentrl policies {shown_by} shows its options)"
        ) from error


def rollout_settings(
    base: RolloutConfig | None, history: str | None, temperature: float | None, max_new_tokens: int | None
) -> tuple[RolloutConfig, Sampling]:
    """Returns `base` (None: the defaults) with the given options, and the sampling, where temperature 0 is greedy.

    Raises:
        UserError: `history` is neither full nor window(k).
    """
    from agentrl.config import RolloutConfig
    from agentrl.config.load import checked
    from agentrl.policy import Sampling

    given = {"history": history, "max_new_tokens": max_new_tokens}
    settings = base.model_dump() if base is not None else {}
    rollout = checked(RolloutConfig, settings | {key: value for key, value in given.items() if value is not None})
    drawn = rollout.temperature if temperature is None else temperature
    return rollout, Sampling(drawn, rollout.top_p, rollout.top_k, rollout.max_new_tokens)


def check_output(path: str | Path) -> Path:
    """Proves that the file `path` can be written, before the work whose result it will hold.

    Raises:
        UserError: it cannot.
    """
    from agentrl.files import check_writable

    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file in it")
    check_writable(path.parent)
    return path


def table(title: str, rows: Iterable[tuple[str, Any]]) -> Table:
    """Returns a table of names and values."""
    result = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    result.add_column(style="cyan", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in rows:
        result.add_row(name, visible(shown(value)))
    return result


@contextmanager
def may_leave(policy: Policy) -> Iterator[None]:
    """Ends the command in good order where a person who acts has left before any episode was finished."""
    from agentrl.errors import InfrastructureError

    try:
        yield
    except InfrastructureError:
        if not policy.interactive:
            raise
        errors.print("no episode was finished")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def usage_rows(policy: Policy) -> list[tuple[str, Any]]:
    """Returns what a served policy's calls have cost, as rows of a table; none for other policies."""
    usage = getattr(policy, "usage", None)
    if usage is None:
        return []
    rows = [
        ("requests", f"{usage.calls:,}" + (f" ({usage.attempts:,} attempts)" if usage.attempts > usage.calls else ""))
    ]
    rows += [("prompt tokens", usage.prompt_tokens), ("completion tokens", usage.completion_tokens)]
    return [*rows, ("cost", f"${usage.usd:,.4f}")] if usage.usd else rows


def shown(value: Any) -> str:
    """Returns `value` as people read it: four digits for floats, ``4 x a, 1 x b`` for counts, ``-`` for nothing."""
    if value is None or value in ({}, [], ""):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, Mapping):
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value.values()):
            return ", ".join(f"{item:,} x {key}" for key, item in value.items())
        return ", ".join(f"{key}={shown(item)}" for key, item in value.items())
    return str(value)


def success_bar(*, shown: bool = True) -> Progress:
    """Returns a bar over episodes on standard error; what its tasks' field ``success`` says stands behind the count."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[success]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
        expand=True,
        disable=not shown,
    )


class EpisodeProgress:
    """Progress bar over episodes with the running success rate, on standard error. Use as a context manager.

    Keeps the finished episodes (`episodes`), so that an interrupted command can still store them. Without a bar
    (`shown`) it prints how each episode ended.
    """

    def __init__(self, description: str, total: int, shown: bool = True) -> None:
        self.episodes: list[Trajectory] = []
        self._successes = 0
        self._bar = success_bar(shown=shown)
        self._task = self._bar.add_task(description, total=total, success="success   -  ")

    def __call__(self, trajectory: Trajectory) -> None:
        if not trajectory.scorable:
            return
        if self._bar.disable:  # a person plays, whom nobody else tells how it ended
            from agentrl.types import text_of

            print(
                f"\n{visible(text_of(trajectory.final_observation or ''))}\nover: outcome {trajectory.outcome:g}",
                flush=True,
            )
        self.episodes.append(trajectory)
        self._successes += trajectory.success
        rate = self._successes / len(self.episodes)
        self._bar.update(self._task, advance=1, success=f"success {rate:5.1%}")

    def __enter__(self) -> EpisodeProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.live.transient = kind is not None and not self.episodes  # no empty bar above an error
        self._bar.stop()


@contextmanager
def step_progress(description: str) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yields a function that takes ``{"step", "steps", "loss", "tokens_per_second"}`` and moves a bar."""
    bar = Progress(
        TextColumn(description, markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
        expand=True,
    )
    task = bar.add_task("", total=None, state="")
    bar.live.transient = True  # until the first step: no empty bar above an error

    def on_step(state: Mapping[str, float]) -> None:
        bar.live.transient = False
        text = f"loss {state['loss']:.3f}  {state['tokens_per_second']:,.0f} tokens/s"
        bar.update(task, total=int(state["steps"]), completed=int(state["step"]), state=text)

    with bar:
        yield on_step


@contextmanager
def stage_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function of what is being done, how many bytes of it are, and of how many; 0 of 0: nobody knows."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(),
        console=errors,
        expand=True,
        transient=True,
    )
    task = bar.add_task("", total=None, state="")

    def on_stage(what: str, done: int, total: int) -> None:
        state = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB" if total else ""
        bar.update(task, description=what, total=total or None, completed=done, state=state)

    with bar:
        yield on_stage


class ShownLessons:
    """Shows the making of a base model (`agentrl.train.base.TeachingProgress`)."""

    def made(self, facts: Mapping[str, Any]) -> None:
        console.print(f"a Qwen3-shaped network of {facts['parameters']:,} parameters, vocabulary {facts['vocab']}")

    def playing(self, lesson: Lesson) -> EpisodeProgress:
        options = [f"{name} {shown(value)}" for name, value in lesson.options.items()]
        return EpisodeProgress(", ".join(["demonstrations", *options]), lesson.episodes)

    def cloning(self, number: int) -> AbstractContextManager[Callable[[Mapping[str, float]], None]]:
        return step_progress(f"cloning, lesson {number}")
