"""Tool calls as language models write them: `parse_call` reads one in any of the usual formats, and says what is wrong.

    native      <tool_call>{"name": "search", "arguments": {"query": "red"}}</tool_call>      Hermes, Qwen
                {"name": "search", "parameters": {"query": "red"}}                            Llama 3.1
                <|python_tag|>{...}  or  <function=search>{"query": "red"}</function>         Llama 3.1
                <function=search><parameter=query>red</parameter></function>                  Qwen3-Coder
    JSON        the same objects bare, in a code fence, or as OpenAI's {"function": {...}}
    XML         <search><query>red</query></search>  or  <search>red</search>
    plain       search[red]  or  search(query="red", top=3)  or  search("red", 3)
                Action: search red  or  Action: search, and on the next line  Action Input: red

Text around the call is thought and is passed over, and so is all up to the last ``</think>``. A closing tag may be
missing, since stop strings eat it. A plain call begins a line. XML text is taken as it stands, entities included.

One call an answer: two are refused rather than half obeyed, so that an agent which goes on to invent the observation
and the next call learns to stop. Nothing is evaluated, and work is linear in the text, whose length is bounded.

Left out: parallel calls, tools with nested objects as arguments, formats of single vendors beyond these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NoReturn

from agentrl.envs.arguments import (
    DECODER,
    ArgumentError,
    CallSyntaxError,
    Schema,
    SeveralCallsError,
    UnknownToolError,
    Written,
    bind,
    check,
    decode,
    dumps,
    shown,
    usage,
)
from agentrl.errors import UserError, unknown_name

MAX_CHARACTERS = 65_536
"""Longer answers are refused unread."""
_MAX_DEPTH = 16
_MAX_BROKEN = 256
"""Pieces of broken JSON after which an answer is given up: what bounds the work on hostile text."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A checked call. `str` writes it in plain text, `as_json` in the native format's JSON; `parse_call` reads both."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    """What was given; defaults are left to the tool."""

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={dumps(value)}' for key, value in self.arguments.items())})"

    def as_json(self) -> str:
        """Returns ``{"name": ..., "arguments": {...}}``."""
        return dumps({"name": self.name, "arguments": self.arguments})


def parse_call(text: str, schemas: Sequence[Schema]) -> ToolCall:
    """Returns the one call in `text`, its arguments checked against `schemas` and converted to their types.

    Formats without types write everything as text, so text that reads as the wanted type is taken for it (``"3"`` for
    an integer); nothing else is converted. Arguments that are not given are left out, defaults included.

    Args:
        text: the agent's answer.
        schemas: the tools; parameters as JSON schemas of the types that `agentrl.envs.tool` knows.

    Raises:
        CallSyntaxError: no call, a broken one, or more than `MAX_CHARACTERS` characters.
        SeveralCallsError: more than one call.
        UnknownToolError: the tool does not exist.
        ArgumentError: an argument is missing, unknown, or of another type.
        UserError: `schemas` is empty.
    """
    tools = {str(each["name"]): each.get("parameters") or {} for each in (s.get("function", s) for s in schemas)}
    if not tools:
        raise UserError("parse_call: no tools given; a call needs at least one schema")
    if len(text) > MAX_CHARACTERS:
        raise CallSyntaxError(f"the answer has {len(text)} characters; at most {MAX_CHARACTERS} are read")
    scanner = _Scanner(text.rpartition("</think>")[2], tools)
    calls = scanner.calls()
    if (written := next(calls, None)) is None:
        scanner.nothing_found()
    if next(calls, None) is not None:
        raise SeveralCallsError("several calls in one answer; make one, and wait for what it returns")
    if written.name not in tools:
        raise UnknownToolError(unknown_name("tool", written.name[:40], tools))
    named = bind(written, tools[written.name], usage(written.name, tools[written.name]))
    return ToolCall(written.name, check(written.name, named, tools[written.name]))


