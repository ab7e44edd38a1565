"""WebShop: reward, search, pages and protocol, the original's files, splits, and the scripted agents."""

from __future__ import annotations

import asyncio
import itertools
import json
import pathlib
import pickle
import re
import sys

import pytest

pytest.importorskip("bm25s", reason="pip install 'agentrl[webshop]'")
pytest.importorskip("Stemmer", reason="pip install 'agentrl[webshop]'")
pytest.importorskip("rapidfuzz", reason="pip install 'agentrl[webshop]'")

from agentrl import envs
from agentrl.errors import DataError, UserError
from agentrl.policy import PolicyRequest, load_policy
from environments.webshop import files, search
from environments.webshop.agents import read_page
from environments.webshop.env import WebShopEnv
from environments.webshop.goods import Goal, Product
from environments.webshop.reward import normalize_color, purchase_reward, same_text, title_nouns, type_reward
from environments.webshop.shop import ShopSettings, load_shop
from environments.webshop.synthetic import KINDS, make_catalogue

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data" / "webshop"
SMALL = {"products": 120, "kinds": 3}


def product(**changes: object) -> Product:
    fields = {
        "asin": "B000000001",
        "title": "Velora Travel Mug",
        "category": "garden",
        "query": "mug",
        "product_category": "Home › Kitchen › Mugs",
        "description": "Keeps drinks hot. Dishwasher safe.",
        "bullet_points": ("Leak proof lid", "Fits cup holders"),
        "attributes": ("double wall", "bpa free"),
        "options": {"color": ("red", "navy blue"), "size": ("12 ounce", "20 ounce")},
        "pricing": (25.0,),
        "price": 25.0,
    }
    return Product(**{**fields, **changes})  # type: ignore[arg-type]


def goal(**changes: object) -> Goal:
    fields = {
        "asin": "B000000001",
        "category": "garden",
        "query": "mug",
        "name": "Velora Travel Mug",
        "product_category": "Home › Kitchen › Mugs",
        "instruction_text": "i am looking for a mug",
        "attributes": ("bpa free",),
        "price_upper": 30.0,
        "goal_options": ("red",),
    }
    return Goal(**{**fields, **changes})  # type: ignore[arg-type]


RED, BIG = {"color": "red"}, {"color": "red", "size": "20 ounce"}
ALIEN = {"query": "lamp", "product_category": "Home › Decor › Lamps"}
TEN = "Alpha Bravo Carbon Delta Echo Foxtrot Gamma Hotel India Juliet"

