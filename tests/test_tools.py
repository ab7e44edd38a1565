"""Tool calls: every format, what is wrong with a call, hostile text; schemas of methods, and environments of tools."""

from __future__ import annotations

import ast
import time
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field

from agentrl.envs import calls, tools
from agentrl.envs.arguments import ArgumentError, CallSyntaxError, SeveralCallsError, ToolError, UnknownToolError
from agentrl.envs.calls import ToolCall, parse_call
from agentrl.envs.tools import ToolEnv, describe_tools, schema_of, tool
from agentrl.errors import UserError


class Kit(ToolEnv):
    """One tool of each shape."""

    instructions = "Use the kit."

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "ready", {}

    @tool
    def search(
        self,
        query: str,
        top: Annotated[int, Field(ge=1, le=20)] = 5,
        kind: Literal["new", "used"] = "new",
        tags: list[str] | None = None,
    ) -> str:
        """Lists things that
        match.

        More about it, for people.

        Args:
            query: words to
                look for
            top (int): how many: at most 20
        """
        return f"{query}/{top}/{kind}/{tags}"

    @tool
    def python(self, code: str) -> str:
        """Runs code."""
        return code

    @tool
    def move(self, x: int, y: float, fast: bool) -> tools.Step:
        """Moves."""
        return f"{x} {y} {fast}", 0.5, True, {"success": True}

    @tool
    def look(self) -> str:
        """Looks around."""
        return "a room"

    def facts(self) -> dict[str, Any]:
        return {"state_key": "here"}


def read(text: str) -> ToolCall:
    return parse_call(text, Kit.tools)


