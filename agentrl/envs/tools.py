'''`@tool` and `ToolEnv`: an environment whose actions are calls of documented methods.

A whole environment with two tools:

    class Mastermind(ToolEnv):
        """Guess three digits; each probe says how many stand right."""

        instructions = "Find the secret number of three digits from 1 to 4."

        def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
            self.secret = "".join(str(digit) for digit in self.np_random.integers(1, 5, size=3))
            return "A number is hidden.", {}

        @tool
        def probe(self, number: str) -> str:
            """Says how many digits of a number stand right.

            Args:
                number: three digits
            """
            return f"{sum(map(str.__eq__, number, self.secret))} of {number[:3]} stand right."

        @tool
        def answer(self, number: str) -> Step:
            """Ends the game."""
            right = number == self.secret
            return f"It was {self.secret}.", float(right), True, {"success": right}

How agents may write calls is told in `agentrl.envs.calls`. What is wrong with a call comes back as an observation.
'''

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, get_type_hints

from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError

from agentrl.envs.arguments import BOUNDS, Schema, usage
from agentrl.envs.calls import ToolCall, parse_call
from agentrl.envs.core import Step, TextEnv
from agentrl.errors import ActionError, UserError

Method = TypeVar("Method", bound=Callable[..., Any])

_KEYWORDS = {"type", "enum", "const", "items", "anyOf", "title", "description", "default", *BOUNDS}
_TYPES = {"string", "integer", "number", "boolean", "null", "array"}


def tool(method: Method) -> Method:
    """Marks a method of a `ToolEnv` as a tool. It is called with the arguments of the agent's call, checked.

    Name, type hints, defaults and docstring (first paragraph, Google-style ``Args``) become its schema, in OpenAI's
    function format. Types: str, int, float, bool, None, Literal, list[...], unions of these, and
    ``Annotated[int, pydantic.Field(ge=1, le=10)]`` for bounds.

    The method returns the observation (str; the episode goes on, reward 0), or a `Step` for anything else. What it
    cannot do for the agent it says in the observation.

    Raises:
        UserError: no docstring, a parameter without a hint or of another type, or an ``Args`` entry of no parameter.
    """
    method.__tool__ = schema_of(method)  # type: ignore[attr-defined]
    return method


def schema_of(method: Callable[..., Any]) -> dict[str, Any]:
    """Returns the schema of a method: ``{"type": "function", "function": {"name", "description", "parameters"}}``.

    Raises:
        UserError: see `tool`.
    """
    name = method.__name__
    description, documented = _docstring(name, inspect.getdoc(method) or "")
    try:
        hints = get_type_hints(method, include_extras=True)
    except NameError as error:
        raise UserError(f"tool {name!r}: {error}; type hints of tools must be names of the module") from error
    parameters = list(inspect.signature(method).parameters.values())
    parameters = [each for each in parameters if each.name != "self"]
    properties = {each.name: _parameter(name, each, hints, documented.pop(each.name, "")) for each in parameters}
    if documented:
        raise UserError(f"tool {name!r}: Args documents {min(documented)!r}, which is no parameter of it")
    required = [each.name for each in parameters if each.default is each.empty]
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


def _parameter(tool_name: str, parameter: inspect.Parameter, hints: Mapping[str, Any], words: str) -> dict[str, Any]:
    """Returns the JSON schema of one parameter."""
    where = f"tool {tool_name!r}: parameter {parameter.name!r}"
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        raise UserError(f"{where}: tools take plain named parameters, not *args, **kwargs or positional-only ones")
    if parameter.name not in hints:
        raise UserError(f"{where} has no type hint; write for example {parameter.name}: str")
    try:
        schema = TypeAdapter(hints[parameter.name]).json_schema()
    except (PydanticUserError, TypeError) as error:
        raise UserError(f"{where}: {hints[parameter.name]!r} has no JSON schema ({error})") from error
    _check_supported(where, schema)
    schema.pop("title", None)
    if words:
        schema["description"] = words
    if parameter.default is not parameter.empty:
        try:
            schema["default"] = json.loads(json.dumps(parameter.default))
        except TypeError as error:
            raise UserError(f"{where}: default {parameter.default!r}: {error}") from error
    return schema