# (what, product, goal, chosen options, reward): each reward is worked out by hand from the rule, and written as
# r_type * (attributes + options + price) / (number of attributes + number of options + 1), what is met in the order of
# the rule. Unless a case says otherwise one attribute, one option and the price are asked for: 3 in all.
CASES = [
    ("all met", {}, {}, RED, 1 * (1 + 1 + 1) / 3),
    ("too dear", {"price": 30.01}, {}, RED, 1 * (1 + 1 + 0) / 3),
    ("price equal to the limit", {"price": 30.0}, {}, RED, 1 * (1 + 1 + 1) / 3),
    ("option not chosen", {}, {}, {}, 1 * (1 + 0 + 1) / 3),
    ("other option chosen", {}, {}, {"color": "navy blue"}, 1 * (1 + 0 + 1) / 3),
    ("option of another name, right value", {}, {}, {"shade": "red"}, 1 * (1 + 1 + 1) / 3),
    (
        "colour shade counts as its colour",
        {},
        {"goal_options": ("dark navy",)},
        {"color": "dark grey"},
        1 * (1 + 1 + 1) / 3,
    ),
    ("colour inside a longer value", {}, {}, {"color": "a-red | m"}, 1 * (1 + 1 + 1) / 3),
    ("colour inside another word", {}, {}, {"color": "layered"}, 1 * (1 + 1 + 1) / 3),
    ("two options, both", {}, {"goal_options": ("red", "20 ounce")}, BIG, 1 * (1 + 2 + 1) / 4),
    ("two options, one", {}, {"goal_options": ("red", "5 litres")}, BIG, 1 * (1 + 1 + 1) / 4),
    ("two options, none", {}, {"goal_options": ("pink", "5 litres")}, BIG, 1 * (1 + 0 + 1) / 4),
    ("12 ounce is 87.5 % of 20 ounce", {}, {"goal_options": ("red", "12 ounce")}, BIG, 1 * (1 + 2 + 1) / 4),
    ("more options than asked for", {}, {}, BIG, 1 * (1 + 1 + 1) / 3),
    ("no option asked for", {}, {"goal_options": ()}, {}, 1 * (1 + 0 + 1) / 2),
    ("no option asked for, too dear", {"price": 99.0}, {"goal_options": ()}, {}, 1 * (1 + 0 + 0) / 2),
    ("option nearly the same", {}, {"goal_options": ("20 ounces",)}, {"size": "20 ounce"}, 1 * (1 + 1 + 1) / 3),
    ("option words in another order", {}, {"goal_options": ("ounce 20",)}, {"size": "20 ounce"}, 1 * (1 + 1 + 1) / 3),
    ("small is part of x-small", {}, {"goal_options": ("small",)}, {"size": "x-small"}, 1 * (1 + 1 + 1) / 3),
    ("attribute listed, nearly the same", {}, {"attributes": ("bpa-free",)}, RED, 1 * (1 + 1 + 1) / 3),
    ("attribute is part of a listed one", {"attributes": ("bpa free lid",)}, {}, RED, 1 * (1 + 1 + 1) / 3),
    ("attribute in the title", {}, {"attributes": ("travel",)}, RED, 1 * (1 + 1 + 1) / 3),
    ("attribute in a feature", {}, {"attributes": ("leak proof",)}, RED, 1 * (1 + 1 + 1) / 3),
    ("attribute across two features", {}, {"attributes": ("lid fits",)}, RED, 1 * (1 + 1 + 1) / 3),
    ("attribute in the description", {}, {"attributes": ("dishwasher safe",)}, RED, 1 * (1 + 1 + 1) / 3),
    ("attribute nowhere", {}, {"attributes": ("gluten free",)}, RED, 1 * (0 + 1 + 1) / 3),
    ("two attributes, one", {}, {"attributes": ("bpa free", "gluten free")}, RED, 1 * (1 + 1 + 1) / 4),
    ("nothing but the kind", {"price": 99.0}, {"attributes": ("gluten free",)}, {}, 1 * (0 + 0 + 0) / 3),
    ("other query, same categories", {"query": "cup"}, {}, RED, 1 * (1 + 1 + 1) / 3),
    ("one shared level, same title", ALIEN, {}, RED, 1 * (1 + 1 + 1) / 3),
    ("alien, title score 1/3 > 0.2", {**ALIEN, "title": "Oak Mug Stand"}, {}, RED, 1 * (1 + 1 + 1) / 3),
    (
        "alien, title score exactly 0.2",
        {**ALIEN, "title": "Alpha"},
        {"name": "Alpha Bravo Carbon Delta Echo"},
        RED,
        0.5 * (1 + 1 + 1) / 3,
    ),
    ("alien, title score 0.1", {**ALIEN, "title": "Alpha"}, {"name": TEN}, RED, 0.5 * (1 + 1 + 1) / 3),
    ("same query, title score 0.1", {"title": "Alpha"}, {"name": TEN}, RED, 1 * (1 + 1 + 1) / 3),
    ("alien, title score 1/11", {**ALIEN, "title": "Alpha"}, {"name": f"{TEN} Kilo"}, RED, 0.1 * (1 + 1 + 1) / 3),
    ("same query, title score 1/11", {"title": "Alpha"}, {"name": f"{TEN} Kilo"}, RED, 0.1 * (1 + 1 + 1) / 3),
    ("same query, no common noun", {"title": "Oak Stand"}, {}, RED, 0 * (1 + 1 + 1) / 3),
    ("half type, too dear", {**ALIEN, "title": "Alpha", "price": 31.0}, {"name": TEN}, RED, 0.5 * (1 + 1 + 0) / 3),
    ("goal title without nouns, same query", {}, {"name": "12 x 4"}, RED, 1 * (1 + 1 + 1) / 3),
    ("goal title without nouns, alien", ALIEN, {"name": "12 x 4"}, RED, 0.5 * (1 + 1 + 1) / 3),
    (
        "a repeated noun counts twice in the length",
        {**ALIEN, "title": "Alpha"},
        {"name": "Alpha Bravo Bravo"},
        RED,
        1 * (1 + 1 + 1) / 3,
    ),
    ("no attribute asked for", {}, {"attributes": ()}, RED, 1 * (0 + 1 + 1) / 2),
    ("nothing but a price asked for", {}, {"attributes": (), "goal_options": ()}, {}, 1 * (0 + 0 + 1) / 1),
    (
        "a tenth of the type, too dear",
        {"title": "Alpha", "price": 31.0},
        {"name": f"{TEN} Kilo"},
        RED,
        0.1 * (1 + 1 + 0) / 3,
    ),
    ("title words apart from case", {**ALIEN, "title": "VELORA lamp"}, {}, RED, 1 * (1 + 1 + 1) / 3),
]


