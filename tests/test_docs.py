"""What README and docs say is true: their code runs, their commands parse, their names and links exist."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import gymnasium as gym
import pytest
import typer

from agentrl.cli import app
from agentrl.cli.reference import docstrings, reference
from agentrl.config import RunConfig, load_config
from agentrl.credit import credit_methods, load_credit
from agentrl.credit.registry import _METHODS
from agentrl.envs import registry

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("environments/*/*.md")]
)
OUTSIDE = ("run.yaml",)
"""Files that a reader would write."""


class Block(NamedTuple):
    """A fenced block."""

    page: Path
    line: int
    kind: str
    options: dict[str, str]
    text: str


def prose(page: Path) -> str:
    """Returns a page without its comments."""
    return re.sub(r"<!--.*?-->", lambda c: "\n" * c[0].count("\n"), page.read_text(encoding="utf-8"), flags=re.DOTALL)


def blocks(page: Path, kind: str) -> list[Block]:
    found = []
    text = prose(page)
    for match in re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1] == kind:
            options = dict(word.split("=", 1) for word in match[2].split())
            found.append(Block(page, text[: match.start()].count("\n") + 2, kind, options, match[3]))
    return found


def all_blocks(kind: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, kind)]


def place(value: Any) -> str:
    if isinstance(value, Block):
        return f"{value.page.relative_to(ROOT)}:{value.line}"
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def commands() -> list[tuple[Block, list[str]]]:
    """Every call of agentrl in a console block, as its arguments."""
    found = []
    for block in all_blocks("console"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:3][1:] == ["-m", "agentrl"]:
                found.append((block, words[3:]))
            elif words and words[0].rpartition("/")[2] == "agentrl":
                found.append((block, words[1:]))
    return found


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder that can be imported from; what is imported and registered there is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    registry.load_plugins()
    modules, environments, ours = set(sys.modules), dict(gym.registry), dict(registry._OURS)
    methods = dict(_METHODS)
    yield tmp_path
    _METHODS.clear()
    _METHODS.update(methods)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    gym.registry.clear()
    gym.registry.update(environments)
    registry._OURS.clear()
    registry._OURS.update(ours)


ELSEWHERE = {
    ROOT / "docs" / "offline.md": ("test_trainer.py",),
    ROOT / "docs" / "serving.md": ("test_remote.py", "test_openenv.py"),
}
"""Pages whose code starts from a finished run or a server, and the tests that have one and run it."""

RUNNABLE = [page for page in PAGES if any("signatures" not in block.options for block in blocks(page, "python"))]


@pytest.mark.parametrize("page", [page for page in RUNNABLE if page not in ELSEWHERE], ids=place)
def test_python_runs_as_written(page: Path, fresh: Path) -> None:
    """The blocks of a page run one after the other, in one namespace, as a reader would run them."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    said = io.StringIO()
    for block in blocks(page, "python"):
        if "signatures" in block.options:
            continue
        if "file" in block.options:
            (fresh / block.options["file"]).write_text(block.text)
            continue
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        with contextlib.redirect_stdout(said):
            exec(code, namespace)
    for metrics in fresh.rglob("metrics.jsonl"):
        assert_metrics_are_documented(metrics)
    if page.parent.name in ("sokoban", "lock"):
        assert said.getvalue().split() == blocks_of_output(page).split()


@pytest.mark.parametrize(("page", "tests"), ELSEWHERE.items(), ids=place)
def test_python_that_needs_a_run_is_run_elsewhere(page: Path, tests: tuple[str, ...]) -> None:
    code = "".join((ROOT / "tests" / name).read_text(encoding="utf-8") for name in tests)
    assert page.name in code
    assert all(f"snippet({number})" in code for number in range(len(blocks(page, "python"))))


