"""Fixtures that several test files share. One thread, no network."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

# A shell that starts the tests in the background has Ctrl-C ignored, and so would every process started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"

TEXTS = [
    "You push boxes. Answer with one of up, down, left, right.",
    *["######\n#@ $.#\n# *+ #\n######", "up", "down", "left", "right"] * 5,
]


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """The worked numbers of the specification, where it stands beside the checkout."""
    path = SHARED / "spec" / "golden.json"
    if not path.exists():
        pytest.skip(f"no golden numbers: {path.name} is not beside this checkout")
    numbers: dict[str, Any] = json.loads(path.read_text())
    return numbers


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 (grouped heads) with a chat tokenizer, whose distributions are neither flat nor certain."""
    import torch

    from agentrl.models.init import init_model
    from agentrl.models.load import load_model, load_tokenizer, save_model

    path = tmp_path_factory.mktemp("models") / "tiny"
    init_model(path, TEXTS, hidden=32, layers=2, heads=4)
    model = load_model(path)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12)
    save_model(model, load_tokenizer(path), path)
    return path


@pytest.fixture(scope="session")
def pristine(model_dir: Path) -> Any:
    """The model of `model_dir`, loaded once. Take `model` instead to train or change it."""
    from agentrl.models.load import load_model

    return load_model(model_dir, train=True)


@pytest.fixture
def model(pristine: Any) -> Any:
    """A trainable copy of the tiny model."""
    return copy.deepcopy(pristine)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that plays `toys.SOKOBAN` like its teacher: some levels are solved, others are not."""
    from toys import SOKOBAN, clone, make_model

    from agentrl.config import EnvConfig
    from agentrl.policy import load_policy

    env, folder = EnvConfig(**SOKOBAN), tmp_path_factory.mktemp("sokoban")
    teacher = load_policy("sokoban-noisy-solver", skill=0.5)
    return clone(make_model(folder / "random", env), folder / "warm", env, teacher, history="window(0)")


@pytest.fixture(scope="session")
def hesitant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows what to say in ``Echo-v0`` and mostly says something else."""
    from toys import clone, make_model, parrot

    from agentrl.config import EnvConfig

    env, folder = EnvConfig(id="Echo-v0"), tmp_path_factory.mktemp("echo")
    blank = make_model(folder / "blank", env, hidden=64)
    knows = clone(blank, folder / "knows", env, parrot(1.0), 300, epochs=2, batch_tokens=256, lr=5e-3)
    return clone(knows, folder / "hesitant", env, parrot(0.2), 300, lr=2e-3)


@pytest.fixture
def trainer_of() -> Iterator[Callable[..., Any]]:
    """Makes trainers that are closed when the test ends."""
    from agentrl.train.trainer import Trainer

    made: list[Trainer] = []

    def make(*arguments: Any, **options: Any) -> Trainer:
        made.append(Trainer(*arguments, **options))
        return made[-1]

    yield make
    for trainer in made:
        trainer.close()