RED = ToolCall("search", {"query": "red shoes"})
RED3 = ToolCall("search", {"query": "red shoes", "top": 3})


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ('<tool_call>\n{"name": "search", "arguments": {"query": "red shoes", "top": 3}}\n</tool_call>', RED3),
        ('<tool_call>{"name": "search", "arguments": {"query": "red shoes"}}', RED),
        ('I need shoes.\n<tool_call>\n{"arguments": {"query": "red shoes"}, "name": "search"}\n</tool_call>\n', RED),
        ('{"name": "search", "parameters": {"query": "red shoes", "top": "3"}}<|eom_id|>', RED3),
        ('<|python_tag|>{"type": "function", "name": "search", "parameters": {"query": "red shoes"}}<|eom_id|>', RED),
        ('<|python_tag|>search.call(query="red shoes")<|eom_id|>', RED),
        ('<function=search>{"query": "red shoes"}</function><|eom_id|>', RED),
        ('{"type": "function", "function": {"name": "search", "arguments": "{\\"query\\": \\"red shoes\\"}"}}', RED),
        ('Sure:\n```json\n{"name": "search", "arguments": {"query": "red shoes"}}\n```\nDone.', RED),
        ('[{"name": "search", "arguments": {"query": "red shoes"}}]', RED),
        (
            "<tool_call>\n<function=search>\n<parameter=query>\nred shoes\n</parameter>\n"
            "<parameter=top>\n3\n</parameter>\n</function>\n</tool_call>",
            RED3,
        ),
        ("<function=search><parameter=query>red shoes<parameter=top>3", RED3),
        ("<search><query>red shoes</query><top>3</top></search>", RED3),
        ("<search>\n  <query>red shoes</query>\n  <top> 3 </top>\n</search>", RED3),
        ("Let me look. <search>red shoes</search>", RED),
        ("<search>red shoes", RED),
        ("search[red shoes]", RED),
        ("I want shoes.\n  search[red shoes] and so on", RED),
        ('search("red shoes", 3)', RED3),
        ("search(query='red shoes', top=3)", RED3),
        ("search(query=red shoes, top=3)", RED3),
        ('search(query = """red shoes""",\n       top = 3,)', RED3),
        ("Thought: shoes.\nAction: search red shoes\nObservation:", RED),
        ("action: search[red shoes]", RED),
        ("Action:\nsearch[red shoes]", RED),
        ('Action: search("red shoes", top=3)', RED3),
        ("Action: search\nAction Input: red shoes", RED),
        ('Action: search\nAction Input: {"query": "red shoes",\n "top": 3}', RED3),
        ('Action: search {"query": "red shoes", "top": 3}', RED3),
        ('Action: {"name": "search", "arguments": {"query": "red shoes"}}', RED),
        ("<think>search[a] or search[b]?</think>\nsearch[red shoes]", RED),
        ("look()", ToolCall("look")),
        ("look[]", ToolCall("look")),
        ("Action: look", ToolCall("look")),
        ("<look></look>", ToolCall("look")),
        ('{"name": "look"}', ToolCall("look")),
        ("<function=look></function>", ToolCall("look")),
        ("move(-2, 1.5, true)", ToolCall("move", {"x": -2, "y": 1.5, "fast": True})),
        ("move(x=2, y=3, fast=False)", ToolCall("move", {"x": 2, "y": 3.0, "fast": False})),
        (
            '{"name": "move", "arguments": {"x": 2.0, "y": 1e3, "fast": false}}',
            ToolCall("move", {"x": 2, "y": 1e3, "fast": False}),
        ),
        ('search("a", tags=["b", \'c\', d e])', ToolCall("search", {"query": "a", "tags": ["b", "c", "d e"]})),
        ('search("a", tags=null, kind=used)', ToolCall("search", {"query": "a", "kind": "used", "tags": None})),
        ('<search><query>a</query><tags>["b"]</tags></search>', ToolCall("search", {"query": "a", "tags": ["b"]})),
        ("python[print(a[0], b)]", ToolCall("python", {"code": "print(a[0], b)"})),
        ("python(print(1 + 2, 3))", ToolCall("python", {"code": "print(1 + 2, 3)"})),
        (
            "<python>\nif a < b:\n    print('&amp;')\n</python>",
            ToolCall("python", {"code": "if a < b:\n    print('&amp;')"}),
        ),
        (
            "<function=python>\n<parameter=code>\nif a:\n    b()\n</parameter>\n</function>",
            ToolCall("python", {"code": "if a:\n    b()"}),
        ),
        (r"""python(code='print("a\tb\n", \'c\')')""", ToolCall("python", {"code": "print(\"a\tb\n\", 'c')"})),
        (
            '{"name": "python", "arguments": {"code": "print(1)\nprint(2)"}}',
            ToolCall("python", {"code": "print(1)\nprint(2)"}),
        ),
        (
            'python(code="<search>no</search> {\\"name\\": \\"look\\"}")',
            ToolCall("python", {"code": '<search>no</search> {"name": "look"}'}),
        ),
    ],
)
def test_every_format_is_read(text, call):
    assert read(text) == call


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", CallSyntaxError, 'no tool call found; answer with one call, for example search(query="...", top=5'),
        ("I would search for shoes.", CallSyntaxError, "no tool call found"),
        ('{"query": "shoes"}', CallSyntaxError, "the JSON names no tool"),
        ('{"name": "search", "arguments": {"query": "x"}', CallSyntaxError, "Expecting ',' delimiter at character 47"),
        ('{"name": "look", "arguments": {"name": NaN}}', CallSyntaxError, "NaN is no number"),
        ('<function=search>{"query": </function>', CallSyntaxError, "search: the JSON of the arguments cannot be read"),
        ('Action: search\nAction Input: {"query": ', CallSyntaxError, "after Action Input cannot be read"),
        ('search("shoes', CallSyntaxError, "a string of the call is not closed"),
        ("search(query=shoes", CallSyntaxError, "the call is cut off: no closing ')'"),
        ("search[shoes", CallSyntaxError, "the call is cut off: no closing ']'"),
        ('search("a" "b")', CallSyntaxError, "expected ',' or ')' before '\"b\")'"),
        ('search(query="a", 3)', CallSyntaxError, "without a name after one with a name"),
        ("search(query=, top=3)", CallSyntaxError, "an argument of the call is empty"),
        ("search[a]\nsearch[b]", SeveralCallsError, "several calls in one answer"),
        ("Action: look\nObservation: a room\nAction: look", SeveralCallsError, "several calls"),
        (
            '<tool_call>{"name": "look"}</tool_call><tool_call>{"name": "look"}</tool_call>',
            SeveralCallsError,
            "several",
        ),
        ("<look><look>", SeveralCallsError, "<look> is opened again before it is closed"),
        ("serch[shoes]", UnknownToolError, "no tool 'serch'; did you mean 'search'?"),
        ('{"name": "find", "arguments": {}}', UnknownToolError, "no tool 'find'; known: look, move, python, search"),
        ("<serch><query>x</query></serch>", UnknownToolError, "did you mean 'search'?"),
        ("<function=lok></function>", UnknownToolError, "did you mean 'look'?"),
        ("Action: sarch shoes", UnknownToolError, "did you mean 'search'?"),
        ("search(qery=shoes)", ArgumentError, "search: no argument 'qery'; did you mean 'query'?"),
        ("<search><qery>shoes</qery></search>", ArgumentError, "did you mean 'query'?"),
        ("look(room=1)", ArgumentError, "look: no argument 'room'; it takes none"),
        ("look[room]", ArgumentError, "look takes no argument, got 'room'"),
        ("search(top=3)", ArgumentError, "search: argument 'query' is missing; expected text"),
        ("search[]", ArgumentError, "argument 'query' is missing"),
        ("move(x=1, fast=true)", ArgumentError, "move: argument 'y' is missing; expected a number"),
        ("move[3]", ArgumentError, "move needs 'x', 'y' and 'fast': write move(x=1, y=1.5, fast=true)"),
        ("search(a, 3, new, [], 5)", ArgumentError, "search takes 4 arguments, got 5"),
        ("search(a, query=b)", ArgumentError, "search: argument 'query' is given twice"),
        ("search(a, three)", ArgumentError, "'top' must be an integer at least 1 and at most 20, got 'three'"),
        ("search(a, 0)", ArgumentError, "'top' must be an integer at least 1 and at most 20, got '0'"),
        ("search(a, kind=old)", ArgumentError, "'kind' must be one of 'new', 'used', got 'old'"),
        ("search(a, tags=b)", ArgumentError, "'tags' must be a list, each text or null, got 'b'"),
        ('{"name": "search", "arguments": {"query": 4}}', ArgumentError, "'query' must be text, got 4"),
        ('{"name": "search", "arguments": {"query": null}}', ArgumentError, "'query' must be text, got null"),
        ('{"name": "search", "arguments": {"query": {"a": 1}}}', ArgumentError, "must be text, got an object"),
        ('{"name": "search", "arguments": {"query": "a", "top": true}}', ArgumentError, "got true"),
        ('{"name": "search", "arguments": {"query": "a", "tags": [1]}}', ArgumentError, "got a list"),
        ('{"name": "search", "arguments": ["a"]}', ArgumentError, "the arguments must be an object, got a list"),
        ("move(1, 1e999, true)", ArgumentError, "'y' must be a number, got '1e999'"),
        ('{"name": "move", "arguments": {"x": 1, "y": 1e999, "fast": true}}', ArgumentError, "'y' must be a number"),
        ("move(1, nan, true)", ArgumentError, "'y' must be a number, got 'nan'"),
        ("move(1.5, 1, true)", ArgumentError, "'x' must be an integer, got '1.5'"),
        ("move(1, 1, maybe)", ArgumentError, "'fast' must be true or false, got 'maybe'"),
        (f"move({'9' * 5000}, 1, true)", ArgumentError, "'x' must be an integer, got '9999"),
    ],
)
def test_every_error_says_what_is_wrong(text, error, says):
    with pytest.raises(error) as caught:
        read(text)
    assert type(caught.value) is error
    assert says in str(caught.value)