class _Scanner:
    """Finds calls in text from left to right: at each marker of a format, the call that begins there or none."""

    def __init__(self, text: str, tools: Mapping[str, Schema]) -> None:
        self.text, self.tools = text, tools
        self.broken = 0
        self.wants_name = False

    def calls(self) -> Iterator[Written]:
        """Yields every call.

        Raises:
            CallSyntaxError: what begins as a call does not go on as one.
        """
        markers, position = _markers(tuple(self.tools)), 0
        while match := markers.search(self.text, position):
            kind = str(match.lastgroup)
            written, end = getattr(self, f"_{kind}")(match[kind], match.end())
            position = max(end, match.end())
            if written is not None:
                yield written

    def nothing_found(self) -> NoReturn:
        """Raises the error for a text without a call."""
        if match := re.fullmatch(
            r"\s*(?:([A-Za-z_]\w{0,63})[\[(].*[\])]|<([A-Za-z_]\w{0,63})>.*>)\s*", self.text, re.S
        ):
            raise UnknownToolError(unknown_name("tool", match[1] or match[2], self.tools))
        way = usage(*next(iter(self.tools.items())))
        if self.wants_name:
            raise CallSyntaxError(f'the JSON names no tool; write {{"name": ..., "arguments": {{...}}}} or {way}')
        raise CallSyntaxError(f"no tool call found; answer with one call, for example {way}")

    def _json(self, _: str, end: int) -> tuple[Written | None, int]:
        start = end - 1
        try:
            value, end = decode(self.text, start)
        except ValueError as error:
            self.broken += 1
            if self.broken > _MAX_BROKEN or _CALL_OBJECT.match(self.text, start):
                raise CallSyntaxError(f"the call's JSON cannot be read: {error}") from None
            return None, end
        function = value.get("function", value) if isinstance(value.get("function"), dict) else value
        name, given = function.get("name"), function.get("arguments", function.get("parameters"))
        if not isinstance(name, str) or (given is None and len(function) > 1):
            self.wants_name = True
            return None, end
        if isinstance(given, str):  # OpenAI's way: the object as a string
            return self._body(name, given), end
        if not isinstance(given, dict | None):
            raise ArgumentError(f"{name[:40]}: the arguments must be an object, got {shown(given)}")
        return Written(name, named=given or {}), end

    def _function(self, name: str, start: int) -> tuple[Written, int]:
        end, after = self._closing("</function>", start)
        body = self.text[start:end]
        if body.lstrip().startswith("{"):
            return self._body(name, body), after
        return Written(name, named={key: _unwrapped(value) for key, value in _PARAMETER.findall(body)}), after

    def _element(self, name: str, start: int) -> tuple[Written, int]:
        end, after = self._closing(f"</{name}>", start)
        body, known = self.text[start:end], self.tools[name].get("properties", {})
        if end == after and f"<{name}>" in body:
            raise SeveralCallsError(f"<{name}> is opened again before it is closed")
        named: dict[str, Any] = {}
        position = 0
        while match := _CHILD.match(body, position):
            close = body.find(f"</{match[1]}>", match.end())
            if close < 0 and match[1] not in known:
                break
            named[match[1]] = _unwrapped(body[match.end() : close if close >= 0 else len(body)])
            position = close + len(match[1]) + 3 if close >= 0 else len(body)
        return (Written(name, named=named) if named else Written(name, text=body.strip())), after

    def _action(self, name: str, start: int) -> tuple[Written, int]:
        if self.text[start : start + 1] in ("[", "("):
            return self._plain(name, start + 1)
        stop = self.text.find("\n", start)
        stop = stop if stop >= 0 else len(self.text)
        rest = self.text[start:stop].strip()
        if not rest and (label := _ACTION_INPUT.match(self.text, stop)):
            if self.text.startswith("{", label.end()):  # may go over several lines
                try:
                    value, end = decode(self.text, label.end())
                except ValueError as error:
                    raise CallSyntaxError(f"the JSON after Action Input cannot be read: {error}") from None
                return Written(name, named=value), end
            stop = self.text.find("\n", label.end())
            stop = stop if stop >= 0 else len(self.text)
            rest = self.text[label.end() : stop].strip()
        return Written(name, text=rest), stop

    def _plain(self, name: str, start: int) -> tuple[Written, int]:
        parameters = list(self.tools.get(name, {}).get("properties", {}))
        if self.text[start - 1] == "[":
            end = _balanced(self.text, start, "]")
            return Written(name, text=self.text[start:end].strip()), end + 1
        # One parameter and no sign of Python's notation: all of it is the text, commas included.
        if len(parameters) < 2 and not _NOTATION.match(self.text, start):
            end = _balanced(self.text, start, ")")
            return Written(name, text=self.text[start:end].strip()), end + 1
        return _PlainArguments(self.text, start).read(name)

    def _body(self, name: str, body: str) -> Written:
        """Returns a call whose arguments are a JSON object inside a string, or the text of its only argument."""
        body = body.strip()
        if not body.startswith("{"):
            return Written(name, text=body)
        try:
            return Written(name, named=decode(body, 0)[0])
        except ValueError as error:
            raise CallSyntaxError(f"{name[:40]}: the JSON of the arguments cannot be read: {error}") from None

    def _closing(self, tag: str, start: int) -> tuple[int, int]:
        end = self.text.find(tag, start)
        return (end, end + len(tag)) if end >= 0 else (len(self.text), len(self.text))