@pytest.mark.parametrize(("bought", "asked", "chosen", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_the_reward_agrees_with_the_hand_computed_table(bought, asked, chosen, expected):
    reward, parts = purchase_reward(product(**bought), goal(**asked), chosen)
    assert reward == pytest.approx(expected)
    assert reward == 1.0 or expected != 1.0, "success asks for exactly 1"
    rebuilt = sum(parts[f"w_{name}"] * parts[f"r_{name}"] for name in ("att", "option", "price"))
    assert parts["r_type"] * rebuilt == pytest.approx(reward)
    assert parts["w_att"] + parts["w_option"] + parts["w_price"] == pytest.approx(1)


def test_the_table_reaches_every_branch_of_the_type():
    kinds = {type_reward(product(**bought), goal(**asked))["r_type"] for _, bought, asked, *_ in CASES}
    assert kinds == {0.0, 0.1, 0.5, 1.0}
    assert len(CASES) >= 30


def test_the_threshold_of_the_ratio_lies_between_85_and_86():
    assert same_text("abcdefg", "abcdef"), "2 * 6 / 13 = 92.3"
    assert same_text("abcdefg", "abcdefh"), "2 * 6 / 14 = 85.7, rounded to 86"
    assert not same_text("abcdef", "abcdeg"), "2 * 5 / 12 = 83.3"
    assert not same_text("", "")


def test_nouns_are_capitalised_words_or_words_without_an_adjective_ending():
    assert title_nouns("Soft and Cozy blanket, washable for 2 beds (Pack of 3)") == (
        "soft", "cozy", "blanket", "beds", "pack",
    )  # fmt: skip


def test_colours_are_normalised_to_the_first_in_the_list():
    assert [normalize_color(c) for c in ("black forest", "violet lavender", "123alabaster", "webshop", "")] == [
        "black", "lavender", "alabaster", "webshop", "",
    ]  # fmt: skip


def test_search_scores_are_lucenes_bm25():
    texts = ["red running shoes", "red shoes for the run, red soles", "blue lamp"]
    index = search.SearchIndex.build(texts)
    assert index.search("runs") == [0, 1], "stemmed; the shorter text first"
    assert index.search("the") == index.search("zebra") == index.search("") == []
    # idf = ln(1 + (N - n + 0.5) / (n + 0.5)); tf = f / (f + k1 (1 - b + b length / mean length)); 2 of 3 texts have
    # "red", once in 3 words and twice in 5; "for" and "the" are stop-words; the mean length is 10 / 3.
    idf = 0.470003629245736
    expected = [idf * f / (f + 0.9 * (0.6 + 0.4 * length / (10 / 3))) for f, length in ((1, 3), (2, 5))]
    scores = index._bm25.get_scores_from_ids([index._vocabulary["red"]])
    assert scores[:2] == pytest.approx(expected, rel=1e-5)
    assert index.search("red") == [1, 0]


def test_equal_hits_keep_their_order_and_are_cut_at_k():
    index = search.SearchIndex.build(["mug", "cup", "mug", "mug"])
    assert index.search("mugs", 2) == [0, 2]
    assert index.search("mug's") == [0, 2, 3]


def test_an_index_of_nothing_but_stop_words_finds_nothing():
    assert search.SearchIndex.build(["the", "and"]).search("the mug") == []


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    with pytest.raises(UserError, match=r"pip install 'agentrl\[webshop\]'"):
        search.SearchIndex.build(["mug"])


def shop(**kwargs: object) -> WebShopEnv:
    env = WebShopEnv(**{**SMALL, **kwargs})  # type: ignore[arg-type]
    env.reset(seed=0, options={"goal": 0})
    return env


def play(env: WebShopEnv, *actions: str) -> tuple[str, float, bool, dict]:
    for action in actions:
        observation, reward, terminated, _, info = env.step(action)
        assert info["valid_action"], info
    return observation, reward, terminated, info


def test_pages_have_the_originals_shape():
    env = WebShopEnv(**SMALL)
    first, info = env.reset(seed=0, options={"goal": 0})
    text = env.shop.goals[0].instruction_text
    assert first == f"WebShop [SEP] Instruction: [SEP] {text} [SEP] Search"
    assert info["available_actions"] == {"has_search_bar": True, "clickables": []}
    assert info["admissible_actions"] == [f"search[{text}]"]
    results, *_, info = play(env, "search[mug]")
    parts = results.split(" [SEP] ")
    assert parts[:5] == ["Instruction:", text, "Back to Search", "Page 1 (Total results: 40)", "Next >"]
    assert len(parts) == 5 + 3 * 10
    assert info["available_actions"]["clickables"] == ["back to search", "next >", *(p.lower() for p in parts[5::3])]
    item, *_, info = play(env, f"click[{parts[5].lower()}]")
    parts = item.split(" [SEP] ")
    assert parts[2:5] == ["Back to Search", "< Prev", "color"]
    assert parts[-7].startswith("Price: $")
    assert parts[-6].startswith("Rating: ")
    assert parts[-5:] == ["Description", "Features", "Reviews", "Attributes", "Buy Now"]
    assert "click[buy now]" in info["admissible_actions"]


def test_rich_text_marks_buttons_and_what_was_clicked():
    env = shop(observation="text_rich")
    results, *_ = play(env, "search[mug]")
    asin = re.search(r"\n\n\[button\] (\w+) \[button_\]\n", results)[1]
    item, *_ = play(env, f"click[{asin}]")
    size = re.search(r"\nsize\n  \[button\] (\w+) ", item)[1]
    item, *_ = play(env, f"click[{size}]")
    assert item.startswith(f"You have clicked {size}.\nInstruction:")
    assert f"  [clicked button] {size} [clicked button_]\n" in item
    results, *_ = play(env, "click[< Prev]")
    assert f"[clicked button] {asin} [clicked button_]" in results


def test_sub_pages_tell_what_the_catalogue_holds_and_lead_back():
    env = shop()
    clickables = play(env, "search[mug]")[3]["available_actions"]["clickables"]
    item = play(env, f"click[{clickables[2]}]")[0]
    bought = env._product
    assert bought.description in play(env, "click[description]")[0]
    assert play(env, "click[< prev]")[0] == item
    features = play(env, "click[features]")[0]
    assert all(text in features for text in bought.bullet_points)
    attributes = play(env, "click[< prev]", "click[attributes]")[0]
    assert " [SEP] ".join(bought.attributes) in attributes
    assert "Reviews" not in attributes
    assert play(env, "click[back to search]")[0].endswith("[SEP] Search")
    assert "Attributes" not in play(shop(show_attributes=False), "search[mug]", f"click[{clickables[2]}]")[0]


def test_result_pages_lead_forth_and_back_and_end():
    env = shop(page_size=15)
    first = play(env, "search[mug]")[0]
    second = play(env, "click[next >]")[0]
    assert "Page 2 (Total results: 40) [SEP] < Prev [SEP] Next >" in second
    third, *_, info = play(env, "click[next >]")
    assert "next >" not in info["available_actions"]["clickables"]
    assert len(third.split(" [SEP] ")) == 5 + 3 * 10
    assert play(env, "click[< prev]", "click[< prev]")[0] == first
    assert "Total results: 0" in play(env, "click[back to search]", "search[zebra]")[0]


def test_buying_what_is_asked_for_pays_one_and_ends():
    env = shop()
    wanted = env.shop.goals[0]
    number = [p.asin for p in env.shop.products].index(wanted.asin)
    title = env.shop.products[number].title
    play(env, f"search[{title}]", f"click[{wanted.asin}]", *(f"click[{value}]" for value in wanted.goal_options))
    _, reward, terminated, info = play(env, "click[Buy Now]")
    assert (reward, terminated, info["success"]) == (1.0, True, True)
    assert info["reward_parts"]["r_type"] == info["reward_parts"]["r_att"] == 1
    with pytest.raises(UserError, match="after the episode ended"):
        env.step("click[buy now]")


def test_leaving_a_product_forgets_its_options():
    env = shop()
    wanted = env.shop.goals[0]
    title = next(p.title for p in env.shop.products if p.asin == wanted.asin)
    choose = [f"click[{value}]" for value in wanted.goal_options]
    assert choose
    play(env, f"search[{title}]", f"click[{wanted.asin}]", *choose, "click[< prev]", f"click[{wanted.asin}]")
    _, reward, _, info = play(env, "click[buy now]")
    assert info["reward_parts"]["r_option"] == 0
    assert not info["success"]
    assert 0 < reward < 1


def test_state_keys_tell_states_apart_and_only_those():
    env = shop()
    keys = [play(env, "search[mug]")[3]["state_key"]]
    asin = env.shop.products[env._hits[0]].asin
    option = env.shop.products[env._hits[0]].options["size"][0]
    for action in (
        f"click[{asin}]",
        f"click[{option}]",
        "click[features]",
        "click[< prev]",
        "click[< prev]",
        "click[next >]",
    ):
        keys.append(play(env, action)[3]["state_key"])
    assert keys[4] == keys[2], "back from the features"
    assert keys[5] == keys[0], "back at the results"
    assert len(set(keys)) == 5
    env.step("nonsense")
    assert env.step("nonsense")[4]["state_key"] == keys[6]


@pytest.mark.parametrize(
    "text",
    [
        "Action: search[red mug]",
        "<answer>search[ red mug ]</answer>",
        "SEARCH [Red  Mug]",
        "I think\nAction: search[red mug]\n",
    ],
)
def test_actions_are_found_in_what_models_write_around_them(text):
    assert shop().parse_action(text) == ("search", "red mug")


@pytest.mark.parametrize(
    "text",
    ["", "buy", "click[buy now]", "search[]", "search[" + "x" * 501 + "]", "click[search]", "\ud800", "x" * 10**6],
)
def test_other_text_changes_nothing(text):
    env = shop()
    observation, reward, terminated, _, info = env.step(text)
    assert observation.startswith("Invalid action: ")
    assert observation.endswith("[SEP] Search")
    assert (reward, terminated, info["valid_action"]) == (0, False, False)
    assert len(observation) < 1000


def test_short_pages_hold_goal_and_results_in_few_words():
    env = shop(observation="short", page_size=4)
    wanted = env.shop.goals[0]
    observation, _, _, info = play(env, "search mug")
    lines = observation.splitlines()
    assert lines[0] == f"want {wanted.query} {' '.join(wanted.attributes)}"
    assert lines[1] == f"with {' '.join(wanted.goal_options)}"
    assert lines[2] == f"under {wanted.price_upper / 10:.0f}"
    assert [line[0] for line in lines[3:7]] == list("abcd")
    assert lines[7:] == ["page 1 more"]
    assert info["admissible_actions"] == ["back", "next", "a", "b", "c", "d"]
    item, *_, info = play(env, "b")
    assert item.splitlines()[3].startswith("item mug ")
    size = env._product.options["size"][0]
    assert play(env, size)[0].splitlines()[-2] == f"have {size}"
    assert play(env, "prev")[0].splitlines()[4] == "b seen"
    observation, _, _, _, info = env.step("none of these")
    assert not info["valid_action"]
    assert observation.splitlines()[4] == "b seen", "no error line, which a tiny model cannot read"
    assert play(env, "click[a]", "buy")[2]


def test_short_pages_count_down_what_is_left_to_choose():
    env = shop(observation="short")
    wanted = env.shop.goals[0]
    play(env, "search")
    number = [env.shop.products[hit].asin for hit in env._shown_hits()].index(wanted.asin)
    play(env, "abcdefghij"[number])
    for i, value in enumerate(wanted.goal_options, 1):
        left = [f"[{other}]" for other in wanted.goal_options[i:]]
        assert play(env, value)[0].endswith("\n" + " ".join(["choose", *left] if left else ["ready"]))
    assert play(env, "buy")[1] == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_splits_never_share_a_goal(split):
    held = load_shop(ShopSettings(**SMALL)).splits
    assert not {*held["train"]} & {*held["test"]}
    assert sorted(held["train"] + held["test"]) == held["all"]
    assert 0.04 < len(held["test"]) / len(held["all"]) < 0.2
    env = WebShopEnv(split=split, **SMALL)
    env.reset(seed=1)
    assert env._number in held[split]


def test_a_catalogue_is_a_function_of_its_seed_and_titles_hold_no_attribute():
    products, goals = make_catalogue(60, 6, 0)
    assert (products, goals) == make_catalogue(60, 6, 0)
    assert products != make_catalogue(60, 6, 1)[0]
    assert len({p.asin for p in products}) == 60
    assert len({g.instruction_text for g in goals}) == len(goals) > 200
    for p in products:
        assert not any(attribute in p.title.lower() for attribute in p.attributes)
        assert all(purchase_reward(p, g, dict(enumerate(g.goal_options)))[0] == 1 for g in goals if g.asin == p.asin)  # type: ignore[arg-type]


def test_values_and_attributes_of_the_catalogue_differ_by_the_rewards_ratio():
    for department in {id(d): d for _, d in KINDS}.values():
        groups = [department.attributes, *(values for _, _, o in department.kinds.values() for values in o.values())]
        alike = [(a, b) for group in groups for a, b in itertools.combinations(group, 2) if same_text(a, b)]
        assert not alike


def test_an_environment_is_pickled_without_its_shop():
    env = shop()
    dumped = pickle.dumps(env)
    assert len(dumped) < 50_000
    copy = pickle.loads(dumped)
    assert play(copy, "search[mug]")[0] == play(env, "search[mug]")[0]


def success(policy: str, episodes: int, **kwargs: object) -> float:
    env, solved, agent = envs.make("WebShop-v0", **kwargs), 0, load_policy(policy)
    for seed in range(episodes):
        observation, info = env.reset(seed=seed)
        done, turn = False, 0
        while not done:
            request = PolicyRequest("e", turn, observation, [], info, seed=1000 * seed + turn)
            [action] = asyncio.run(agent.act([request]))
            observation, _, terminated, truncated, info = env.step(action.text)
            done, turn = terminated or truncated, turn + 1
        solved += info["success"]
    return solved / episodes


def test_the_expert_shops_well_and_the_naive_agent_badly_in_the_default_catalogue():
    assert success("webshop-expert", 100) >= 0.93
    assert success("webshop-naive", 100) <= 0.3
    assert success("random", 100) <= 0.2


@pytest.mark.parametrize("observation", ["text_rich", "short"])
def test_agents_read_all_forms_of_pages(observation):
    small = {"products": 200, "kinds": 4, "observation": observation}
    assert success("webshop-expert", 40, **small) >= 0.9
    assert success("webshop-naive", 40, **small) <= 0.3


def test_the_noisy_expert_lies_between_and_refuses_odd_skills():
    with pytest.raises(UserError, match="skill=2"):
        load_policy("webshop-noisy-expert", skill=2)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"products": 0}, "products=0"),
        ({"products": 100_000}, "products=100000"),
        ({"kinds": 99}, "kinds=99"),
        ({"split": "dev"}, "split='dev'"),
        ({"observation": "html"}, "observation='html'"),
        ({"page_size": 0}, "page_size=0"),
        ({"reviews": "r.json"}, "reviews='r.json' goes with items="),
        ({"items": "i.json"}, "needs attributes="),
        ({"items": "i.json", "attributes": "a.json"}, r"a\.json: cannot be read"),
        ({"products": 1, "kinds": 1, "catalogue_seed": 1, "split": "test"}, "split='test' of"),
    ],
)
def test_impossible_settings_are_refused_before_any_episode(kwargs, says):
    with pytest.raises(UserError, match=says):
        envs.make("WebShop-v0", **kwargs)


