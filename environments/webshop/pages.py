"""Pages as lists of segments, and the texts made of them: the original's two, and a short one for tiny models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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


def short_page(goal: Goal, chosen: Iterable[str], page: Sequence[str]) -> str:
    """Returns a short page: what to find, the limit in tens of dollars, the lines of `page`, what is left to choose.

    The last line holds the goal's options that are not yet among `chosen`, in brackets.
    """
    lines = ["want " + " ".join([goal.query, *goal.attributes])]
    if goal.price_upper < NO_LIMIT:
        lines.append(f"under {band(goal.price_upper)}")
    missing = " ".join(f"[{value}]" for value in goal.goal_options if value not in chosen)
    return "\n".join([*lines, *page, f"choose {missing}" if missing else "choose nothing"])


def short_query(goal: Goal) -> str:
    """Returns what a bare ``search`` looks for: kind, attributes and options."""
    return " ".join([goal.query, *goal.attributes, *goal.goal_options])


def short_results(products: Sequence[Product], number: int, last: bool, visited: set[str]) -> list[str]:
    """Returns a line for each result: letter, kind, attributes, price in tens of dollars (rounded up).

    One that was visited is only ``seen``: the page then says what is left to do, without a memory.
    """
    lines = [f"page {number}{'' if last else ' more'}"]
    for letter, product in zip(LETTERS, products, strict=False):
        told = f"{' '.join([product.query, *product.attributes])} {band(product.price)}"
        lines.append(f"{letter} {'seen' if product.asin in visited else told}")
    return lines


def short_item(product: Product, chosen: dict[str, str]) -> list[str]:
    """Returns the lines of a product: what it is, its options, and those chosen."""
    lines = [f"item {' '.join([product.query, *product.attributes])} {band(product.price)}"]
    lines += [f"{name} {' '.join(values)}" for name, values in product.options.items()]
    return [*lines, " ".join(["have", *chosen.values()])]


def _head(instruction: str) -> list[Segment]:
    return [Segment("Instruction:"), Segment(instruction)]
