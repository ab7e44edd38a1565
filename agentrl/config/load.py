"""From a YAML file and dotted overrides to a checked `RunConfig`, and back.

Every mistake is one `ConfigError` that names the key, the value, where it was written (file and line, or the command
line) and what is allowed. Floats are read as people write them (``1e-4`` is a number here; plain YAML 1.1 makes it a
string), and a key given twice in one file is refused instead of silently taking the last.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from agentrl.config.schema import RunConfig
from agentrl.errors import ConfigError
from agentrl.files import atomic_write

T = TypeVar("T", bound=BaseModel)

COMMAND_LINE = "on the command line"
VARIABLE = "AGENTRL__"
"""Environment variables that begin so are settings: ``AGENTRL__PRM__BETA=0.1`` is ``prm.beta=0.1``."""

_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    """SafeLoader that knows ``1e-4`` for a float."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a *string* ``1e-4``, so that `_Loader` reads it back as a string."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_config(path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the configuration in the YAML file `path` (None: all defaults) with `overrides` applied in order.

    Between the two come environment variables: ``AGENTRL__PRM__BETA=0.1`` is ``prm.beta=0.1`` (`VARIABLE`), for
    containers. An empty one says nothing.

    Args:
        path: YAML file with the sections of `RunConfig`.
        overrides: dotted assignments, e.g. ``prm.beta=0.1`` or ``credit.options.alpha=0.5``; values are YAML.

    Raises:
        ConfigError: no such file, broken YAML, an unknown key, a bad value or an impossible combination.
    """
    data: dict[str, Any] = {}
    places: dict[str, str] = {}
    if path is not None:
        data, places = read_yaml(Path(path))
    for name, text in sorted(os.environ.items()):
        if name.startswith(VARIABLE) and text:
            key = name.removeprefix(VARIABLE).lower().replace("__", ".")
            assign(data, key, next(iter(parse_assignments([f"{key}={text}"]).values())))
            places[key] = f"in the environment variable {name}"
    for key, value in parse_assignments(overrides).items():
        assign(data, key, value)
        places[key] = COMMAND_LINE
    data = check_keys(RunConfig, data, "", places)
    return checked(RunConfig, data, places)


def checked(section: type[T], values: Mapping[str, Any], places: Mapping[str, str] | None = None) -> T:
    """Returns the section made of `values`; `places` says where each dotted key was written.

    Raises:
        ConfigError: a key that it does not have, or a bad value.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, places or {}))) from None


def dump_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Writes `config`, every key with its resolved value, as YAML that `load_config` reads back to an equal object.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as file:
        file.write(config_yaml(config).encode())


def config_yaml(config: RunConfig) -> str:
    """Returns `config` as YAML, keys in the order of the schema."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def config_sha256(config: RunConfig) -> str:
    """Returns the SHA-256 (hex) of the settings that decide the result: all but `run_dir`, `name` and `log`."""
    settings = config.model_dump(mode="json", exclude={"run_dir", "name", "log"})
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_assignments(assignments: Iterable[str], example: str = "prm.beta=0.1") -> dict[str, Any]:
    """Returns ``{"prm.beta": 0.1}`` for ``["prm.beta=0.1"]``; each value is read as YAML.

    Raises:
        ConfigError: no ``=``, no key, or a value that is not YAML.
    """
    parsed = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals or not key or not all(key.split(".")):
            raise ConfigError(f"{assignment!r} assigns nothing; write KEY=VALUE, for instance {example}")
        try:
            parsed[key] = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", error)
            raise ConfigError(f"value of {assignment!r} is not YAML ({problem}); quote it") from None
    return parsed


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the file's mapping, and for each dotted key the place where it stands (``in file line 3``).

    Raises:
        ConfigError: no such file, broken YAML, or a key that stands twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {str(path)!r}{_similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read configuration file {str(path)!r}: {error}") from None
    places: dict[str, str] = {}
    try:
        node = yaml.compose(text, _Loader)
        if node is None:
            return {}, places
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path} holds no 'key: value' lines at its top level")
        for key, line in _keys_of(node, ""):
            if key in places:
                raise ConfigError(f"key {key!r} stands twice, {places[key]} and line {line}; keep one")
            places[key] = f"in {path} line {line}"
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}") from None
    return data, places


def _keys_of(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int]]:
    for key_node, value_node in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = f"{prefix}{key_node.value}"
        yield key, key_node.start_mark.line + 1
        if isinstance(value_node, yaml.MappingNode):
            yield from _keys_of(value_node, f"{key}.")


def assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Sets the dotted `key` of `data`; mappings on the way are made where they are missing.

    Raises:
        ConfigError: a part of the way holds no keys.
    """
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents, 1):
        inner = data.get(parent)
        if not isinstance(inner, (dict, type(None))):
            raise ConfigError(f"{key!r}: {'.'.join(parents[:depth])!r} is {_shown(inner)}, which holds no keys")
        data[parent] = dict(inner or {})  # a copy: YAML anchors may share one mapping between two keys
        data = data[parent]
    data[leaf] = value


