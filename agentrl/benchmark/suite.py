"""The YAML file of a benchmark, and the training runs that it stands for.

The settings of a run are made in layers, each over the one before: the environment's configuration file, the suite's
``settings``, the environment's, the method's. A layer is a mapping as in a run configuration and is merged key by key,
with two exceptions: a ``credit`` mapping replaces the whole section, since the options of one method are not those of
another; and dotted keys (``credit.options.alpha: 0.5``) are set last, one value each.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, PrivateAttr, field_validator, model_validator

from agentrl.config.load import assign, check_keys, checked, read_yaml
from agentrl.config.schema import RunConfig, Section
from agentrl.errors import ConfigError, UserError, unknown_name
from agentrl.policy import load_policy
from agentrl.train.base import Lesson

ONE_PROCESS: dict[str, Any] = {
    "model": {"threads": 1},
    "buffer": {"write_trajectories": False},
    "checkpoint": {"every": 10, "keep": 1},
    # Table and curves are made of metrics.jsonl. TensorBoard's import and files, once for each of many runs, would be
    # in the measured times and nowhere in the result; `settings: {log.tensorboard: true}` of a suite brings it back.
    "log": {"progress": False, "tensorboard": False},
}
"""What every run starts from, under the layers above: one of many that share the cores, the disk and the terminal."""

OWN_KEYS = ("name", "run_dir", "seed")
"""Settings of a run that the benchmark gives itself."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class BaseSettings(Section):
    """The model that all runs of an environment start from; made once, from nothing."""

    preset: str = "tiny"
    """Shape of the network (``agentrl init-model --help``)."""
    seed: int = 0
    """Of its weights and its lessons."""
    lessons: list[Lesson] = Field(min_length=1)
    """In this order (`agentrl.train.base.Lesson`)."""


class EnvironmentSettings(Section):
    """One environment of a suite."""

    config: str
    """Run configuration (YAML file), relative to the working directory."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """For every run in this environment."""
    base: BaseSettings | None = None
    """Model to make and start from; None: ``model.path`` of the settings."""


class Suite(Section):
    """A benchmark."""

    name: str = "benchmark"
    """For titles."""
    out: str = "runs/benchmark"
    """Folder of everything that it writes."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """Every method is trained once with each."""
    baseline: str
    """Method that the others are compared with, seed by seed."""
    level: float = Field(default=0.8, gt=0, le=1)
    """Held-out success that "iterations to" and "seconds to" count to."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """For every run."""
    environments: dict[str, EnvironmentSettings] = Field(min_length=1)
    """By name."""
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    """Settings of each method, by name."""

    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("environments", "methods", mode="before")
    @classmethod
    def _empty_is_a_mapping(cls, value: Any) -> Any:
        return {k: {} if v is None else v for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("environments", "methods")
    @classmethod
    def _folder_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not _NAME.fullmatch(name) or name == "base":
                raise ValueError(f"{name!r} names a folder: letters, digits, '.', '_' and '-', and not 'base'")
        return value

    @field_validator("seeds")
    @classmethod
    def _each_seed_once(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a seed stands twice")
        return value

    @model_validator(mode="after")
    def _known_baseline(self) -> Suite:
        if self.baseline not in self.methods:
            raise ValueError(unknown_name("method", self.baseline, self.methods) + " (baseline)")
        return self


@dataclass(frozen=True, eq=False)
class Run:
    """One method in one environment with one seed."""

    environment: str
    method: str
    seed: int
    config: RunConfig
    base: str | None
    """SHA-256 (hex) of all that decides the base model; None where the suite makes none."""

    @property
    def folder(self) -> Path:
        """OUT/ENVIRONMENT/METHOD/seed-N."""
        return Path(self.config.run_dir)

    def __str__(self) -> str:
        return f"{self.environment}/{self.method} seed {self.seed}"


def load_suite(path: str | os.PathLike[str]) -> Suite:
    """Reads a suite; nothing of its runs is checked yet (`plan_runs`).

    Raises:
        ConfigError: no such file, broken YAML, an unknown key or a bad value; names file and line.
    """
    data, places = read_yaml(Path(path))
    _known_keys(Suite, data, "", places)
    for name, environment in _mapping(data.get("environments")).items():
        _known_keys(EnvironmentSettings, environment, f"environments.{name}.", places)
        base = _mapping(environment).get("base")
        _known_keys(BaseSettings, base, f"environments.{name}.base.", places)
        for lesson in _mapping(base).get("lessons") or ():
            _known_keys(Lesson, lesson, f"environments.{name}.base.lessons.", places)
    suite = checked(Suite, data, places)
    suite._places = places
    return suite


def plan_runs(suite: Suite) -> list[Run]:
    """Returns every run, seeds outermost: all methods have one seed before any has two.

    Raises:
        ConfigError: settings that cannot run; names environment and method.
    """
    base = {environment: base_sha256(suite, environment) for environment in suite.environments}
    return [
        Run(environment, method, seed, run_config(suite, environment, method, seed), base[environment])
        for seed in suite.seeds
        for environment in suite.environments
        for method in suite.methods
    ]


def base_sha256(suite: Suite, environment: str) -> str | None:
    """Returns the SHA-256 (hex) of all that decides an environment's base model; None where the suite makes none.

    Raises:
        ConfigError: settings that cannot run; names the environment.
    """
    base = suite.environments[environment].base
    if base is None:
        return None
    config = run_config(suite, environment, None, suite.seeds[0])
    env = config.env.model_dump(mode="json", include={"id", "kwargs", "max_turns", "instructions"})
    made_of = [base.model_dump(mode="json"), env, config.rollout.history]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def run_config(suite: Suite, environment: str, method: str | None, seed: int) -> RunConfig:
    """Returns the configuration of one run; `method` None leaves out the method's layer.

    Raises:
        ConfigError: settings that cannot run; names environment and method.
    """
    settings = suite.environments[environment]
    folder = Path(suite.out, environment)
    layers = [("settings", suite.settings), (f"environments.{environment}.settings", settings.settings)]
    if method is not None:
        layers.append((f"methods.{method}", suite.methods[method]))
    try:
        data, places = read_yaml(Path(settings.config))
        data = merged(ONE_PROCESS, data)
        for prefix, layer in layers:
            if taken := [key for key in OWN_KEYS if key in layer]:
                raise ConfigError(f"{prefix}.{taken[0]}: the benchmark sets {', '.join(OWN_KEYS)} of its runs itself")
            data = merged(data, layer)
            start = len(prefix) + 1
            places |= {key[start:]: place for key, place in suite._places.items() if key.startswith(f"{prefix}.")}
        if settings.base is not None:
            if _gives_model([layer for _, layer in layers]):
                raise ConfigError("'base' makes the model that model.path names; give one of them")
            assign(data, "model.path", str(folder / "base"))
        data |= {"name": f"{environment}/{method}", "seed": seed, "run_dir": str(folder / str(method) / f"seed-{seed}")}
        config = checked(RunConfig, check_keys(RunConfig, data, "", places), places)
        if not config.eval.every:
            raise ConfigError("eval.every=0: the table is made of held-out evaluations; set eval.every to 1 or more")
        return config
    except ConfigError as error:
        where = f"environment {environment!r}" + (f", method {method!r}" if method is not None else "")
        raise ConfigError(f"{where}: {error}") from None


def merged(data: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of `data` with `layer` over it: see the module's head for the rules.

    Raises:
        ConfigError: a dotted key that leads through a value.
    """
    result = copy.deepcopy(dict(data))
    for key, value in layer.items():
        if "." not in key:
            result[key] = copy.deepcopy(value) if key == "credit" else _deep(result.get(key), value)
    for key, value in layer.items():
        if "." in key:
            assign(result, key, copy.deepcopy(value))
    return result


