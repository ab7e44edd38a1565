"""Scenario and agent profiles in SOTOPIA's field names (arXiv 2310.11667), from JSON and JSON Lines files.

A file holds entries: as a JSON list, one per line (``.jsonl``), or an object whose lists are the entries
(``{"environments": [...], "agents": [...], "combos": [...]}``). What an entry is follows from its fields: `scenario`
makes it an `EnvironmentProfile`, `first_name` an `AgentProfile`, `env_id` a `Combo`. Fields that SOTOPIA has and this
module does not know (`evaluator`, `created_at`, ...) are kept and ignored.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from agentrl.errors import DataError


class Relationship(IntEnum):
    """How well two agents know each other, in SOTOPIA's numbers."""

    STRANGER = 0
    KNOW_BY_NAME = 1
    ACQUAINTANCE = 2
    FRIEND = 3
    ROMANTIC_RELATIONSHIP = 4
    FAMILY_MEMBER = 5


class _Profile(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    pk: str | None = None
    tag: str | None = None


class EnvironmentProfile(_Profile):
    """A scenario: what both know, and a private goal for each."""

    codename: str = ""
    source: str = ""
    scenario: str = Field(min_length=1)
    agent_goals: list[str] = Field(min_length=2, max_length=2)
    relationship: Relationship = Relationship.STRANGER
    age_constraint: str | None = None
    """As in SOTOPIA: ``"[(18, 70), (25, 40)]"``, youngest and oldest age of each agent."""
    occupation_constraint: str | None = None
    agent_constraint: list[list[str]] | None = None

    @field_validator("age_constraint")
    @classmethod
    def _two_ranges(cls, value: str | None) -> str | None:
        if value:
            ranges(value)
        return value

    @property
    def ages(self) -> list[tuple[int, int]]:
        """Youngest and oldest age of each agent, in years."""
        return ranges(self.age_constraint) if self.age_constraint else [(0, 200), (0, 200)]

    @property
    def name(self) -> str:
        """What other entries call it: `pk`, else `codename`."""
        return self.pk or self.codename


class AgentProfile(_Profile):
    """A character."""

    first_name: str = Field(min_length=1)
    last_name: str = ""
    age: int = Field(default=0, ge=0)
    occupation: str = ""
    gender: str = ""
    gender_pronoun: str = ""
    public_info: str = ""
    big_five: str = ""
    moral_values: list[str] = []
    schwartz_personal_values: list[str] = []
    personality_and_values: str = ""
    decision_making_style: str = ""
    secret: str = ""

    @property
    def full_name(self) -> str:
        """First and last name."""
        return f"{self.first_name} {self.last_name}".strip()

    @property
    def name(self) -> str:
        """What other entries call it: `pk`, else its full name."""
        return self.pk or self.full_name


class Combo(_Profile):
    """Who plays a scenario (SOTOPIA's `EnvAgentComboStorage`)."""

    env_id: str
    agent_ids: list[str] = Field(min_length=2, max_length=2)


@dataclass(frozen=True)
class Cast:
    """A scenario and the two who may play it."""

    scenario: EnvironmentProfile
    agents: tuple[AgentProfile, AgentProfile]

    @property
    def key(self) -> str:
        """Names this cast: scenario and players."""
        return "/".join([self.scenario.name, *(agent.name for agent in self.agents)])


_KINDS: dict[str, type[_Profile]] = {"scenario": EnvironmentProfile, "first_name": AgentProfile, "env_id": Combo}


def load_casts(path: str | Path | None = None) -> list[Cast]:
    """Returns every scenario with everyone who may play it, in the order of the files.

    Combos say who plays a scenario; without one, any two different agents whose ages fit may.

    Args:
        path: file, or folder whose ``.json`` and ``.jsonl`` files are read in the order of their names; None: the
            scenarios that ship.

    Raises:
        DataError: not readable, an entry with a bad field (file, line or entry, and field are named), a combo that
            names nobody, or a scenario that nobody may play.
    """
    return list(_load(str(path) if path is not None else None))


@lru_cache(maxsize=8)
def _load(path: str | None) -> tuple[Cast, ...]:
    scenarios: dict[str, EnvironmentProfile] = {}
    agents: dict[str, AgentProfile] = {}
    combos: list[tuple[str, Combo]] = []
    for where, entry in _entries(path):
        profile = _profile(where, entry)
        if isinstance(profile, Combo):
            combos.append((where, profile))
            continue
        known: dict[str, Any] = scenarios if isinstance(profile, EnvironmentProfile) else agents
        name = profile.name or f"scenario {len(scenarios) + 1}"  # type: ignore[attr-defined]
        if name in known:
            raise DataError(f"{where}: {name!r} stands twice; give each a pk of its own")
        known[name] = profile
    source = path or "the shipped scenarios"
    if not scenarios or len(agents) < 2:
        raise DataError(
            f"{source}: {len(scenarios)} scenarios and {len(agents)} agents; at least one and two are needed"
        )
    named: dict[str, list[tuple[AgentProfile, AgentProfile]]] = {}
    for where, combo in combos:
        if combo.env_id not in scenarios:
            raise DataError(f"{where}, field env_id: no scenario {combo.env_id!r}")
        for agent in combo.agent_ids:
            if agent not in agents:
                raise DataError(f"{where}, field agent_ids: no agent {agent!r}")
        first, second = (agents[agent] for agent in combo.agent_ids)
        named.setdefault(combo.env_id, []).append((first, second))
    casts = []
    for name, scenario in scenarios.items():
        pairs = named.get(name) or list(_fitting(scenario, list(agents.values())))
        if not pairs:
            raise DataError(f"{source}: nobody may play {name!r}; no two agents fit age_constraint {scenario.ages}")
        casts += [Cast(scenario, pair) for pair in pairs]
    return tuple(casts)


def _fitting(scenario: EnvironmentProfile, agents: list[AgentProfile]) -> Iterator[tuple[AgentProfile, AgentProfile]]:
    fit = [[agent for agent in agents if low <= agent.age <= high] for low, high in scenario.ages]
    for number, first in enumerate(fit[0]):  # each plays with the next few: all pairs would be thousands
        others = [agent for agent in fit[1] if agent.name != first.name]
        yield from ((first, others[(number + i) % len(others)]) for i in range(min(3, len(others))))


def _entries(path: str | None) -> Iterator[tuple[str, Any]]:
    """Yields (where it stands, entry)."""
    if path is None:
        shipped = files("environments.social").joinpath("data/scenarios.json")
        yield from _entries_of("scenarios.json", shipped.read_text(encoding="utf-8"))
        return
    folder = Path(path)
    found = sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")]) if folder.is_dir() else [folder]
    if not found:
        raise DataError(f"{path}: no .json or .jsonl file in this folder")
    for file in found:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read: {error}") from error
        yield from _entries_of(str(file), text)


def _entries_of(file: str, text: str) -> Iterator[tuple[str, Any]]:
    if file.endswith(".jsonl"):
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield f"{file}, line {number}", _parsed(file, line, number - 1)
        return
    content = _parsed(file, text, 0)
    if isinstance(content, dict) and not any(field in content for field in _KINDS):
        for name, entries in content.items():
            if not isinstance(entries, list):
                raise DataError(f"{file}, field {name}: a list of entries, not {type(entries).__name__}")
            yield from ((f"{file}, {name}[{number}]", entry) for number, entry in enumerate(entries))
        return
    entries = content if isinstance(content, list) else [content]
    yield from ((f"{file}, entry {number}", entry) for number, entry in enumerate(entries, 1))


def _parsed(file: str, text: str, before: int) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line = before + getattr(error, "lineno", 1)
        raise DataError(f"{file}, line {line}: not JSON: {error}") from error


def _profile(where: str, entry: Any) -> _Profile:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: an object with fields, not {type(entry).__name__}")
    kind = next((kind for field, kind in _KINDS.items() if field in entry), None)
    if kind is None:
        raise DataError(f"{where}: a scenario has a field scenario, an agent first_name, a combo env_id; this has none")
    try:
        return kind.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise DataError(f"{where}, field {field}: {first['msg']} (got {first['input']!r:.80})") from error


def ranges(text: str) -> list[tuple[int, int]]:
    """Parses ``"[(18, 70), (25, 40)]"``.

    Raises:
        ValueError: anything else.
    """
    try:
        value = ast.literal_eval(text)
        (a, b), (c, d) = value
        found = [(int(a), int(b)), (int(c), int(d))]
    except (ValueError, TypeError, SyntaxError) as error:
        raise ValueError(f"two ranges of years like '[(18, 70), (18, 70)]', not {text!r}") from error
    return found


_VIEWER = re.compile(r"<p\s+viewer=['\"](agent_\d)['\"]\s*>([^<]*(?:<(?!p\s|/p>)[^<]*)*)</p>")
_TAG = re.compile(r"</?(?:extra_info|strategy_hint|clarification_hint|p|root)\b[^<>]*>")


def shown_to(text: str, seat: int | None) -> str:
    """Returns a text of a profile as `seat` (0 or 1) may read it: ``<p viewer="agent_1">`` is for one agent alone.

    SOTOPIA's other tags are taken off and their content stays. `seat` None is the judge, who reads all.
    """
    kept = _VIEWER.sub(lambda found: found[2] if seat is None or found[1] == f"agent_{seat}" else "", text)
    return _TAG.sub(" ", kept).strip()
