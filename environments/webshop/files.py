"""The original's files: products, attributes, human instructions and reviews, with errors that name entry and field.

The full product file holds 1.18 M entries in 5 GB: it is read one entry at a time.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentrl.errors import DataError
from environments.webshop.goods import Goal, Product, draw_limit, draw_price

_CHUNK = 1 << 20
_LONGEST = 64 << 20
"""Characters of the longest entry: what does not parse within so many is broken."""
_NO_PRICE = (100.0,)
_MOST_COMBINATIONS = 1000


class Entry:
    """One record of a file, whose fields are checked as they are read. `where` begins every error message."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise DataError(f"{where}: an object is wanted, not {_kind(value)}")
        self.value, self.where = value, where

    def error(self, field: str, problem: str) -> DataError:
        """Returns the error that `field` has `problem`."""
        return DataError(f"{self.where}: field {field!r} {problem}")

    def text(self, field: str, *, default: str | None = None) -> str:
        """Returns a string field; an absent or null one is `default` where there is one."""
        value = self.value.get(field)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(field, f"is {_kind(value)}, not a string" if field in self.value else "is missing")
        return value

    def texts(self, field: str, *, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Returns a field that is a list of strings; an absent or null one is `default` where there is one."""
        value = self.value.get(field)
        if value is None and default is not None:
            return default
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(field, "is not a list of strings" if field in self.value else "is missing")
        return tuple(value)


def read_products(
    path: str | Path,
    attributes: dict[str, Entry],
    reviews: dict[str, tuple[str, tuple[tuple[str, str, str], ...]]],
    limit: int | None = None,
) -> Iterator[Product]:
    """Yields the products of ``items_shuffle*.json``. Entries without a proper asin, and repeated ones, are skipped.

    Args:
        path: the file.
        attributes: what `read_attributes` returns; products without an entry get the original's ``DUMMY_ATTR``.
        reviews: what `read_reviews` returns.
        limit: reads the first `limit` entries only.

    Raises:
        DataError: no such file, not JSON, or a field is missing or wrong; names file, line, entry and field.
    """
    seen = set()
    for number, line, value in itertools.islice(stream_array(path), limit):
        entry = Entry(value, f"{path}: line {line}, entry {number}")
        asin = entry.text("asin")
        if asin == "nan" or len(asin) > 10 or asin in seen:
            continue
        seen.add(asin)
        entry.where += f" ({asin})"
        pricing = _pricing(entry)
        rating, opinions = reviews.get(asin, ("N.A.", ()))
        features = entry.value.get("small_description")
        known = attributes.get(asin)
        yield Product(
            asin=asin,
            title=entry.text("name"),
            category=entry.text("category"),
            query=entry.text("query").lower().strip(),
            product_category=entry.text("product_category"),
            description=entry.text("full_description", default=""),
            bullet_points=entry.texts("small_description", default=())
            if isinstance(features, list | None)
            else (entry.text("small_description"),),
            attributes=known.texts("attributes", default=("DUMMY_ATTR",)) if known else ("DUMMY_ATTR",),
            options=_options(entry),
            pricing=pricing,
            price=draw_price(asin, pricing),
            rating=rating,
            reviews=opinions,
        )


def _pricing(entry: Entry) -> tuple[float, ...]:
    text = entry.text("pricing", default="")
    if not text:
        return _NO_PRICE
    try:
        prices = tuple(float(re.sub(r"[^\d.]", "", part)) for part in text.split("$")[1:])
    except ValueError:
        prices = ()
    if not prices:
        raise entry.error("pricing", f"is {text!r}, not prices such as '$9.99' or '$9.99 to $19.99'")
    return prices[:2]


def _options(entry: Entry) -> dict[str, tuple[str, ...]]:
    field = "customization_options"
    given = entry.value.get(field) or {}
    if not isinstance(given, dict):
        raise entry.error(field, f"is {_kind(given)}, not an object")
    options = {}
    for name, contents in given.items():
        if contents is None:
            continue
        if not isinstance(contents, list):
            raise entry.error(f"{field}.{name}", f"is {_kind(contents)}, not a list")
        values = [Entry(item, f"{entry.where}: field '{field}.{name}'").text("value") for item in contents]
        options[name.lower()] = tuple(dict.fromkeys(value.strip().replace("/", " | ").lower() for value in values))
    return {name: values for name, values in options.items() if values}


def read_attributes(path: str | Path) -> dict[str, Entry]:
    """Returns the entries of ``items_ins_v2*.json`` by asin: `attributes`, and for some `instruction` and
    `instruction_attributes`, all checked.

    Raises:
        DataError: no such file, not JSON, or a field is missing or wrong.
    """
    entries = {asin: Entry(value, f"{path}: entry {asin!r}") for asin, value in _object(path).items()}
    for entry in entries.values():
        entry.texts("attributes", default=())
        if entry.text("instruction", default=""):
            entry.texts("instruction_attributes")
    return entries


def read_human_goals(path: str | Path) -> dict[str, list[Entry]]:
    """Returns the entries of ``items_human_ins.json`` by asin: `instruction`, `instruction_attributes`,
    `instruction_options`, all checked.

    Raises:
        DataError: no such file, not JSON, or a field is missing or wrong.
    """
    found = {}
    for asin, values in _object(path).items():
        if not isinstance(values, list):
            raise DataError(f"{path}: entry {asin!r}: a list of instructions is wanted, not {_kind(values)}")
        found[asin] = [Entry(value, f"{path}: entry {asin!r}[{i}]") for i, value in enumerate(values)]
        for entry in found[asin]:
            entry.text("instruction")
            entry.texts("instruction_attributes")
            _goal_options(entry)
    return found


def read_instructions(path: str | Path) -> list[str]:
    """Returns ``human_goals.json``: the human instructions alone, in order.

    Raises:
        DataError: no such file, not JSON, or not a list of strings; names the entry.
    """
    instructions = []
    for number, line, value in stream_array(path):
        if not isinstance(value, str):
            raise DataError(f"{path}: line {line}, entry {number}: a string is wanted, not {_kind(value)}")
        instructions.append(value)
    return instructions


def read_reviews(path: str | Path) -> dict[str, tuple[str, tuple[tuple[str, str, str], ...]]]:
    """Returns the original's review file: asin -> (average rating, reviews of title, score and body).

    Raises:
        DataError: no such file, not JSON, or a field is missing or wrong.
    """
    found = {}
    for number, line, value in stream_array(path):
        entry = Entry(value, f"{path}: line {line}, entry {number}")
        listed = entry.value.get("reviews") or []
        if not isinstance(listed, list):
            raise entry.error("reviews", f"is {_kind(listed)}, not a list")
        reviews = [Entry(item, f"{entry.where}: field 'reviews[{i}]'").value for i, item in enumerate(listed)]
        found[entry.text("asin")] = (
            str(entry.value.get("average_rating", "N.A.")),
            tuple(
                (
                    str(r.get("title", "")),
                    str(r.get("score", r.get("stars", ""))),
                    str(r.get("review", r.get("body", ""))),
                )
                for r in reviews
            ),
        )
    return found


def human_goals(product: Product, entries: list[Entry]) -> Iterator[Goal]:
    """Yields the goals that people wrote for `product`; those without attributes are left out, as in the original."""
    for number, entry in enumerate(entries):
        if attributes := entry.texts("instruction_attributes"):
            limit, clause = draw_limit(product.price, random.Random(f"limit {product.asin} {number}"))
            text = entry.text("instruction").strip(".") + clause
            yield _goal(product, text, attributes, limit, _goal_options(entry))


def synthetic_goals(product: Product, entry: Entry) -> Iterator[Goal]:
    """Yields the goals made from a product's `instruction`: one for each combination of its options (1,000 at most)."""
    instruction = entry.text("instruction", default="")
    attributes = entry.texts("instruction_attributes", default=())
    if not instruction or not attributes:
        return
    limit, clause = draw_limit(product.price, random.Random(f"limit {product.asin}"))
    names = sorted(product.options)
    combinations = itertools.product(*(product.options[name] for name in names))
    for values in itertools.islice(combinations, _MOST_COMBINATIONS):
        told = ", and ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
        text = f"{instruction}{' with ' + told if told else ''}{clause}"
        yield _goal(product, text, attributes, limit, values)


def _goal(product: Product, text: str, attributes: tuple[str, ...], limit: float, options: tuple[str, ...]) -> Goal:
    return Goal(
        product.asin,
        product.category,
        product.query,
        product.title,
        product.product_category,
        text,
        attributes,
        limit,
        options,
    )


def _goal_options(entry: Entry) -> tuple[str, ...]:
    value = entry.value.get("instruction_options")
    if isinstance(value, dict):
        return tuple(map(str, value.values()))
    return entry.texts("instruction_options", default=())


def stream_array(path: str | Path) -> Iterator[tuple[int, int, Any]]:
    """Yields (entry number from 0, line from 1, value) of a file that is one JSON array, an entry at a time.

    Raises:
        DataError: the file cannot be read, is no JSON array, or an entry does not parse.
    """
    decoder, blank = json.JSONDecoder(), re.compile(r"[\s,]*")
    try:
        with open(path, encoding="utf-8-sig") as file:
            buffer, at, line, number = file.read(_CHUNK), 0, 1, 0
            start = len(buffer) - len(buffer.lstrip())
            if buffer[start : start + 1] != "[":
                raise DataError(f"{path}: line 1: a JSON array is wanted")
            at = start + 1
            line += buffer.count("\n", 0, at)
            while True:
                skipped = blank.match(buffer, at)
                end = skipped.end() if skipped else at
                try:
                    if end == len(buffer):
                        raise json.JSONDecodeError("the array does not end", buffer, end)
                    if buffer[end] == "]":
                        return
                    value, after = decoder.raw_decode(buffer, end)
                except json.JSONDecodeError as error:
                    more = "" if len(buffer) - at > _LONGEST else file.read(max(_CHUNK, len(buffer) - at))
                    if not more:
                        line += buffer.count("\n", at, error.pos)
                        raise DataError(f"{path}: line {line}, entry {number}: not JSON: {error.msg}") from error
                    buffer, at = buffer[at:] + more, 0
                    continue
                line += buffer.count("\n", at, end)
                yield number, line, value
                line += buffer.count("\n", end, after)
                at, number = after, number + 1
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _object(path: str | Path) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: an object with an entry for each asin is wanted, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
