"""The layers of docs/architecture.md, read from the imports themselves, and what an import may not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYER = {
    "agentrl.errors": 1,
    "agentrl.files": 1,
    "agentrl.http": 1,
    "agentrl.images": 1,
    "agentrl.terminal": 1,
    "agentrl.versions": 1,
    "agentrl.types": 1,
    "agentrl.policy": 1,
    "agentrl.envs": 1,
    "agentrl.config": 1,
    "agentrl.models": 1,
    "agentrl.remote": 1,
    "agentrl.rollout": 2,
    "agentrl.serve": 2,
    "agentrl.batch": 3,
    "agentrl.buffer": 3,
    "agentrl.credit": 3,
    "agentrl.prm": 3,
    "agentrl.train": 4,
    "agentrl.evaluate": 4,
    "agentrl.lab": 5,
    "agentrl.cli": 5,
    "agentrl.report": 5,
    "agentrl.benchmark": 5,
    "agentrl.__main__": 5,
}
"""An import may only point to the same layer or down."""

FORBIDDEN = {3: ("agentrl.rollout", "agentrl.serve")}
"""Learning works on trajectories from anywhere, files included: it does not know how they were played."""

HEAVY = ("torch", "transformers", "vllm", "ray")


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, module) for every import in a file, inside functions and TYPE_CHECKING blocks too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = str(node.module)
            # `from agentrl import buffer` imports the part, `from agentrl.types import Turn` a name.
            part = module in ("agentrl", "environments", "policies")
            yield from ((node.lineno, f"{module}.{alias.name}" if part else module) for alias in node.names)


def part_of(module: str) -> str | None:
    """Returns the part of the framework that `module` belongs to; None for the outside world and the version."""
    name, *rest = module.split(".")
    if name != "agentrl" or rest[:1] == ["__version__"]:
        return None
    return ".".join((name, *rest[:1]))


def test_every_part_has_a_layer() -> None:
    parts = {part_of(module_of(path)) for path in sources("agentrl")} - {"agentrl"}
    assert parts - LAYER.keys() == set(), "give the new part a layer in LAYER and in docs/architecture.md"


@pytest.mark.parametrize("path", sources("agentrl"), ids=module_of)
def test_imports_point_down(path: Path) -> None:
    if module_of(path) == "agentrl":
        pytest.skip("the face of the package: its names load on first use")
    layer = LAYER[str(part_of(module_of(path)))]
    for line, module in imports_of(path):
        where = f"{path.relative_to(ROOT)}:{line} (layer {layer}) imports {module}"
        assert not module.startswith(("environments", "policies")), f"{where}: plugins are found by name, not imported"
        part = part_of(module)
        if part is None:
            continue
        assert part in LAYER, f"{where}: import the part that defines it, not the package's face"
        assert LAYER[part] <= layer, f"{where} (layer {LAYER[part]})"
        assert part not in FORBIDDEN.get(layer, ()), where


@pytest.mark.parametrize("path", [*sources("environments"), *sources("policies")], ids=module_of)
def test_plugins_import_contracts_only(path: Path) -> None:
    own = module_of(path).split(".")[:2]
    for line, module in imports_of(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {module}"
        part = part_of(module)
        assert part is None or LAYER.get(part) == 1, where
        if module.split(".")[0] in ("environments", "policies"):
            assert module.split(".")[:2] == own, f"{where}: a plugin knows no other"
        if own[0] == "environments":
            assert module.split(".")[0] not in HEAVY, where


@pytest.mark.parametrize(
    "module",
    [
        "agentrl",
        "agentrl.types",
        "agentrl.policy",
        "agentrl.envs",
        "agentrl.config",
        "agentrl.models",
        "agentrl.rollout",
        "agentrl.buffer",
        "agentrl.evaluate",
        "agentrl.cli",
        "agentrl.train",
        "policies.scripted",
        "policies.openai",
        "policies.human",
        "policies.transformers",
    ],
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_environments_load_nothing_heavy() -> None:
    code = f"import sys, agentrl; agentrl.environment_ids(); print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_the_face_names_only_what_exists() -> None:
    import agentrl

    for name in agentrl.__all__:
        assert getattr(agentrl, name) is not None
