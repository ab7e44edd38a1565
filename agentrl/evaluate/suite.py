"""A suite: environments x policies from one YAML file, played into one folder, and the leaderboard of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from agentrl.config.load import check_keys, checked, read_yaml
from agentrl.config.schema import EnvConfig, OutcomeConfig, RolloutConfig, Section
from agentrl.errors import AgentRLError, ConfigError, UserError
from agentrl.evaluate.evaluate import check_made, evaluate
from agentrl.evaluate.result import EvalResult
from agentrl.evaluate.stats import Proportion
from agentrl.evaluate.store import OtherEvaluation
from agentrl.files import atomic_write
from agentrl.policy import Policy, Sampling, load_policy
from agentrl.rollout import Summary, run


class Entrant(Section):
    """A policy of a suite."""

    policy: str = ""
    """Its name (``agentrl policies`` lists all), or ``module:function``; empty with `model` is ``transformers``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its options."""
    model: str | None = None
    """Model directory that acts."""
    temperature: float | None = Field(default=None, ge=0)
    """Of a model's sampling; None takes the suite's rollout's, 0 is greedy."""
    only: list[str] | None = Field(default=None, min_length=1)
    """Names of the environments that it plays; None: all."""

    @model_validator(mode="after")
    def _somebody_acts(self) -> Entrant:
        if not self.policy and self.model is None:
            # No ValueError: `checked` tells those of a whole section without their key and line.
            raise PydanticCustomError("nobody_acts", "who acts? give policy or model")
        return self

    def load(self) -> Policy:
        """Makes the policy.

        Raises:
            UserError: no such policy, or an option that it does not take.
        """
        options = {**self.options, **({"model": self.model} if self.model is not None else {})}
        name = self.policy or "transformers"
        try:
            return load_policy(name, **options)
        except TypeError as error:
            raise UserError(f"policy {name!r} cannot be made with {options}: {error}") from error


class Suite(Section):
    """Environments x policies, all on the same tasks."""

    name: str = "suite"
    episodes: int = Field(default=256, ge=1)
    """Of each policy in each environment, a multiple of `per_task`."""
    per_task: int = Field(default=1, ge=1)
    """Episodes of each task."""
    seed: int = 10**12
    """Of the first task."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    outcome: OutcomeConfig = Field(default_factory=OutcomeConfig)
    environments: dict[str, EnvConfig] = Field(min_length=1)
    """By name; an id alone (``lock: Lock-v0``) is ``{id: Lock-v0}``."""
    policies: dict[str, Entrant] = Field(min_length=1)
    """By name; a policy's name alone (``random: random``) is ``{policy: random}``."""

    @field_validator("environments", "policies", mode="before")
    @classmethod
    def _name_alone(cls, value: Any, info: ValidationInfo) -> Any:
        key = "id" if info.field_name == "environments" else "policy"
        if not isinstance(value, dict):
            return value
        return {name: {key: one} if isinstance(one, str) else one for name, one in value.items()}

    @model_validator(mode="after")
    def _names(self) -> Suite:
        for name in (*self.environments, *self.policies):
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"the name {name!r} is also that of a folder: letters, digits, '.', '_' and '-' only")
        for name, entrant in self.policies.items():
            if unknown := [one for one in entrant.only or () if one not in self.environments]:
                raise ValueError(
                    f"policies.{name}.only names {unknown[0]!r}; environments are {', '.join(self.environments)}"
                )
        if self.episodes % self.per_task:
            raise ValueError(f"episodes={self.episodes} is no multiple of per_task={self.per_task}")
        return self

    def cells(self) -> list[tuple[str, str]]:
        """Returns (policy, environment) of everything that is played, in order."""
        return [
            (name, env)
            for name, entrant in self.policies.items()
            for env in self.environments
            if entrant.only is None or env in entrant.only
        ]


class Row(BaseModel):
    """A policy in a leaderboard."""

    policy: str
    results: dict[str, EvalResult]
    """By environment."""
    failed: dict[str, str] = Field(default_factory=dict)
    """Environments that it could not be evaluated in: why."""
    mean_success: float | None
    """Over all environments, each weighing the same; None where it did not play all."""

    def cell(self, env: str, shown: Callable[[Proportion], str] = str) -> str:
        """Returns its cell of the table: success, and the number of episodes that infrastructure ended."""
        if (one := self.results.get(env)) is None:
            return "failed" if env in self.failed else "-"
        ended = f" ({one.infrastructure_failures} failed)" if one.infrastructure_failures else ""
        return shown(one.success) + ended