def _check_supported(where: str, schema: Mapping[str, Any]) -> None:
    odd = schema.keys() - _KEYWORDS or {schema["type"]} - _TYPES if "type" in schema else schema.keys() - _KEYWORDS
    if odd or not schema.keys() & {"type", "enum", "const", "anyOf"}:
        raise UserError(
            f"{where} has a type that calls cannot carry ({', '.join(sorted(odd)) or 'any'}); "
            "use str, int, float, bool, Literal, list[...], Optional or bounds of numbers"
        )
    for part in [*schema.get("anyOf", []), *([schema["items"]] if "items" in schema else [])]:
        _check_supported(where, part)


def _docstring(name: str, text: str) -> tuple[str, dict[str, str]]:
    """Returns the first paragraph of a Google-style docstring, and the words of its Args section by parameter."""
    first = " ".join(text.partition("\n\n")[0].split())
    if not first:
        raise UserError(f"tool {name!r} has no docstring; its first paragraph is what the agent reads about it")
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", text, re.M)
    entries: dict[str, str] = {}
    key = ""
    for line in inspect.cleandoc(section[1]).splitlines() if section else ():
        if entry := re.match(r"(\w+)(?: \([^)]*\))?:\s*(.*)", line):
            key = entry[1]
            entries[key] = entry[2].strip()
        elif key:
            entries[key] = f"{entries[key]} {line.strip()}".strip()
    return first, entries


def describe_tools(schemas: Sequence[Schema]) -> str:
    """Returns the tools and how to call one in plain text, for models that know no native format."""
    lines = ["Tools:"]
    functions = [schema.get("function", schema) for schema in schemas]
    for function in functions:
        parameters = function.get("parameters") or {}
        lines.append(f"- {usage(function['name'], parameters)}: {function.get('description', '')}".rstrip(": "))
        for key, schema in parameters.get("properties", {}).items():
            if words := schema.get("description"):
                lines.append(f"    {key}: {words}")
    lines.append("Answer with one call, as above or as JSON: " + '{"name": ..., "arguments": {...}}')
    return "\n".join(lines)


class ToolEnv(TextEnv):
    """Base of environments that are played by tool calls. A subclass gives `begin` and methods marked with `tool`.

    `instructions` of a subclass tell the task; an instance's have the tools appended in plain text. `reset` tells their
    schemas in ``info["tool_schemas"]`` as well: a model whose chat template can show tools sees them in its own form.
    """

    tools: ClassVar[list[dict[str, Any]]] = []
    """Schemas of the tools in order of definition, in OpenAI's function format, as chat templates take them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        found: dict[str, dict[str, Any]] = {}
        for base in reversed(cls.__mro__):
            found |= {name: value.__tool__ for name, value in vars(base).items() if hasattr(value, "__tool__")}
        if taken := sorted(found.keys() & set(dir(ToolEnv))):
            raise UserError(f"{cls.__name__}: a tool cannot be called {taken[0]!r}, which environments use; rename it")
        cls.tools = [schema for name, schema in found.items() if hasattr(getattr(cls, name, None), "__tool__")]

    def __init__(self) -> None:
        super().__init__()
        if not self.tools:
            raise UserError(f"{type(self).__name__} has no tools; mark its methods with @tool")
        self.instructions = f"{type(self).instructions}\n{describe_tools(self.tools)}".strip()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        return observation, {**info, "tool_schemas": self.tools}

    def facts(self) -> dict[str, Any]:
        """Returns the `info` of the present state (`state_key` and the like), added to every step's."""
        return {}

    def parse_action(self, text: str) -> ToolCall:
        """Returns the one tool call in `text`.

        Raises:
            ToolError: see `parse_call`.
        """
        return parse_call(text, self.tools)

    def play(self, action: ToolCall) -> Step:
        answer = getattr(self, action.name)(**action.arguments)
        if isinstance(answer, str):
            return answer, 0.0, False, self.facts()
        observation, reward, terminated, info = answer
        return observation, reward, terminated, {**self.facts(), **info}

    def on_invalid(self, error: ActionError) -> Step:
        observation, reward, terminated, info = super().on_invalid(error)
        return observation, reward, terminated, {**self.facts(), **info}