VALUES = {
    "query": st.text(),
    "top": st.integers(1, 20),
    "kind": st.sampled_from(["new", "used"]),
    "tags": st.none() | st.lists(st.text(), max_size=4),
}
CALLS = st.one_of(
    st.fixed_dictionaries({"query": VALUES["query"]}, optional={k: VALUES[k] for k in ("top", "kind", "tags")}).map(
        lambda a: ToolCall("search", {k: a[k] for k in VALUES if k in a})
    ),
    st.builds(
        lambda x, y, fast: ToolCall("move", {"x": x, "y": y, "fast": fast}),
        st.integers(-(10**30), 10**30),
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
    ),
    st.builds(lambda code: ToolCall("python", {"code": code}), st.text()),
    st.just(ToolCall("look")),
)


@settings(max_examples=150, deadline=None, database=None)
@given(CALLS)
def test_calls_survive_a_round_trip_through_plain_text_and_json(call):
    for text in (str(call), call.as_json(), f"<tool_call>\n{call.as_json()}\n</tool_call>", f"Action: {call}"):
        assert read(text) == call


@settings(max_examples=100, deadline=None, database=None)
@given(st.text(alphabet=st.characters(exclude_characters="<\r"), min_size=1).filter(lambda t: t.strip() == t != ""))
def test_xml_carries_text_as_it_stands(text):
    assert read(f"<search><query>{text}</query></search>").arguments == {"query": text}
    assert read(f"<function=search>\n<parameter=query>\n{text}\n</parameter>\n</function>") == ToolCall(
        "search", {"query": text}
    )


PIECES = [
    "<tool_call>",
    "</tool_call>",
    '{"name": "search", "arguments": {',
    '"query": "x"',
    "}}",
    "<|python_tag|>",
    "search",
    "search(",
    "search[",
    "]",
    ")",
    "Action:",
    "Action Input:",
    "<search>",
    "</search>",
    "<query>",
    "<function=search>",
    "<parameter=query>",
    "\n",
    " ",
    "{",
    "}",
    '"',
    "'",
    "\\",
    "\ud800",
    "漢🙂",
    ",",
    "=",
    "top=",
    "<think>",
    "</think>",
    "1e9",
]