def test_an_unknown_goal_is_refused():
    with pytest.raises(UserError, match="goal=9999"):
        shop().reset(options={"goal": 9999})


RECORD = {
    "asin": "B000000001",
    "name": "Velora Travel Mug",
    "category": "garden",
    "query": " Mug ",
    "product_category": "Home › Kitchen › Mugs",
    "full_description": "Keeps drinks hot.",
    "small_description": ["Leak proof lid"],
    "pricing": "$12.50 to $1,020.00",
    "customization_options": {"Color": [{"value": "Red/Blue ", "image": None}, {"value": "Grey"}], "size": None},
    "images": ["x.jpg"],
    "seller_name": "nobody",
}


def write(folder: pathlib.Path, **replace: object) -> dict[str, str]:
    """Writes a small set of files in the original's form and returns the settings that load it."""
    second = {
        **RECORD,
        "asin": "B000000002",
        "name": "Plain Cup",
        "query": "cup",
        "pricing": "",
        "customization_options": "",
    }
    contents = {
        "items": [RECORD, {**RECORD, "name": "the same asin again"}, {**RECORD, "asin": "B00000000001"}, second],
        "attributes": {
            "B000000001": {
                "attributes": ["bpa free"],
                "instruction": "Find me bpa free mugs",
                "instruction_attributes": ["bpa free"],
            }
        },
        "human_goals": {
            "B000000002": [
                {
                    "instruction": "i need a cup.",
                    "instruction_attributes": ["leak proof"],
                    "instruction_options": ["grey"],
                },
                {"instruction": "any", "instruction_attributes": [], "instruction_options": []},
            ]
        },
        "reviews": [
            {"asin": "B000000001", "average_rating": 4.5, "reviews": [{"title": "Good", "stars": "5", "review": "ok"}]}
        ],
        **replace,
    }
    for name, content in contents.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=1)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return {name: str(folder / f"{name}.json") for name in contents}