class Leaderboard(BaseModel):
    """What a suite found, best first: by mean success, then those that did not play everywhere by name."""

    name: str
    environments: list[str]
    rows: list[Row]

    @property
    def failed(self) -> list[str]:
        """What could not be evaluated, one line each."""
        return [f"{row.policy} in {env}: {why}" for row in self.rows for env, why in row.failed.items()]

    def markdown(self) -> str:
        """Returns the table as Markdown, with 95 % intervals, and what could not be evaluated."""
        head = ["policy", *self.environments, "mean"]
        lines = [f"# {self.name}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for row in self.rows:
            cells = [row.cell(env) for env in self.environments]
            mean = "-" if row.mean_success is None else f"{row.mean_success:.1%}"
            lines.append(f"| {' | '.join([row.policy, *cells, mean])} |")
        failures = sum(one.infrastructure_failures for row in self.rows for one in row.results.values())
        lines += ["", "Success with its 95 % interval, and the scored episodes it is out of."]
        if failures:
            lines.append(f"Infrastructure failures, in no figure: {failures}; the same command plays them again.")
        if self.failed:
            lines += ["", "Failed; the same command plays them again:", ""]
            lines += ["* " + " ".join(one.split()) for one in self.failed]
        return "\n".join(lines) + "\n"


def load_suite(path: str | os.PathLike[str]) -> Suite:
    """Returns the suite in a YAML file.

    Raises:
        ConfigError: no such file, an unknown key or a bad value (names file and line), no environment or no policy
            (names the file), or keys that do not fit together (names them).
    """
    data, places = read_yaml(Path(path))
    data = check_keys(Suite, data, "", places)
    for key, example in (("environments", "lock: Lock-v0"), ("policies", "random: random")):
        if not data.get(key):
            raise ConfigError(f"{path} has no {key}; give one or more, for instance {key}: {{{example}}}")
    return checked(Suite, data, places)


def play_suite(
    suite: Suite, out: str | os.PathLike[str], *, on_summary: Callable[[str, str, Summary], None] | None = None
) -> Leaderboard:
    """Plays what is missing of `suite` in the folder `out` and writes ``leaderboard.json`` and ``leaderboard.md``.

    Each policy in each environment has its own folder there (`EvalStore`). One that fails (a server is gone, a data set
    is missing) stops no other: the leaderboard has its error, and the same call plays it again.

    Args:
        suite: what to play.
        out: folder of the suite.
        on_summary: called with policy, environment and the summary of each episode, those already there too.

    Raises:
        UserError: a policy cannot be made, or a local environment does not exist or refuses its arguments; told before
            anything is played.
        OtherEvaluation: `out` holds episodes of other settings.
    """
    folder = Path(out)
    for name in dict.fromkeys(policy for policy, _ in suite.cells()):
        run(suite.policies[name].load().aclose())  # a name that does not exist is told before anything is played
    for name, config in suite.environments.items():
        try:
            check_made(config)
        except UserError as error:
            raise UserError(f"environments.{name}: {error}") from error
    results: dict[str, dict[str, EvalResult]] = {}
    failed: dict[str, dict[str, str]] = {}
    for name, entrant in suite.policies.items():
        policy = entrant.load()
        try:
            for env in [env for policy_name, env in suite.cells() if policy_name == name]:
                try:
                    results.setdefault(name, {})[env] = evaluate(
                        policy,
                        suite.environments[env],
                        episodes=suite.episodes,
                        per_task=suite.per_task,
                        seed=suite.seed,
                        rollout=suite.rollout,
                        sampling=_sampling(suite.rollout, entrant.temperature),
                        outcome=suite.outcome,
                        out=folder / name / env,
                        policy_options={**entrant.options, "model": entrant.model},
                        on_summary=None if on_summary is None else _bound(on_summary, name, env),
                    )
                except OtherEvaluation:
                    raise
                except Exception as error:  # a policy is anybody's code, and hours of other cells may follow
                    told = isinstance(error, AgentRLError)
                    failed.setdefault(name, {})[env] = str(error) if told else f"{type(error).__name__}: {error}"
        finally:
            run(policy.aclose())
    board = leaderboard(suite.name, suite.environments, results, failed)
    for file, text in (
        ("leaderboard.json", board.model_dump_json(indent=2) + "\n"),
        ("leaderboard.md", board.markdown()),
    ):
        with atomic_write(folder / file) as stream:
            stream.write(text.encode())
    return board


def leaderboard(
    name: str,
    environments: Iterable[str],
    results: Mapping[str, dict[str, EvalResult]],
    failed: Mapping[str, dict[str, str]] | None = None,
) -> Leaderboard:
    """Returns the leaderboard of results, and of errors in the place of results, by policy and environment."""
    order = list(environments)
    failed = failed or {}
    rows = []
    for policy in dict.fromkeys((*results, *failed)):
        found = results.get(policy, {})
        whole = all(env in found for env in order)
        mean = fmean(found[env].success.value for env in order) if whole else None
        rows.append(Row(policy=policy, results=found, failed=failed.get(policy, {}), mean_success=mean))
    rows.sort(key=lambda row: (row.mean_success is None, -(row.mean_success or 0.0), row.policy))
    return Leaderboard(name=name, environments=order, rows=rows)


def _sampling(rollout: RolloutConfig, temperature: float | None) -> Sampling:
    drawn = rollout.temperature if temperature is None else temperature
    return Sampling(drawn, rollout.top_p, rollout.top_k, rollout.max_new_tokens)


def _bound(function: Callable[[str, str, Summary], None], policy: str, env: str) -> Callable[[Summary], None]:
    return lambda summary: function(policy, env, summary)
