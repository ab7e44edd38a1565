"""A made-up catalogue, so that WebShop runs without the original's files: products, options, prices and goals.

Titles hold brand and kind of product but no attribute. An attribute stands in the description or the first feature,
which search sees, or only in a later feature, which it does not: the first hit is often the right kind of thing and the
wrong one to buy, for its attributes, its options or its price.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from environments.webshop.goods import Goal, Product, draw_limit, draw_price, listed

# No two values of an option are alike by the reward's fuzzy ratio (as "2 ounce" and "4 ounce" would be).
_COLORS = listed("red, blue, green, black, white, grey, pink, navy, brown, purple")
_CLOTHES = {"color": _COLORS, "size": listed("small, medium, large, plus")}
_SHOES = {"color": _COLORS, "size": listed("6, 7, 8, 9, 10, 11")}
_KITCHEN = {"color": _COLORS, "size": listed("small, medium, large")}
_HOME = {"color": _COLORS, "size": listed("24 inch, 36 inch, 58 inch, 90 inch")}
_DEVICE = {"color": _COLORS, "style": listed("basic, pro, ultra")}
_COSMETIC = {"scent": listed("rose, lemon, mint, vanilla, unscented"), "size": listed("travel, standard, jumbo")}
_FOOD = {
    "flavor": listed("salted, chocolate, honey, garlic, original"),
    "size": listed("single bag, family box, bulk case"),
}


@dataclass(frozen=True)
class _Department:
    category: str
    path: str
    kinds: dict[str, tuple[str, float, dict[str, list[str]]]]
    """Kind of product -> (section, usual price in dollars, options)."""
    attributes: list[str]


_DEPARTMENTS = [
    _Department(
        "garden",
        "Home & Kitchen › Kitchen & Dining",
        {
            "mug": ("Drinkware", 14, _KITCHEN),
            "bowl": ("Tableware", 19, _KITCHEN),
            "pan": ("Cookware", 38, _KITCHEN),
            "jar": ("Storage", 12, _KITCHEN),
            "tray": ("Tableware", 24, _KITCHEN),
            "kettle": ("Cookware", 45, _KITCHEN),
            "lunch box": ("Storage", 21, _KITCHEN),
            "water bottle": ("Drinkware", 18, _KITCHEN),
        },
        listed(
            "light, thick, handmade, stackable, insulated, rustproof, eco friendly, bpa free, dishwasher "
            "safe, leak proof, heavy duty, easy clean"
        ),
    ),
    _Department(
        "garden",
        "Home & Kitchen › Furniture & Decor",
        {
            "coffee table": ("Tables", 95, _HOME),
            "bookshelf": ("Shelves", 80, _HOME),
            "area rug": ("Rugs", 60, _HOME),
            "blackout curtain": ("Curtains", 32, _HOME),
            "floor lamp": ("Lamps", 55, {"color": _COLORS}),
            "throw pillow": ("Bedding", 17, {"color": _COLORS}),
            "wall mirror": ("Mirrors", 48, {}),
        },
        listed(
            "solid wood, easy assemble, space saving, machine washable, non slip, fade resistant, living "
            "room, mid century, easy install, hand woven, scratch resistant, energy efficient"
        ),
    ),
    _Department(
        "fashion",
        "Clothing, Shoes & Jewelry › Clothing",
        {
            "hoodie": ("Sweaters", 34, _CLOTHES),
            "rain jacket": ("Jackets", 62, _CLOTHES),
            "polo shirt": ("Shirts", 25, _CLOTHES),
            "yoga pants": ("Pants", 29, _CLOTHES),
            "swimsuit": ("Swim", 31, _CLOTHES),
            "winter coat": ("Jackets", 88, _CLOTHES),
            "pajama set": ("Sleepwear", 27, _CLOTHES),
        },
        listed(
            "machine wash, quick drying, long sleeve, moisture wicking, tummy control, slim fit, wrinkle "
            "free, hand wash, fleece lined, elastic waist, drawstring closure, stretch fabric"
        ),
    ),
    _Department(
        "fashion",
        "Clothing, Shoes & Jewelry › Shoes",
        {
            "running shoes": ("Athletic", 66, _SHOES),
            "hiking boots": ("Outdoor", 84, _SHOES),
            "sandals": ("Sandals", 28, _SHOES),
            "slippers": ("Slippers", 22, _SHOES),
            "loafers": ("Flats", 47, _SHOES),
        },
        listed(
            "rubber sole, memory foam, arch support, slip resistant, steel toe, water resistant, ankle "
            "strap, faux leather, open toe, breathable mesh, shock absorbing, wide fit"
        ),
    ),
    _Department(
        "electronics",
        "Electronics › Accessories & Supplies",
        {
            "bluetooth speaker": ("Audio", 49, _DEVICE),
            "wireless headphones": ("Audio", 72, _DEVICE),
            "phone case": ("Cases", 13, {"color": _COLORS}),
            "usb cable": ("Cables", 9, {"color": _COLORS, "size": listed("3 ft, 6 ft, 10 ft")}),
            "tripod": ("Cameras", 36, _DEVICE),
            "power bank": ("Power", 33, _DEVICE),
            "keyboard": ("Computers", 58, _DEVICE),
        },
        listed(
            "fast charging, noise cancelling, high speed, long lasting, plug play, water proof, hands "
            "free, easy carry, heavy metal, gold plated, aluminum alloy, ultra hd"
        ),
    ),
    _Department(
        "beauty",
        "Beauty & Personal Care › Skin & Hair",
        {
            "face cream": ("Creams", 23, _COSMETIC),
            "shampoo": ("Hair Care", 16, _COSMETIC),
            "body lotion": ("Creams", 15, _COSMETIC),
            "hair mask": ("Hair Care", 18, _COSMETIC),
            "makeup brush": ("Tools", 11, {}),
        },
        listed(
            "cruelty free, sulfate free, paraben free, oil free, sensitive skin, dry skin, natural "
            "ingredients, coconut oil, tea tree, anti aging, alcohol free, fragrance free"
        ),
    ),
    _Department(
        "grocery",
        "Grocery & Gourmet Food › Snacks & Sweets",
        {
            "popcorn": ("Popcorn", 16, _FOOD),
            "trail mix": ("Nuts & Seeds", 22, _FOOD),
            "granola bars": ("Bars", 19, _FOOD),
            "crackers": ("Crackers", 13, _FOOD),
        },
        listed(
            "gluten free, sugar free, dairy free, non gmo, keto friendly, high protein, low sodium, nut "
            "free, plant based, artificial colors, ready eat, individually wrapped"
        ),
    ),
]
KINDS = [(name, department) for department in _DEPARTMENTS for name in department.kinds]
"""All kinds of products, in the order in which a catalogue of few kinds takes them."""

_LEADS = ("i am looking for", "i'm looking for", "i need", "i want", "find me", "i would like to buy")
_STARTS = listed("vel, or, na, kir, tam, bru, so, li, mar, zen, dol, fay, gra, hux, ive, jun")
_ENDS = listed("tora, vik, nex, lume, dara, wick, pell, quin, sten, roth, mira, gale")
_PRAISE = ("Great", "Nice", "As described", "Not bad", "Would buy again", "Fine for the price")
_GOALS_EACH = 4


def make_catalogue(products: int, kinds: int, seed: int) -> tuple[list[Product], list[Goal]]:
    """Returns a catalogue and its goals, a function of the arguments: some goals for each product, no two alike.

    Args:
        products: number of products.
        kinds: how many of `KINDS` there are, from the first on.
        seed: another seed, other goods.
    """
    rng = random.Random(f"webshop {seed}")
    goods = [_product(number, *KINDS[number % kinds], rng) for number in range(products)]
    goals: dict[str, Goal] = {}
    for product in goods:
        for _ in range(_GOALS_EACH):
            goal = _goal(product, rng)
            goals.setdefault(goal.instruction_text, goal)
    return goods, list(goals.values())


def _product(number: int, kind: str, department: _Department, rng: random.Random) -> Product:
    section, usual, choices = department.kinds[kind]
    brand, model = _name(rng), _name(rng)
    attributes = rng.sample(department.attributes, rng.choice((3, 3, 4)))
    options = {name: _some(values, rng) for name, values in choices.items()}
    low = round(usual * rng.uniform(0.5, 1.6)) + rng.choice((-0.01, 0.49, 0.95))
    pricing = (low,) if rng.random() < 0.85 else (low, round(low * rng.uniform(1.1, 1.5), 2))
    told = [attribute for attribute in attributes if rng.random() < 0.8]
    headline = told.pop() if told and rng.random() < 0.5 else "everyday use"
    hidden = [attribute for attribute in attributes if attribute != headline and attribute not in told]
    claims = f"It is made to be {' and '.join(told)}. " if told else ""
    asin = "B" + "".join(rng.choices("0123456789ABCDEFGHJKLMNPQRSTUVWXYZ", k=4)) + f"{number:05d}"
    return Product(
        asin=asin,
        title=f"{brand} {kind.title()}, {model} {rng.randint(10, 99)}",
        category=department.category,
        query=kind,
        product_category=f"{department.path} › {section} › {kind.title()}",
        description=f"The {model} {kind} by {brand}. {claims}Returns within {rng.choice((14, 30, 60))} days.",
        bullet_points=(
            f"For {headline}" if headline == "everyday use" else f"{headline.capitalize()} design",
            *(f"{attribute.capitalize()}, as {brand} customers expect" for attribute in hidden),
            f"Backed by the {brand} service team",
        ),
        attributes=tuple(attributes),
        options=options,
        pricing=pricing,
        price=draw_price(asin, pricing),
        rating=f"{rng.uniform(2.5, 5):.1f}",
        reviews=tuple(
            (rng.choice(_PRAISE), str(rng.randint(2, 5)), f"My {kind} came on time.") for _ in range(rng.randrange(3))
        ),
    )


def _goal(product: Product, rng: random.Random) -> Goal:
    attributes = rng.sample(product.attributes, rng.choice((1, 2, 2)))
    names = [name for name in product.options if rng.random() < 0.85]
    chosen = {name: rng.choice(product.options[name]) for name in names}
    limit, clause = draw_limit(product.price, rng)
    options = ", and ".join(f"{name}: {value}" for name, value in chosen.items())
    text = (
        f"{rng.choice(_LEADS)} {', '.join(attributes)} {product.query}{' with ' + options if options else ''}{clause}"
    )
    return Goal(
        asin=product.asin,
        category=product.category,
        query=product.query,
        name=product.title,
        product_category=product.product_category,
        instruction_text=text,
        attributes=tuple(attributes),
        price_upper=limit,
        goal_options=tuple(chosen.values()),
    )


def _some(values: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    """Returns three to five of `values`, in their order."""
    kept = set(rng.sample(values, rng.randint(3, min(5, len(values)))))
    return tuple(value for value in values if value in kept)


def _name(rng: random.Random) -> str:
    return (rng.choice(_STARTS) + rng.choice(_ENDS)).capitalize()