def test_files_of_the_original_are_read_as_it_reads_them(tmp_path):
    paths = write(tmp_path)
    held = load_shop(ShopSettings(**{**paths, "human_goals": None}))
    mug, cup = held.products
    assert mug.options == {"color": ("red | blue", "grey")}
    assert mug.pricing == (12.5, 1020.0)
    assert 12.5 <= mug.price <= 1020
    assert mug.price_tag == "$12.5 to $1020.0"
    assert (mug.query, mug.rating, mug.reviews) == ("mug", "4.5", (("Good", "5", "ok"),))
    assert (cup.price_tag, cup.attributes, cup.options) == ("$100.0", ("DUMMY_ATTR",), {})
    texts = [g.instruction_text.partition(", and price")[0] for g in held.goals]
    assert texts == ["Find me bpa free mugs with color: red | blue", "Find me bpa free mugs with color: grey"]
    [human] = load_shop(ShopSettings(**paths)).goals
    assert re.fullmatch(r"i need a cup, and price lower than 1[1-4]0\.00 dollars", human.instruction_text)
    assert human.price_upper in (120.0, 130.0, 140.0)
    assert human.goal_options == ("grey",)


def test_a_cache_on_disk_holds_the_same_shop_and_is_made_once(tmp_path, monkeypatch):
    paths = {**write(tmp_path), "human_goals": None}
    plain = load_shop(ShopSettings(**paths))
    kept = load_shop(ShopSettings(**paths, cache_dir=str(tmp_path / "cache")))
    assert list(kept.products[:]) == list(plain.products)
    assert (kept.goals, kept.splits) == (plain.goals, plain.splits)
    assert kept.index.search("leaking mugs") == plain.index.search("leaking mugs") == [0, 1]
    [folder] = (tmp_path / "cache").iterdir()
    load_shop.cache_clear()
    monkeypatch.setattr("environments.webshop.shop._build", None)
    assert load_shop(ShopSettings(**paths, cache_dir=str(tmp_path / "cache"))).goals == plain.goals
    assert [folder] == list((tmp_path / "cache").iterdir())
    env = WebShopEnv(**paths, cache_dir=tmp_path / "cache")
    env.reset(seed=0)
    assert "B000000001" in play(env, "search[mug]")[0]


