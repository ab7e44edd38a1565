"""Pages as lists of segments, and the texts made of them: the original's two, and a short one for tiny models."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from environments.webshop.goods import NO_LIMIT, Goal, Product

Observation = Literal["text", "text_rich", "short"]

SEARCH, BACK, PREV, NEXT, BUY = "Search", "Back to Search", "< Prev", "Next >", "Buy Now"
SUB_PAGES = ("Description", "Features", "Reviews", "Attributes")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Segment(NamedTuple):
    """One piece of visible text, and what it is."""

    text: str
    kind: Literal["text", "button", "option", "link"] = "text"
    clicked: bool = False
    """Of an option: chosen; of a link to a product: visited."""

    @property
    def clickable(self) -> bool:
        """Whether ``click[...]`` takes it (the search button is no click: a search needs words)."""
        return self.kind != "text" and self.text != SEARCH


def search_page(instruction: str) -> list[Segment]:
    """Returns the page with the search bar."""
    return [Segment("WebShop"), *_head(instruction), Segment(SEARCH, "button")]


def results_page(
    instruction: str, products: Sequence[Product], number: int, size: int, total: int, visited: set[str]
) -> list[Segment]:
    """Returns page `number` (from 1) of the results: `products`, out of `total`."""
    page = [*_head(instruction), Segment(BACK, "button"), Segment(f"Page {number} (Total results: {total})")]
    if number > 1:
        page.append(Segment(PREV, "button"))
    if number * size < total:
        page.append(Segment(NEXT, "button"))
    for product in products:
        link = Segment(product.asin, "link", product.asin in visited)
        page += [link, Segment(product.title), Segment(product.price_tag)]
    return page


def item_page(instruction: str, product: Product, chosen: dict[str, str], attributes: bool) -> list[Segment]:
    """Returns the page of a product, with the `chosen` options (name -> value)."""
    page = [*_head(instruction), Segment(BACK, "button"), Segment(PREV, "button")]
    for name, values in product.options.items():
        page.append(Segment(name))
        page += [Segment(value, "option", chosen.get(name) == value) for value in values]
    page += [Segment(product.title), Segment(f"Price: {product.price_tag}"), Segment(f"Rating: {product.rating}")]
    page += [Segment(name, "button") for name in SUB_PAGES if attributes or name != "Attributes"]
    return [*page, Segment(BUY, "button")]


def sub_page(instruction: str, product: Product, name: str) -> list[Segment]:
    """Returns the description, features, reviews or attributes page of a product."""
    page = [*_head(instruction), Segment(BACK, "button"), Segment(PREV, "button")]
    if name == "Description":
        texts = [product.description]
    elif name == "Features":
        texts = list(product.bullet_points) or ["No Features"]
    elif name == "Reviews":
        texts = [text for title, score, body in product.reviews for text in (f'"{title}"', score, body)]
        texts = texts or ["No reviews found"]
    else:
        texts = [*product.attributes, product.category, product.query, product.product_category]
    return page + [Segment(text) for text in texts]


def to_text(page: Sequence[Segment]) -> str:
    """Returns the original's ``text`` observation: visible texts joined by ``[SEP]``."""
    return " [SEP] ".join(segment.text.strip() for segment in page)


def to_rich_text(page: Sequence[Segment]) -> str:
    """Returns the original's ``text_rich`` observation: a line each, what can be clicked between button marks."""
    lines = []
    for text, kind, clicked in page:
        start = {"option": "  ", "link": "\n"}.get(kind, "")
        state = "clicked button" if clicked else "button"
        lines.append(text if kind == "text" else f"{start}[{state}] {text} [{state}_]")
    notes = [f"You have clicked {text}." for text, kind, clicked in page if kind == "option" and clicked]
    return "\n".join([*reversed(notes), *lines, ""])


def band(price: float) -> int:
    """Returns the smallest number of tens of dollars that `price` does not exceed: limits are whole tens."""
    return math.ceil(price / 10)


def short_goal(goal: Goal) -> list[str]:
    """Returns the first lines of every short page: what to find, its options, the limit in tens of dollars."""
    lines = ["want " + " ".join([goal.query, *goal.attributes])]
    if goal.goal_options:
        lines.append("with " + " ".join(goal.goal_options))
    if goal.price_upper < NO_LIMIT:
        lines.append(f"under {band(goal.price_upper)}")
    return lines


def short_query(goal: Goal) -> str:
    """Returns what a bare ``search`` looks for: kind, attributes and options."""
    return " ".join([goal.query, *goal.attributes, *goal.goal_options])


def short_results(products: Sequence[Product], number: int, last: bool, visited: set[str]) -> list[str]:
    """Returns a line for each result: letter, kind, attributes, price in tens of dollars (rounded up); then the page.

    One that was visited is only ``seen``: the page then says what is left to do, without a memory.
    """
    lines = []
    for letter, product in zip(LETTERS, products, strict=False):
        told = f"{' '.join([product.query, *product.attributes])} {band(product.price)}"
        lines.append(f"{letter} {'seen' if product.asin in visited else told}")
    return [*lines, f"page {number}{'' if last else ' more'}"]


def short_item(product: Product, goal: Goal, chosen: Collection[str]) -> list[str]:
    """Returns the lines of a product: what it is, its options, those chosen, and last what is left to do.

    That is ``choose [red] [small]``, the goal's options that are not yet chosen, or ``ready``.
    """
    missing = " ".join(f"[{value}]" for value in goal.goal_options if value not in chosen)
    return [
        f"item {' '.join([product.query, *product.attributes])} {band(product.price)}",
        *(f"{name} {' '.join(values)}" for name, values in product.options.items()),
        " ".join(["have", *chosen]),
        f"choose {missing}" if missing else "ready",
    ]


def _head(instruction: str) -> list[Segment]:
    return [Segment("Instruction:"), Segment(instruction)]
