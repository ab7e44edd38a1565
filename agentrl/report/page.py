"""One HTML file that needs nothing else: styles, code, charting library and data inside, nothing fetched.

What a trajectory says is data and stays data. It stands in ``<script type="application/json">``, with every character
escaped that could end the element, and the code only ever sets it as text. A Content-Security-Policy allows the page's
own scripts and styles, by hash, and nothing else.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from typing import Any

from agentrl.report.data import Report

GZIP_ABOVE = 200_000
"""Bytes of trajectory texts from which on they are compressed."""

STYLES = ("vendor/uPlot.min.css", "style.css")
SCRIPTS = (
    "vendor/uPlot.iife.min.js",
    "js/base.js",
    "js/store.js",
    "js/charts.js",
    "js/overview.js",
    "js/list.js",
    "js/conversation.js",
    "js/compare.js",
    "js/pages.js",
    "js/main.js",
)

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_TABLE = str.maketrans(_ESCAPES)


def render(report: Report, *, live: bool = False) -> bytes:
    """Returns the page.

    Args:
        report: what it says.
        live: for `agentrl view`: it asks the server it came from for news.
    """
    style = "\n".join(_read(name) for name in STYLES)
    script = "\n".join(_read(name) for name in SCRIPTS)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; base-uri 'none'; "
        f"form-action 'none'{'; connect-src ' + repr('self') if live else ''}"
    )
    parts = {
        "TITLE": _html(f"{report.summary['title']} · agentrl"),
        "POLICY": policy,
        "LIVE": "true" if live else "false",
        "STYLE": style,
        "SCRIPT": script,
        "DATA": "\n".join(_elements(report)),
    }
    page, *rest = _read("template.html").split("{{")
    for piece in rest:
        name, _, after = piece.partition("}}")
        page += parts[name] + after
    return page.encode()


def payload(report: Report) -> dict[str, Any]:
    """Returns the data of the page for `agentrl view`: element id -> ``{"encoding", "body"}``."""
    return {name: {"encoding": encoding, "body": body} for name, encoding, body in _parts(report)}


def to_json(value: Any) -> str:
    """Returns JSON that may stand inside a ``<script>`` element, whatever texts it holds."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_TABLE)


def _parts(report: Report) -> Iterator[tuple[str, str, str]]:
    """Yields (element id, encoding, body as JSON)."""
    yield "summary", "json", to_json(_finite(report.summary))
    bodies = [to_json(_finite(chunk)) for chunk in report.chunks]
    large = sum(map(len, bodies)) > GZIP_ABOVE
    for number, body in enumerate(bodies):
        if large:
            packed = gzip.compress(body.encode("utf-8", "surrogatepass"), 6, mtime=0)
            yield f"chunk-{number}", "gzip", to_json(base64.b64encode(packed).decode())
        else:
            yield f"chunk-{number}", "json", body
    for number, picture in enumerate(report.images):
        yield f"image-{number}", "json", to_json(picture)


def _elements(report: Report) -> Iterable[str]:
    for name, encoding, body in _parts(report):
        yield f'<script type="application/json" id="{name}" data-encoding="{encoding}">{body}</script>'


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as None and halves of surrogate pairs, which UTF-8 lacks, as ``?``."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {_finite(str(key)): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _read(name: str) -> str:
    return (files("agentrl.report") / "web" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _html(text: str) -> str:
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(character, entity)
    return text
