"""What a shop holds: `Product` and `Goal`, and how prices and price limits are drawn."""

from __future__ import annotations

import random
from dataclasses import dataclass

NO_LIMIT = 1_000_000.0
"""Price limit of a goal that names none."""
_LIMITS = [10.0 * i for i in range(1, 100)]


@dataclass(frozen=True, slots=True)
class Product:
    """One article. Field names follow the original's records; texts are shown as they stand."""

    asin: str
    title: str
    category: str
    query: str
    """The search phrase under which the product was found, lower case."""
    product_category: str
    """Levels from general to special, separated by ``›``."""
    description: str
    bullet_points: tuple[str, ...]
    """The features page."""
    attributes: tuple[str, ...]
    options: dict[str, tuple[str, ...]]
    """Option name -> values, all lower case."""
    pricing: tuple[float, ...]
    """One price, or the ends of a range, in dollars."""
    price: float
    """What is paid, in dollars; inside the range."""
    rating: str = "N.A."
    reviews: tuple[tuple[str, str, str], ...] = ()
    """(title, score, body) each."""

    @property
    def price_tag(self) -> str:
        """The price as pages show it: ``$12.5`` or ``$10.0 to $20.0``."""
        return " to ".join(f"${price}" for price in self.pricing)

    @property
    def search_text(self) -> str:
        """What the search index sees: title, description, first feature and options, as in the original."""
        options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in self.options.items())
        first = self.bullet_points[0] if self.bullet_points else ""
        return f"{self.title} {self.description} {first} {options}"


@dataclass(frozen=True, slots=True)
class Goal:
    """What one episode asks for."""

    asin: str
    """A product that meets the goal; others may too."""
    category: str
    query: str
    name: str
    """Title of that product."""
    product_category: str
    instruction_text: str
    attributes: tuple[str, ...]
    price_upper: float
    goal_options: tuple[str, ...]
    """Option values."""


def listed(text: str) -> list[str]:
    """Returns the parts of a text like ``"red, dark blue, 20 inch"``."""
    return text.split(", ")


def draw_price(asin: str, pricing: tuple[float, ...]) -> float:
    """Returns the price paid: a uniform draw from a range (as the original's), here a function of the asin."""
    return pricing[0] if len(pricing) == 1 else random.Random(f"price {asin}").uniform(*pricing)


def draw_limit(price: float, rng: random.Random) -> tuple[float, str]:
    """Returns a price limit above `price`, and its clause of the instruction: the larger of two of the next four tens.

    Prices beyond all limits have none: (`NO_LIMIT`, "").
    """
    above = [limit for limit in _LIMITS if limit > price][:4]
    if len(above) < 2:
        return NO_LIMIT, ""
    limit = max(rng.sample(above, 2))
    return limit, f", and price lower than {limit:.2f} dollars"
