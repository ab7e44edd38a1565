"""What is installed where: the core's packages, and the two images, which take the wheel without its dependencies."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def names(lines: list[str]) -> set[str]:
    """Package names of requirements, comments left out."""
    found = (re.match(r"[A-Za-z0-9_.-]+", line.strip()) for line in lines)
    return {one.group().lower() for one in found if one}


def test_a_plain_install_has_tensorboard_and_the_environment_server_has_neither_it_nor_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = names(project["dependencies"])
    assert "tensorboard" in core
    assert project["optional-dependencies"]["tensorboard"] == [], "kept, so that agentrl[tensorboard] installs"
    envs, trainer = (
        names((ROOT / "docker" / f"{image}.txt").read_text().splitlines()) for image in ("envs", "trainer")
    )
    assert envs.isdisjoint({"torch", "transformers", "tensorboard"})
    assert core <= envs | trainer | {"torch"}, "the trainer's image has all of the core"
    wheels = re.findall(r"pip install .*\*\.whl", (ROOT / "Dockerfile").read_text())
    assert len(wheels) == 3
    assert all("--no-deps" in one for one in wheels)
