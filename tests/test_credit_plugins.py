"""Credit methods of other packages, found through their entry points: docs/credit.md's example, as a package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import signals_of, trajectory, turn

from agentrl.credit import load_credit
from agentrl.credit.registry import _METHODS

ROOT = Path(__file__).resolve().parents[1]


def documented() -> str:
    page = (ROOT / "docs" / "credit.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return code


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder that looks like an installed package with three entry points, two of them broken."""
    code = documented().replace("register_credit(", "(").replace(", register_credit", "")
    (tmp_path / "opo.py").write_text(code)
    (tmp_path / "thief.py").write_text("from opo import *\nGRPO = CreditMethod('grpo', OPOOptions, opo)\n")
    info = tmp_path / "opo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: opo\nVersion: 1.0\n")
    points = "[agentrl.credit]\nopo = opo:OPO\nlost = nowhere:NOTHING\nthief = thief:GRPO\n"
    (info / "entry_points.txt").write_text(points)
    return tmp_path


def agentrl(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(ROOT)]), "COLUMNS": "200"}
    command = [sys.executable, "-m", "agentrl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_a_method_of_another_package_is_listed_and_shown(package: Path) -> None:
    shown = agentrl(package, "credit")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"│ opo +│", shown.stdout)
    assert "plugin 'lost' could not be loaded: ModuleNotFoundError" in shown.stderr
    assert "plugin 'thief' could not be loaded: ValueError: the name 'grpo' is taken" in shown.stderr
    one = agentrl(package, "credit", "opo")
    assert "Factor on the advantage." in one.stdout, one.stderr


def test_a_run_finds_it_and_checks_its_options(package: Path) -> None:
    code = (
        "from agentrl.credit import load_credit\n"
        "print(load_credit('opo', {'scale': 2})[1].scale)\n"
        "load_credit('opo', {'skale': 2})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "2.0\n"
    assert "no option of credit method 'opo' called 'skale'; did you mean 'scale'?" in done.stderr


def test_the_documented_method_is_opo() -> None:
    before = dict(_METHODS)
    try:
        exec(documented(), {})
        method, options = load_credit("opo", {})
        made = [
            trajectory("a", "g", 1.0, [turn([1], [2, 3, 4], new_row=True)]),
            trajectory("b", "g", 0.0, [turn([1], [2], new_row=True)]),
            trajectory("c", "h", 5.0, [turn([1], [2], new_row=True)]),
        ]
        token = method(signals_of(made), options).token
    finally:
        _METHODS.clear()
        _METHODS.update(before)
    torch.testing.assert_close(token, torch.tensor([0.25, 0.25, 0.25, -0.75, 0.0]))