def dotted(values: Mapping[Any, Any], *, lists: bool = False) -> dict[str, Any]:
    """Returns nested mappings as one, keys joined by dots; empty ones are values. With `lists` the same of lists."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = dict(enumerate(value)) if lists and isinstance(value, list) else value
        if isinstance(inner, Mapping) and inner:
            flat |= {f"{key}.{below}": leaf for below, leaf in dotted(inner, lists=lists).items()}
        else:
            flat[str(key)] = value
    return flat


def check_keys(model: type[BaseModel], data: dict[str, Any], prefix: str, places: Mapping[str, str]) -> dict[str, Any]:
    """Refuses unknown keys and sections that are no mapping; returns `data` with empty sections filled by ``{}``."""
    checked: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if key not in model.model_fields:
            raise ConfigError(f"unknown key {name!r}{_place(name, places)}; {_nearest(model, str(key), prefix)}")
        kind = model.model_fields[key].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            value = {} if value is None else value
            if not isinstance(value, dict):
                keys = ", ".join(kind.model_fields)
                raise ConfigError(f"{name}={value!r}{_place(name, places)}: a section, with the keys {keys}")
            value = check_keys(kind, value, f"{name}.", places)
        elif isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            # `match_length: no` must not quietly become 0.
            allowed = kind.__name__ if isinstance(kind, type) else kind
            raise ConfigError(f"{name}={_shown(value)}{_place(name, places)}: should be {allowed}, not true or false")
        checked[key] = value
    return checked


def _nearest(model: type[BaseModel], key: str, prefix: str) -> str:
    """Returns the hint for an unknown key: close names in its section, the same name elsewhere, or all its siblings."""
    key = key.lower()
    leaves = {path: path.rpartition(".")[2] for path in _paths(RunConfig, "")}
    close = [prefix + name for name in difflib.get_close_matches(key, model.model_fields, n=2, cutoff=0.6)]
    if not close or key in leaves.values():  # the very name in another section was meant before a like one in this
        best = difflib.get_close_matches(key, leaves.values(), n=1, cutoff=0.75)
        close = [path for path, leaf in leaves.items() if best and leaf == best[0]]
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    where = f"section {prefix[:-1]!r} has" if prefix else "known:"
    return f"{where} {', '.join(model.model_fields)}"


def _paths(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _paths(field.annotation, f"{prefix}{name}.")


def _place(name: str, places: Mapping[str, str]) -> str:
    """Returns where `name`, or else the section around it or a key in it, was written: `` in x.yaml line 3``."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        if place := places.get(".".join(parts[:count])):
            return f" {place}"
    return next((f" {place}" for key, place in places.items() if key.startswith(f"{name}.")), "")


def _explain(error: ValidationError, places: Mapping[str, str]) -> Iterator[str]:
    """Yields one line per mistake: ``prm.beta=-1 in x.yaml line 3: should be greater than 0``."""
    for detail in error.errors():
        message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
        name = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "value_error" and isinstance(detail["input"], dict):
            yield message  # an impossible combination: the rule names its keys itself
        else:
            yield f"{name}={_shown(detail['input'])}{_place(name, places)}: {message}"


def _shown(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (bool, type(None))) else repr(value) if value == "" else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _similar_file(path: Path) -> str:
    try:
        siblings = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return f" (there is no folder {str(path.parent)!r})"
    close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    return f"; did you mean {str(path.parent / close[0])!r}?" if close else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