def blocks_of_output(page: Path) -> str:
    """Returns the blocks without a kind, joined: what the code before each prints."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", prose(page), re.MULTILINE | re.DOTALL)
    assert any(not kind for kind, _ in found), page
    return "".join(text for kind, text in found if not kind)


def assert_metrics_are_documented(path: Path) -> None:
    table = (ROOT / "docs" / "cli.md").read_text().partition("## Metrics")[2]
    documented = {
        name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    records = [json.loads(line) for line in path.read_text().splitlines()]
    written = {key for record in records for key in record}
    assert len(records) > 1
    assert written - documented == set(), "metrics that docs/cli.md does not explain"
    assert {"success", "pair_accuracy", "prm_moved", "eval"} <= documented


@pytest.mark.parametrize("block", [b for b in all_blocks("python") if "signatures" in b.options], ids=place)
def test_signatures_are_those_of_the_code(block: Block) -> None:
    source = ast.parse((ROOT / block.options["signatures"]).read_text())
    shown = list(functions(ast.parse(block.text)))
    assert shown
    real = dict(functions(source))
    for name, signature in shown:
        assert signature == real.get(name), f"{place(block)}: {name}"


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields (qualified name, signature) of all functions and methods."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            returns = "" if node.returns is None else ast.unparse(node.returns)
            yield prefix + node.name, f"{type(node).__name__}({ast.unparse(node.args)}) -> {returns}"
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{node.name}.")


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=place)
def test_yaml_loads(block: Block, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(block.text)
    config = load_config(tmp_path / "run.yaml")
    load_credit(config.credit.method, config.credit.options)


def test_all_commands_are_shown_somewhere() -> None:
    shown = {words[0] for _, words in commands()}
    assert {"envs", "collect", "init-model", "sft", "train", "eval"} <= shown


@pytest.mark.parametrize(
    ("block", "words"), commands(), ids=lambda v: " ".join(v[:2]) if isinstance(v, list) else place(v)
)
def test_commands_parse(block: Block, words: list[str]) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    name, *rest = words
    if name.startswith("-"):
        assert name in ("--help", "--version")
        return
    assert name in group.commands, f"{place(block)}: no command {name!r}"
    context = group.commands[name].make_context(name, rest)
    config = context.params.get("config")
    if config is not None:
        known = config not in OUTSIDE
        assert not known or (ROOT / config).is_file(), f"{place(block)}: no file {config}"
        load_config(ROOT / config if known else None, context.params["overrides"] or ())


def slug(heading: str) -> str:
    """Returns the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_links_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", prose(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{place(page)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{place(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_names_in_the_text_exist(page: Path) -> None:
    """`agentrl/...`, `configs/...` are files of the project, `agentrl.x.y` can be imported, `prm.beta` is a setting."""
    text = re.sub(r"^```.*?^```$", "", prose(page), flags=re.MULTILINE | re.DOTALL)
    sections = "|".join(RunConfig.model_fields)
    for name in re.findall(r"`([\w./-]+)`", text):
        if re.fullmatch(r"(agentrl|environments|policies|configs|benchmarks|docs|tests)/[\w./-]*", name):
            assert (ROOT / name).exists() or name == "agentrl/serve/", f"{place(page)}: {name}"
        elif re.fullmatch(r"agentrl\.[a-zA-Z_.]+", name) and name not in ("agentrl.environments", "agentrl.policies"):
            resolve(name)
        elif re.fullmatch(rf"({sections})\.[a-z_.]+", name) and not name.endswith((".md", ".py", ".yaml")):
            assert name in settings(), f"{place(page)}: no setting {name}"


def resolve(name: str) -> Any:
    """Returns the module or attribute called `name`."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def settings() -> set[str]:
    """Every dotted key of a run, sections and options of the credit methods included."""
    keys = set(RunConfig.model_fields)
    for section in RunConfig.model_fields:
        fields = getattr(type(getattr(RunConfig(), section)), "model_fields", {})
        keys |= {f"{section}.{name}" for name in fields}
    for method in credit_methods().values():
        keys |= {f"credit.options.{name}" for name in method.options_type.model_fields}
    return keys


def test_the_configuration_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python -m agentrl.cli.reference > docs/configuration.md"


def test_every_setting_has_a_default_and_a_meaning_on_the_page() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| `(.+?)` \| (.+?) \| (.*) \|$", reference(), re.MULTILINE)
    table = {key: (default, values, meaning) for key, default, values, meaning in rows}
    sections = {key.partition(".")[0] for key in settings() if "." in key}
    assert set(table) == settings() - sections
    assert [key for key, (_, _, meaning) in table.items() if not meaning] == []
    assert table["prm.beta"] == ("0.05", "number, > 0", docstrings(type(RunConfig().prm))["beta"])


def test_the_layer_table_is_the_one_that_is_checked() -> None:
    from test_layers import LAYER

    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \w+ \| ([^|]*) \|", text, re.MULTILINE)
    shown = {part: int(layer) for layer, parts in rows for part in re.findall(r"`(agentrl\.\w+)`", parts)}
    assert shown == LAYER


def test_sections_that_the_code_cites_exist() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    numbers = set(re.findall(r"^#+ (\d+(?:\.\d+)?) ", page, re.MULTILINE))
    cited = set()
    for path in (*ROOT.glob("agentrl/**/*.py"), ROOT / "docs" / "configuration.md"):
        for group in re.findall(r"algorithms\.md ([\d., -]+)", path.read_text(encoding="utf-8")):
            cited |= set(re.findall(r"\d+(?:\.\d+)?", group))
    assert cited
    assert cited - numbers == set()
