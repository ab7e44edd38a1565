"""`Shop`: products, goals and search index of one setting, loaded once per process, on disk where asked for."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np

from agentrl.errors import DataError, UserError
from environments.webshop.files import (
    human_goals,
    read_attributes,
    read_human_goals,
    read_products,
    read_reviews,
    synthetic_goals,
)
from environments.webshop.goods import Goal, Product
from environments.webshop.search import SearchIndex
from environments.webshop.synthetic import KINDS, make_catalogue

Split = Literal["all", "train", "test"]
_TEST_ONE_IN, _MOST_TEST = 10, 500
_SHUFFLE = 233
"""The original's seed for the order of goals; its test set is the first 500 of them."""
_FORMAT = 1
"""Of the cache on disk; a new one is built when it changes."""


@dataclass(frozen=True)
class ShopSettings:
    """What is in the shop (see `WebShopEnv`). Without `items` it is the synthetic catalogue."""

    products: int | None = None
    kinds: int | None = None
    catalogue_seed: int = 0
    items: str | None = None
    attributes: str | None = None
    human_goals: str | None = None
    reviews: str | None = None
    cache_dir: str | None = None

    def check(self) -> None:
        """Raises UserError where the settings contradict each other or are out of range."""
        if self.products is not None and self.products < 1:
            raise UserError(f"products={self.products}: at least one")
        if self.items is None:
            for name in ("attributes", "human_goals", "reviews", "cache_dir"):
                if getattr(self, name) is not None:
                    raise UserError(f"{name}={getattr(self, name)!r} goes with items=, the product file")
            if self.kinds is not None and not 1 <= self.kinds <= len(KINDS):
                raise UserError(f"kinds={self.kinds}: 1 to {len(KINDS)} kinds of products")
            if self.products is not None and self.products >= 100_000:
                raise UserError(f"products={self.products}: a synthetic catalogue has at most 99,999 products")
        elif self.attributes is None:
            raise UserError("attributes=None: items= needs attributes=, the file items_ins_v2*.json")
        elif self.kinds is not None:
            raise UserError("kinds= is for the synthetic catalogue; leave it out with items=")


class StoredProducts(Sequence[Product]):
    """Products in a file of JSON lines, read one at a time through an index of offsets."""

    def __init__(self, folder: Path) -> None:
        self._data = np.memmap(folder / "products.jsonl", mode="r", dtype=np.uint8)
        self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Product: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Product]: ...
    def __getitem__(self, index: int | slice) -> Product | Sequence[Product]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        raw = json.loads(self._data[self._offsets[index] : self._offsets[index + 1]].tobytes())
        raw["options"] = {name: tuple(values) for name, values in raw["options"].items()}
        raw["reviews"] = tuple(map(tuple, raw["reviews"]))
        for name in ("bullet_points", "attributes", "pricing"):
            raw[name] = tuple(raw[name])
        return Product(**raw)


@dataclass(frozen=True)
class Shop:
    """Everything that episodes share. Never changed after it was loaded."""

    products: Sequence[Product]
    goals: list[Goal]
    index: SearchIndex
    splits: dict[str, list[int]]
    """Split -> positions in `goals`."""


@lru_cache(maxsize=4)
def load_shop(settings: ShopSettings) -> Shop:
    """Returns the shop of `settings`; the same settings give the same object within a process.

    Raises:
        UserError: impossible settings, or the search libraries are not installed.
        DataError: a broken file.
    """
    settings.check()
    if settings.items is None:
        kinds = min(settings.kinds or len(KINDS), settings.products or len(KINDS))
        products: Sequence[Product]
        products, goals = make_catalogue(settings.products or 5000, kinds, settings.catalogue_seed)
        test = [i for i, goal in enumerate(goals) if _hash(goal.instruction_text) % _TEST_ONE_IN == 0]
        index = SearchIndex.build(product.search_text for product in products)
    else:
        if settings.cache_dir is None:
            products, goals = _read(settings)
            index = SearchIndex.build(product.search_text for product in products)
        else:
            products, goals, index = _cached(settings, Path(settings.cache_dir))
        order = list(range(len(goals)))
        random.Random(_SHUFFLE).shuffle(order)
        test = order[: min(_MOST_TEST, len(goals) // _TEST_ONE_IN)]
    held_out = set(test)
    train = [i for i in range(len(goals)) if i not in held_out]
    return Shop(products, goals, index, {"all": list(range(len(goals))), "train": train, "test": test})


def check_split(split: str) -> None:
    """Raises UserError unless `split` is one."""
    if split not in get_args(Split):
        raise UserError(f"split={split!r}: one of 'all', 'train', 'test'")


def _records(settings: ShopSettings) -> Iterator[tuple[Product, list[Goal]]]:
    """Yields the products of the files, each with its goals: people's where that file is given, else made ones."""
    assert settings.items is not None
    assert settings.attributes is not None
    attributes = read_attributes(settings.attributes)
    people = None if settings.human_goals is None else read_human_goals(settings.human_goals)
    reviews = {} if settings.reviews is None else read_reviews(settings.reviews)
    some = False
    for product in read_products(settings.items, attributes, reviews, settings.products):
        if people is not None:
            goals = list(human_goals(product, people.get(product.asin, [])))
        else:
            entry = attributes.get(product.asin)
            goals = list(synthetic_goals(product, entry)) if entry else []
        some |= bool(goals)
        yield product, goals
    if not some:
        raise DataError(f"{settings.items}: no product has a goal in {settings.human_goals or settings.attributes}")


def _read(settings: ShopSettings) -> tuple[list[Product], list[Goal]]:
    products: list[Product] = []
    goals: list[Goal] = []
    for product, own in _records(settings):
        products.append(product)
        goals += own
    return products, goals


def _cached(settings: ShopSettings, parent: Path) -> tuple[StoredProducts, list[Goal], SearchIndex]:
    """Opens the shop's folder under `parent`; builds it first where it is not there, beside it and then renamed."""
    folder = parent / f"webshop-{_fingerprint(settings)}"
    if not folder.exists():
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
        try:
            _build(settings, scratch)
            os.replace(scratch, folder)
        except OSError:
            if not folder.exists():  # else another process was faster: its folder is as good
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    goals = [_stored_goal(line) for line in (folder / "goals.jsonl").read_text(encoding="utf-8").splitlines()]
    return StoredProducts(folder), goals, SearchIndex.load(folder / "index")


def _build(settings: ShopSettings, folder: Path) -> None:
    offsets = [0]

    def texts() -> Iterator[str]:
        with open(folder / "products.jsonl", "wb") as out, open(folder / "goals.jsonl", "w", encoding="utf-8") as aims:
            for product, goals in _records(settings):
                offsets.append(offsets[-1] + out.write(json.dumps(asdict(product)).encode() + b"\n"))
                aims.writelines(json.dumps(asdict(goal)) + "\n" for goal in goals)
                yield product.search_text

    SearchIndex.build(texts()).save(folder / "index")
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))


def _stored_goal(line: str) -> Goal:
    raw = json.loads(line)
    return Goal(**{**raw, "attributes": tuple(raw["attributes"]), "goal_options": tuple(raw["goal_options"])})


def _fingerprint(settings: ShopSettings) -> str:
    """Returns a short hash of the format, the settings and the files' paths, sizes and times of change."""
    facts: list[Any] = [
        _FORMAT,
        settings.products,
        [field.name for field in itertools.chain(fields(Product), fields(Goal))],
    ]
    for name in ("items", "attributes", "human_goals", "reviews"):
        if (path := getattr(settings, name)) is not None:
            try:
                stat = os.stat(path)
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error}") from error
            facts += [name, str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