@settings(max_examples=400, deadline=None, database=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)))
@example("{" * 3000)
@example("search(tags=" + "[" * 3000)
def test_any_text_is_a_checked_call_or_a_short_error(text):
    try:
        call = read(text)
    except ToolError as error:
        said = str(error)
    else:
        said = "fine"
        assert read(str(call)) == call
    assert 0 < len(said) < 300


LONG = calls.MAX_CHARACTERS
HOSTILE = {
    "braces": "{",
    "objects": '{"a":',
    "broken objects": '{"a"',
    "lists": '{"name":[',
    "closed objects": '{"a":1}',
    "open elements": "<search>",
    "children": "<search><query>",
    "unknown children": "<search><a>",
    "functions": "<function=search>",
    "parameters": "<function=a><parameter=b>",
    "actions": "Action:",
    "action lines": "Action:\n",
    "inputs": "Action: search\nAction Input:",
    "brackets": "search[",
    "parentheses": "search(",
    "quotes": "search('",
    "escapes": 'search("\\',
    "keywords": "search(a=",
    "nested lists": "search([",
    "spaces": " ",
    "lines": "\n ",
    "thoughts": "</think>",
    "tags": "<|python_tag|>",
    "names": "a",
}


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("start", ["", "search(", '{"name": "search", "arguments": {"query": "', '{"a":' * 900 + "["])
def test_hostile_text_takes_bounded_work(piece, start):
    text = (start + piece * LONG)[:LONG]
    started = time.process_time()
    try:
        parse_call(text, Kit.tools[:1])
        said = "fine"
    except ToolError as error:
        said = str(error)
    assert time.process_time() - started < 3
    assert 0 < len(said) < 300


def test_an_answer_of_a_megabyte_is_refused_unread():
    with pytest.raises(CallSyntaxError, match="1000010 characters; at most 65536"):
        read("search[x] " + "a" * 1_000_000)


def test_nothing_is_evaluated():
    for module in (calls, tools, __import__("agentrl.envs.arguments", fromlist=["x"])):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        called = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & {"eval", "exec", "compile", "__import__"}
    assert read("python[__import__('os').abort()]").arguments == {"code": "__import__('os').abort()"}


def test_schemas_of_other_origin_are_read_too():
    anything = {"properties": {"to": {"type": "object"}, "x": {"enum": [1, "a", None]}}, "required": ["to", "gone"]}
    text = '{"name": "go", "arguments": {"to": {"a": 1}, "x": 1}}'
    with pytest.raises(ArgumentError, match="argument 'gone' is missing; expected a value"):
        parse_call(text, [{"name": "go", "parameters": anything}])
    del anything["required"]
    assert parse_call(text, [{"name": "go", "parameters": anything}]) == ToolCall("go", {"to": {"a": 1}, "x": 1})
    assert parse_call("go()", [{"type": "function", "function": {"name": "go"}}]) == ToolCall("go")
    with pytest.raises(UserError, match="no tools given"):
        parse_call("go()", [])


def test_a_method_becomes_a_schema():
    assert schema_of(Kit.search) == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Lists things that match.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "words to look for"},
                    "top": {
                        "type": "integer",
                        "minimum": 1,
                        "maximum": 20,
                        "description": "how many: at most 20",
                        "default": 5,
                    },
                    "kind": {"type": "string", "enum": ["new", "used"], "default": "new"},
                    "tags": {
                        "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
                        "default": None,
                    },
                },
                "required": ["query"],
            },
        },
    }
    assert [schema["function"]["name"] for schema in Kit.tools] == ["search", "python", "move", "look"]


def _undocumented(a: int) -> str: ...
def _untyped(a) -> str:
    """Does."""


def _several(*a: int) -> str:
    """Does."""


def _mapping(a: dict[str, int]) -> str:
    """Does."""


def _anything(a: Any) -> str:
    """Does."""


def _misnamed(a: int) -> str:
    """Does.

    Args:
        b: not there
    """


def _bounded(a: Annotated[str, Field(min_length=2)]) -> str:
    """Does."""


def _hidden(a: "Nowhere") -> str:  # noqa: F821, UP037
    """Does."""