def without(field: str) -> dict[str, object]:
    return {name: value for name, value in RECORD.items() if name != field}


@pytest.mark.parametrize(
    ("replace", "says"),
    [
        ({"items": [RECORD, {**without("name"), "asin": "B2"}]}, r"items\.json: line 30, entry 1 \(B2\): field 'name'"),
        ({"items": [without("name")]}, r"items\.json: line 2, entry 0 \(B000000001\): field 'name' is missing"),
        ({"items": [without("asin")]}, "entry 0: field 'asin' is missing"),
        ({"items": [{**RECORD, "query": 3}]}, "field 'query' is a number, not a string"),
        ({"items": [{**RECORD, "pricing": "cheap"}]}, "field 'pricing' is 'cheap'"),
        ({"items": [{**RECORD, "pricing": "$1.2.3"}]}, r"field 'pricing' is '\$1\.2\.3'"),
        ({"items": [{**RECORD, "small_description": [1]}]}, "field 'small_description' is not a list of strings"),
        ({"items": [{**RECORD, "customization_options": [1]}]}, "field 'customization_options' is a list"),
        ({"items": [{**RECORD, "customization_options": {"size": "L"}}]}, r"'customization_options\.size' is a string"),
        ({"items": [{**RECORD, "customization_options": {"size": [{}]}}]}, "field 'value' is missing"),
        ({"items": ["mug"]}, "entry 0: an object is wanted, not a string"),
        ({"items": '[\n{"asin": "B1",\n"name": }]'}, r"items\.json: line 3, entry 0: not JSON"),
        ({"items": '[\n{"asin": "B1"}'}, r"items\.json: line 2, entry .*"),
        ({"items": "{}"}, "a JSON array is wanted"),
        ({"items": ""}, "a JSON array is wanted"),
        ({"items": []}, "no product has a goal"),
        ({"attributes": "[]"}, r"attributes\.json: an object with an entry for each asin"),
        ({"attributes": "{\n,}"}, r"attributes\.json: line 2: not JSON"),
        (
            {"attributes": {"B1": {"attributes": "bpa"}}},
            r"attributes\.json: entry 'B1': field 'attributes' is not a list",
        ),
        ({"attributes": {"B1": {"instruction": "find"}}}, "entry 'B1': field 'instruction_attributes' is missing"),
        ({"human_goals": {"B1": {}}}, r"human_goals\.json: entry 'B1': a list of instructions"),
        ({"human_goals": {"B1": [{"instruction_attributes": []}]}}, r"entry 'B1'\[0\]: field 'instruction' is missing"),
        (
            {"reviews": [{"asin": "B1", "reviews": {"a": 1}}]},
            r"reviews\.json: line 2, entry 0: field 'reviews' is an object",
        ),
    ],
)
def test_broken_files_are_named_with_entry_and_field(tmp_path, replace, says):
    with pytest.raises(DataError, match=says):
        load_shop(ShopSettings(**write(tmp_path, **replace)))