def check_runs(suite: Suite, runs: Sequence[Run]) -> None:
    """Checks what only the framework's registries know: environments, credit methods, teachers, options, models.

    Raises:
        ConfigError: what cannot work, with environment and method.
    """
    from agentrl.models.load import check_model_dir
    from agentrl.train.preflight import check_task

    for environment in dict.fromkeys(run.environment for run in runs):
        base = suite.environments[environment].base
        for lesson in base.lessons if base else ():
            try:
                load_policy(lesson.policy, **lesson.options)
            except (UserError, TypeError) as error:
                raise ConfigError(f"environment {environment!r}, base: {error}") from error
    seen = set()
    for run in runs:
        if (run.environment, run.method) in seen:
            continue
        seen.add((run.environment, run.method))
        try:
            check_task(run.config)
            if run.base is None:
                check_model_dir(run.config.model.path)
        except UserError as error:
            raise ConfigError(f"environment {run.environment!r}, method {run.method!r}: {error}") from error


def select(runs: Sequence[Run], patterns: Sequence[str]) -> list[Run]:
    """Returns the runs whose ENVIRONMENT/METHOD matches one of `patterns` (``lock/*``); all of them without any.

    Raises:
        UserError: a pattern that matches nothing.
    """
    names = list(dict.fromkeys(f"{run.environment}/{run.method}" for run in runs))
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names
            raise UserError(f"--only {pattern}: no such ENVIRONMENT/METHOD in the suite; there is {', '.join(close)}")
    return [run for run in runs if not patterns or any(fnmatch(f"{run.environment}/{run.method}", p) for p in patterns)]


def _deep(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict | None):  # `prm:` with nothing after it changes nothing
        new = new or {}
        return {**old, **{key: _deep(old.get(key), value) for key, value in new.items()}}
    return copy.deepcopy(new)


def _gives_model(layers: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a layer of the suite itself names a model."""
    return any("model.path" in layer or "path" in _mapping(layer.get("model")) for layer in layers)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _known_keys(model: type[BaseModel], data: Any, prefix: str, places: Mapping[str, str]) -> None:
    """Refuses keys that `model` does not have; what is no mapping is left to the model's own check."""
    for key in _mapping(data):
        if key not in model.model_fields:
            place = places.get(f"{prefix}{key}")
            raise ConfigError(unknown_name("key", str(key), model.model_fields) + f" ({prefix}{key} {place or ''})")