def _odd_default(a: Optional[int] = object()) -> str:  # noqa: UP045
    """Does."""


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (_undocumented, "tool '_undocumented' has no docstring"),
        (_untyped, "parameter 'a' has no type hint"),
        (_several, r"not \*args"),
        (_mapping, "a type that calls cannot carry"),
        (_anything, r"a type that calls cannot carry \(any\)"),
        (_misnamed, "Args documents 'b', which is no parameter"),
        (_bounded, r"calls cannot carry \(minLength\)"),
        (_hidden, "name 'Nowhere' is not defined"),
        (_odd_default, "default <object object"),
    ],
)
def test_a_method_that_makes_no_schema_is_refused(method, says):
    with pytest.raises(UserError, match=says):
        tool(method)


def test_tools_are_listed_in_plain_text():
    assert Kit().instructions == (
        "Use the kit.\n"
        "Tools:\n"
        '- search(query="...", top=5, kind="new", tags=null): Lists things that match.\n'
        "    query: words to look for\n"
        "    top: how many: at most 20\n"
        '- python(code="..."): Runs code.\n'
        "- move(x=1, y=1.5, fast=true): Moves.\n"
        "- look(): Looks around.\n"
        'Answer with one call, as above or as JSON: {"name": ..., "arguments": {...}}'
    )
    assert describe_tools([{"name": "go"}]).splitlines()[1] == "- go()"


def test_tools_are_inherited_replaced_and_taken_away():
    class More(Kit):
        look = None  # type: ignore[assignment]

        @tool
        def python(self, code: str, twice: bool = False) -> str:
            """Runs code better."""
            return code * (1 + twice)

        @tool
        def leave(self) -> str:
            """Leaves."""
            return "gone"

    assert [schema["function"]["name"] for schema in More.tools] == ["search", "python", "move", "leave"]
    assert More.tools[1]["function"]["description"] == "Runs code better."
    assert len(Kit.tools) == 4


def test_a_class_without_tools_or_with_a_taken_name_is_refused():
    class Bare(ToolEnv):
        def begin(self, options):
            return "", {}

    with pytest.raises(UserError, match="Bare has no tools; mark its methods with @tool"):
        Bare()
    with pytest.raises(UserError, match="a tool cannot be called 'reset'"):

        class Bad(ToolEnv):
            @tool
            def reset(self) -> str:  # type: ignore[override]
                """Resets."""
                return ""


def test_a_tool_returns_an_observation_or_a_step():
    env = Kit()
    env.reset(seed=0)
    assert env.step("search(a, tags=[b])")[:4] == ("a/5/new/['b']", 0.0, False, False)
    observation, reward, terminated, _, info = env.step("move(1, 2, true)")
    assert (observation, reward, terminated) == ("1 2.0 True", 0.5, True)
    assert info == {"success": True, "valid_action": True, "state_key": "here"}


def test_a_wrong_call_comes_back_as_an_observation():
    env = Kit()
    env.reset(seed=0)
    env.step("look()")
    observation, reward, terminated, _, info = env.step("serch[a]")
    assert observation == "Invalid action: no tool 'serch'; did you mean 'search'?\na room"
    assert (reward, terminated, info["valid_action"], info["state_key"]) == (0, False, False, "here")
    assert info["action_error"] == "no tool 'serch'; did you mean 'search'?"


def test_an_environment_of_two_tools_fits_in_forty_lines():
    import mastermind

    from agentrl import envs

    assert len(Path(mastermind.__file__).read_text(encoding="utf-8").splitlines()) <= 41
    env = envs.make("mastermind:Mastermind-v0")
    env.reset(seed=0)
    secret = env.unwrapped.secret
    wrong = secret.translate(str.maketrans("1234", "2341"))
    assert env.step(f"probe[{wrong[0]}{secret[1:]}]")[0] == f"{wrong[0]}{secret[1:]}: 2 right"
    assert env.step(f'probe(number="{wrong}")')[0].splitlines()[1] == f"{wrong}: 0 right"
    observation, reward, terminated, _, info = env.step(f"<answer>{secret}</answer>")
    assert (observation, reward, terminated, info["success"]) == (f"It was {secret}.", 1, True, True)


def test_the_example_of_the_docstring_runs():
    source = tools.__doc__.partition("two tools:\n\n")[2].partition("\nHow agents")[0]
    assert source.count("\n") < 30
    scope: dict[str, Any] = {"ToolEnv": ToolEnv, "tool": tool, "Any": Any, "Step": tools.Step, "__name__": __name__}
    exec("\n".join(line[4:] for line in source.splitlines()), scope)
    env = scope["Mastermind"]()
    env.reset(seed=1)
    assert env.step(f"probe({env.secret})")[0] == f"3 of {env.secret} stand right."
    assert env.step(f"answer[{env.secret}]")[1:3] == (1.0, True)