class _PlainArguments:
    """Reads ``query="red", top=3)``: strings in quotes, lists, and bare words up to the next comma."""

    def __init__(self, text: str, position: int) -> None:
        self.text, self.position = text, position

    def read(self, name: str) -> tuple[Written, int]:
        named: dict[str, Any] = {}
        ordered: list[Any] = []
        while not self._take(")"):
            if key := _KEYWORD.match(self.text, self.position):
                self.position = key.end()
                named[key[1]] = self._value(")", 0)
            elif named:
                raise CallSyntaxError(f"{name[:40]}: an argument without a name after one with a name")
            else:
                ordered.append(self._value(")", 0))
            self._separator(")")
        return Written(name, named, tuple(ordered)), self.position

    def _value(self, close: str, depth: int) -> Any:
        self._skip()
        if string := _STRING.match(self.text, self.position):
            self.position = string.end()
            return _unquoted(string[0])
        if self.text[self.position : self.position + 1] in ('"', "'"):
            raise CallSyntaxError("a string of the call is not closed")
        if self._take("["):
            if depth >= _MAX_DEPTH:
                raise CallSyntaxError(f"lists nested more than {_MAX_DEPTH} deep")
            values = []
            while not self._take("]"):
                values.append(self._value("]", depth + 1))
                self._separator("]")
            return values
        end = _balanced(self.text, self.position, close, stop_at=",")
        bare, self.position = self.text[self.position : end].strip(), end
        if not bare:
            raise CallSyntaxError("an argument of the call is empty")
        return bare

    def _separator(self, close: str) -> None:
        self._skip()
        if not self.text.startswith(close, self.position) and not self._take(","):
            if self.position >= len(self.text):
                raise CallSyntaxError(f"the call is cut off: no closing {close!r}")
            raise CallSyntaxError(f"expected ',' or {close!r} before {shown(self.text[self.position :][:20])}")

    def _take(self, symbol: str) -> bool:
        self._skip()
        taken = self.text.startswith(symbol, self.position)
        self.position += taken
        return taken

    def _skip(self) -> None:
        match = _SPACE.match(self.text, self.position)
        assert match is not None
        self.position = match.end()


_SPACE = re.compile(r"\s*")
_KEYWORD = re.compile(r"\s*([A-Za-z_]\w{0,63})\s*=(?!=)")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"""' r"|'''(?:[^\\]|\\.)*?'''" r'|"(?!"")(?:[^"\\]|\\.)*"' r"|'(?!'')(?:[^'\\]|\\.)*'", re.S
)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.S)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": "", **{c: c for c in "\\\"'/"}}
_PARAMETER = re.compile(r"<parameter=([^<>\s]{1,64})>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.S)
_CHILD = re.compile(r"\s*<([A-Za-z_]\w{0,63})>")
_ACTION_INPUT = re.compile(r"\s*action[ \t]+input[ \t]*:[ \t]*", re.I)
_NOTATION = re.compile(r"\s*(?:[\"'\[)]|[A-Za-z_]\w{0,63}\s*=(?!=))")
_CALL_OBJECT = re.compile(r'\{\s*"(?:name|function|type)"')
_BRACKET = re.compile(r"[()\[\]{},]")


@lru_cache(maxsize=64)
def _markers(names: tuple[str, ...]) -> re.Pattern[str]:
    """Returns the pattern of all places where a call may begin; the group says which reader goes on."""
    known = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(
        r"<function=(?P<function>[^<>\s]{1,64})>"
        rf"|<(?P<element>{known})>"
        r'|(?P<json>\{)(?=\s{0,99}")'
        r"|^[ \t]*(?i:action)[ \t]*:[ \t]*(?P<action>[A-Za-z_][\w.-]{0,63})"
        rf"|(?:^|<\|python_tag\|>)[ \t]*(?P<plain>{known})(?:\.call)?[\[(]",
        re.M,
    )


def _balanced(text: str, start: int, close: str, stop_at: str = "") -> int:
    """Returns where the bracket that `close` closes ends, or before it the first `stop_at` outside inner brackets.

    Only brackets of `close`'s kind count where the text is free, all kinds where commas matter.
    """
    opening = {"]": "[", ")": "("}[close]
    opens, closes = ("([{", ")]}") if stop_at else (opening, close)
    depth = 0
    for match in _BRACKET.finditer(text, start):
        symbol = match[0]
        if depth == 0 and symbol in (close, stop_at):
            return match.start()
        depth += (symbol in opens) - (symbol in closes and depth > 0)
    raise CallSyntaxError(f"the call is cut off: no closing {close!r}")


def _unquoted(token: str) -> str:
    """Returns the text of a quoted string."""
    if token[:3] in ('"""', "'''"):
        return _ESCAPE.sub(_unescaped, token[3:-3])
    if token[0] == '"':
        try:
            return str(DECODER.decode(token))
        except ValueError:
            pass
    return _ESCAPE.sub(_unescaped, token[1:-1])


def _unescaped(match: re.Match[str]) -> str:
    if code := match[1] or match[2]:
        return chr(int(code, 16))
    return _ESCAPED.get(match[3], match[0])  # an unknown escape stays: regular expressions, LaTeX


def _unwrapped(value: str) -> str:
    """Returns an XML value without the line breaks that Qwen3-Coder puts around it."""
    return value.removeprefix("\n").removesuffix("\n")
