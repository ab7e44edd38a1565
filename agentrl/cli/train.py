"""``agentrl train``: a run from a configuration file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from agentrl.cli.common import console, errors, table
from agentrl.errors import UserError

if TYPE_CHECKING:
    from agentrl.config import RunConfig

_SIGNS_OF_A_RUN = ("config.yaml", "metrics.jsonl", "checkpoints")
_ENTRIES = (
    *_SIGNS_OF_A_RUN,
    *("plan.txt", "versions.json", "tensorboard", "trajectories", "credit", "model", "failed"),
    *("tracker-wandb.json", "wandb", "tracker-mlflow.json", "mlruns"),
)
"""What a run leaves in its folder. ``--overwrite`` removes these and nothing else."""


def add_commands(app: typer.Typer) -> None:
    """Adds `train`."""
    app.command("train")(train)


def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Dotted settings.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the run that is in the folder.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the run, instead of the file's run_dir.")
    ] = None,
) -> None:
    """Train an agent. Ctrl-C finishes the iteration, saves and exits; a second one stops at once.

    Example:  [b]agentrl train configs/sokoban_oprl.yaml prm.beta=0.1 --out runs/beta[/b]
    """
    from agentrl.config import load_config

    settings = load_config(config, overrides or ())
    if out is not None:
        settings.run_dir = str(out)
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite removes it; give one of them")
    if not (resume or overwrite):
        check_folder(settings)
    with errors.status("loading"):
        from agentrl.files import check_writable
        from agentrl.train.plan import batch_plan
        from agentrl.train.preflight import check_run
        from agentrl.train.trainer import train as run

        check_run(settings)
        plan = batch_plan(settings)
    check_writable(settings.run_dir)
    if overwrite:
        remove_run(settings)
    parts = [line.partition(" ") for line in plan.splitlines()]
    rows = [(name, text.strip()) for name, _, text in parts]
    resolved = Path(settings.run_dir) / "config.yaml"
    console.print(table(f"Plan of run {settings.name!r}", [*rows, ("config", resolved)]))
    result = run(settings, resume=resume)
    stopped = result["iteration"] < settings.iterations
    console.print(table("Stopped" if stopped else "Trained", _rows(result, settings)))
    if stopped:
        console.print(Text.assemble("Go on with the same command and ", ("--resume", "bold"), "."))


def check_folder(settings: RunConfig) -> None:
    """Checks that the run's folder holds no run.

    Raises:
        UserError: it does.
    """
    folder = Path(settings.run_dir)
    if any((folder / name).exists() for name in _SIGNS_OF_A_RUN):
        raise UserError(
            f"{str(folder)!r} already holds a run; go on with it (--resume), remove it (--overwrite), "
            "or choose another folder (--out DIR)"
        )


def remove_run(settings: RunConfig) -> None:
    """Removes what an earlier run left in the folder, and nothing else.

    Raises:
        UserError: the new run would start from a model that lies there.
    """
    earlier = [path for name in _ENTRIES if (path := Path(settings.run_dir) / name).exists()]
    for start in (settings.model.path, settings.prm.init):
        for path in earlier:
            if start and Path(start).resolve().is_relative_to(path.resolve()):
                raise UserError(f"--overwrite would remove {start!r}, which this run starts from; choose another --out")
    for path in earlier:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _rows(result: Mapping[str, Any], settings: RunConfig) -> list[tuple[str, Any]]:
    from agentrl.evaluate import Proportion

    rows: list[tuple[str, Any]] = [("iterations", f"{result['iteration']} of {settings.iterations}")]
    if "success" in result:
        rows.append(("success in training", f"{result['success']:.1%}"))
    if "eval" in result:
        rows.append(("held-out success", Proportion.model_validate(result["eval"]["success"])))
    folder = Path(settings.run_dir)
    return [*rows, ("model", folder / "model"), ("metrics", folder / "metrics.jsonl")]
