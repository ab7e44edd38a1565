"""The reward of a purchase, by the rule of the original (Yao et al. 2022, arXiv 2207.01206, section 3.2 and its code):

    r = r_type * (matched attributes + matched options + [price <= limit]) / (attributes + options + 1)

One part is approximated. The original finds the nouns of a title with a spaCy tagger (``en_core_web_lg``); here a word
counts as a noun if it has at least two letters, is no stop-word, and is capitalised (taggers take those of product
titles for proper nouns) or has no ending of an adjective, adverb or participle. Both agree that titles without a common
word score 0; on titles in mixed case the share of common nouns may differ by a word or two.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import Any

from agentrl.errors import UserError
from environments.webshop.goods import Goal, Product, listed

THRESHOLD = 85
"""Two texts are the same when their token-set ratio (0-100, rounded) is above."""

COLORS = listed(
    "alabaster, apricot, aqua, ash, asphalt, azure, banana, beige, black, blue, blush, bordeaux, bronze, "
    "brown, burgundy, camel, camo, caramel, champagne, charcoal, cheetah, chestnut, chocolate, christmas, "
    "coffee, cognac, copper, coral, cranberry, cream, crystal, dark, denim, eggplant, elephant, espresso, "
    "fuchsia, gold, granite, grape, graphite, grass, gray, green, grey, heather, indigo, ivory, ivy, "
    "khaki, lavender, lemon, leopard, light, lilac, lime, magenta, maroon, mauve, merlot, midnight, mint, "
    "mocha, multicolor, mushroom, mustard, natural, navy, nude, olive, orange, peach, pewter, pink, plum, "
    "purple, rainbow, red, rose, royal, rust, sand, sapphire, seashell, silver, skull, slate, steel, "
    "stone, stonewash, sunflower, tan, taupe, teal, tiger, turquoise, violet, walnut, wheat, white, wine, "
    "yellow"
)
"""Colour words in the order in which the original looks for them; the first one found stands for the whole value."""

_STOP = frozenset(
    listed(
        "a, an, and, are, as, at, be, been, but, by, can, for, from, had, has, have, he, her, hers, him, "
        "his, how, i, if, in, into, is, it, its, just, me, more, most, my, no, nor, not, of, off, on, "
        "only, or, other, our, out, over, own, per, she, so, some, such, than, that, the, their, them, "
        "then, there, these, they, this, those, to, too, under, until, up, very, via, vs, was, we, were, "
        "what, when, where, which, while, who, will, with, without, you, your"
    )
)
_NO_NOUN = re.compile(r"(?:able|ible|ful|less|ous|ive|ly|ish|ed|proof|free|resistant)$")
_WORD = re.compile(r"[^\W\d_]{2,}")


@lru_cache(maxsize=50_000)
def title_nouns(title: str) -> tuple[str, ...]:
    """Returns the nouns of a product title in lower case, in order, repeated ones included (see the module)."""
    words = [word for word in _WORD.findall(title) if word.lower() not in _STOP]
    return tuple(word.lower() for word in words if word[0].isupper() or not _NO_NOUN.search(word))


def normalize_color(value: str) -> str:
    """Returns the first of `COLORS` that occurs anywhere in `value`, else `value`."""
    return next((color for color in COLORS if color in value), value)


@cache
def _ratio() -> Any:
    try:
        from rapidfuzz import fuzz
    except ModuleNotFoundError as error:
        raise UserError(f"WebShop's reward needs rapidfuzz ({error}): pip install 'agentrl[webshop]'") from error
    return fuzz.token_set_ratio


@lru_cache(maxsize=100_000)
def same_text(one: str, other: str) -> bool:
    """Whether the token-set ratio is above `THRESHOLD`: of ASCII letters and digits in lower case, rounded."""
    one, other = (re.sub(r"[^a-z0-9]", " ", text.encode("ascii", "ignore").decode().lower()) for text in (one, other))
    return bool(round(_ratio()(one.strip(), other.strip())) > THRESHOLD)


def type_reward(product: Product, goal: Goal) -> dict[str, float]:
    """Returns `r_type`, and what it follows from: `query_match`, `category_match` (0 or 1) and `title_score`."""
    query = product.query == goal.query
    levels = [
        {level.strip() for level in path.split("›")} for path in (product.product_category, goal.product_category)
    ]
    category = len(levels[0] & levels[1]) >= 2
    wanted = title_nouns(goal.name)
    # A goal title without nouns says nothing: the original's 0.2, which neither helps nor harms.
    title = len(set(wanted) & set(title_nouns(product.title))) / len(wanted) if wanted else 0.2
    if title == 0:
        r_type = 0.0
    elif title < 0.1:
        r_type = 0.1
    else:
        r_type = 1.0 if query or category or title > 0.2 else 0.5
    return {
        "r_type": r_type,
        "query_match": float(query),
        "category_match": float(category),
        "title_score": title,
    }


def matched_attributes(product: Product, goal: Goal) -> int:
    """Returns how many of the goal's attributes the product has, listed or in title, features or description."""
    texts = product.title.lower(), " ".join(product.bullet_points).lower(), product.description.lower()
    return sum(
        any(same_text(own, wanted) for own in product.attributes) or any(wanted in text for text in texts)
        for wanted in goal.attributes
    )


def matched_options(chosen: dict[str, str], goal: Goal) -> int:
    """Returns how many of the goal's options are among the chosen values, colours normalised."""
    values = [normalize_color(value) for value in chosen.values()]
    return sum(any(same_text(value, normalize_color(wanted)) for value in values) for wanted in goal.goal_options)


def purchase_reward(product: Product, goal: Goal, chosen: dict[str, str]) -> tuple[float, dict[str, float]]:
    """Returns the reward (0..1) of buying `product` with the `chosen` options (name -> value), and its parts.

    The parts carry the original's names: ``r = r_type * (w_att * r_att + w_option * r_option + w_price * r_price)``,
    and `query_match`, `category_match`, `title_score`, from which `r_type` follows. A goal without options has
    ``w_option = 0``.
    """
    kind = type_reward(product, goal)
    attributes, options = len(goal.attributes), len(goal.goal_options)
    got_attributes, got_options = matched_attributes(product, goal), matched_options(chosen, goal)
    price = int(product.price <= goal.price_upper)
    total = attributes + options + 1
    reward = kind["r_type"] * ((got_attributes + got_options + price) / total)
    return reward, {
        **kind,
        "r_att": got_attributes / attributes if attributes else 0.0,
        "w_att": attributes / total,
        "r_option": got_options / options if options else 0.0,
        "w_option": options / total,
        "r_price": float(price),
        "w_price": 1 / total,
    }