@pytest.mark.parametrize("chunk", [3, 4, 7, 1 << 20])
def test_arrays_are_streamed_whatever_the_pieces(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text('\n [ {"a": "]["},\n\n"ü,",\n3 \n, {"b": [1, {}]} ]\n', encoding="utf-8")
    assert list(files.stream_array(path)) == [(0, 2, {"a": "]["}), (1, 4, "ü,"), (2, 5, 3), (3, 6, {"b": [1, {}]})]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the original's files are not here")
def test_the_originals_attribute_and_instruction_files_are_parsed():
    entries = files.read_attributes(SHARED / "items_ins_v2_1000.json")
    assert len(entries) == 1000
    asked = [entry for entry in entries.values() if "instruction" in entry.value]
    assert len(asked) == 415
    assert asked[0].texts("instruction_attributes") == ("tea tree", "natural ingredients")
    entry = entries["B07DJJXGB5"]
    [made] = files.synthetic_goals(product(asin="B07DJJXGB5", options={}), entry)
    assert re.fullmatch(r"Find me scrubs .*, and price lower than [3-6]0\.00 dollars", made.instruction_text)
    bought = product(attributes=entry.texts("attributes"), title="Scrub Mug")
    assert purchase_reward(bought, made, {})[0] == 1
    instructions = files.read_instructions(SHARED / "human_goals.json")
    assert len(instructions) == 12_087
    for text in instructions:
        assert read_page(f"WebShop [SEP] Instruction: [SEP] {text} [SEP] Search", []).kind == "search"


def test_the_turn_limit_truncates():
    env = envs.make("WebShop-v0", **SMALL)
    env.reset(seed=0)
    ends = [env.step("nonsense")[3] for _ in range(15)]
    assert ends == [False] * 14 + [True]
