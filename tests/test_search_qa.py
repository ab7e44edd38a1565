"""SearchQA: its world, questions, tools, splits and agents."""

from __future__ import annotations

import asyncio
import builtins
import pickle
import random
import threading

import pytest

from agentrl import envs
from agentrl.errors import UserError
from agentrl.policy import Policy, PolicyRequest, load_policy
from environments.search_qa import agents
from environments.search_qa.env import SearchQAEnv, in_split, normalised
from environments.search_qa.index import SearchIndex, build_index
from environments.search_qa.world import PEOPLE, RELATIONS, Thing, World, build_world

WORLD = build_world()


def played(policy: Policy, seed: int, **kwargs: object) -> tuple[bool, list[str]]:
    """Plays one episode; returns success and the actions."""
    env = envs.make("SearchQA-v0", **kwargs)
    observation, info = env.reset(seed=seed)
    actions, done = [], False
    while not done:
        request = PolicyRequest("e", len(actions), observation, [], info, seed=1000 * seed + len(actions))
        [action] = asyncio.run(policy.act([request]))
        observation, _, terminated, truncated, info = env.step(action.text)
        assert info["valid_action"], action.text
        actions.append(action.text)
        done = terminated or truncated
    return info["success"], actions


def test_the_world_follows_from_its_seed():
    again = World(0, 3000)
    assert again.pages == WORLD.pages
    assert again.facts == WORLD.facts
    assert World(1, 3000).pages != WORLD.pages
    assert 2800 <= len(WORLD.pages) <= 3200
    assert len(WORLD.pages) == len(WORLD.everything)


def test_every_page_tells_all_facts_and_only_those():
    for thing in WORLD.everything[::5]:
        page = WORLD.pages[thing.title]
        assert len(page) < 500
        for relation in (relation for relations in RELATIONS.values() for relation in relations):
            said, fact = agents.read_fact(page, relation), WORLD.facts[thing].get(relation)
            assert said == (fact.mention if isinstance(fact, Thing) else fact), (thing, relation.noun)


def test_names_are_shared_across_kinds_and_titles_are_not():
    names = [thing.name for thing in WORLD.everything]
    assert len(set(names)) < 0.95 * len(names)
    assert len({title.lower() for title in WORLD.titles}) == len(WORLD.titles)


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_questions_follow_the_facts_and_never_return(hops):
    rng = random.Random(hops)
    for start in rng.sample(WORLD.everything, 60):
        for question in WORLD.chains(start, hops):
            at, seen = start, [start]
            for relation in question.relations:
                at = WORLD.facts[at][relation]
                seen.append(at)
            assert at == question.answer
            assert len(set(seen)) == hops + 1
            mention, relations = agents.read_question(f"Question: {question.text}\n")
            assert (mention, tuple(relations)) == (start.mention, question.relations)
            assert question.text.startswith("Who") == (isinstance(at, Thing) and at.kind in PEOPLE)


def test_a_number_of_hops_can_be_asked_for():
    drawn = {}
    for hops in ((1, 1), (2, 3), (1, 3)):
        env = SearchQAEnv(hops=hops)
        drawn[hops] = [env.reset(seed=seed)[1]["hops"] for seed in range(60)]
    assert set(drawn[1, 1]) == {1}
    assert set(drawn[2, 3]) == {2, 3}
    assert all(10 <= drawn[1, 3].count(hops) <= 30 for hops in (1, 2, 3))


def test_train_and_test_share_no_question():
    train, test = SearchQAEnv(split="train"), SearchQAEnv(split="test")
    asked = [[env.reset(seed=seed)[0].partition("\n")[0] for seed in range(300)] for env in (train, test)]
    assert not set(asked[0]) & set(asked[1])
    assert len(set(asked[1])) > 290
    questions = [question.text for start in WORLD.everything[:300] for question in WORLD.chains(start, 2)]
    share = sum(in_split(text, "test") for text in questions) / len(questions)
    assert 0.07 < share < 0.13
    assert all(in_split(text, "train") != in_split(text, "test") for text in questions)


def test_tools_search_open_and_answer():
    env = SearchQAEnv()
    book = WORLD.things["novel"][0]
    question = next(q for q in WORLD.chains(book, 1) if q.relations[0].noun == "author")
    first, info = env.reset(seed=0, options={"question": question.text})
    assert first == f"Question: {question.text}\nNothing is open yet."
    assert info["hops"] == 1
    shown = env.step(f'search(query="{book.title}", top=3)')[0].splitlines()
    assert shown[1] == "Results:"
    assert shown[2].startswith(f"1. {book.title}: {book.name} is a novel.")
    assert len(shown) == 5
    assert env.step(f"open[{book.title.upper()}]")[0].endswith(f"Page: {book.title}\n{WORLD.pages[book.title]}")
    assert env.step("search[zzzz qqqq]")[0].endswith("\nNo page matches.")
    missing = env.step("open[Nowhere (city)]")
    assert missing[0].endswith("\nNo page has the title 'Nowhere (city)'; use a title that search lists.")
    assert missing[4]["valid_action"]
    assert "at least 1 and at most 20" in env.step("search(a, 100)")[0]
    observation, reward, terminated, _, info = env.step(f"answer[  The {question.answer.name.upper()}. ]")
    assert (reward, terminated, info["success"]) == (1.0, True, True)
    assert observation.endswith("\nCorrect.")


def test_a_wrong_answer_ends_the_episode():
    env = SearchQAEnv()
    env.reset(seed=0)
    observation, reward, terminated, _, info = env.step("answer[nobody at all]")
    assert (reward, terminated, info["success"]) == (0.0, True, False)
    assert observation.endswith("\nWrong.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Silent Harbour!", "silent harbour"),
        ("an apple, a pear", "apple pear"),
        ("1,234", "1234"),
        ("Theatre", "theatre"),
        ("A.B.", "ab"),
        ("...", ""),
    ],
)
def test_normalisation_is_squads(text, expected):
    assert normalised(text) == expected


def test_answers_may_carry_the_kind_and_nothing_else():
    env = SearchQAEnv(hops=(1, 1))
    city = WORLD.things["city"][0]
    question = next(q for q in WORLD.chains(city, 1) if q.relations[0].noun == "mayor")
    for text, right in [
        (question.answer.name, True),
        (question.answer.title, True),
        (question.answer.mention, True),
        (f"It is {question.answer.name}", False),
        ("", False),
    ]:
        env.reset(seed=0, options={"question": question.text})
        assert env.step(f"answer(text={text!r})")[4]["success"] is right


def test_state_keys_are_equal_exactly_when_question_and_screen_are():
    env = SearchQAEnv()
    _, start = env.reset(seed=3)
    title = WORLD.titles[5]
    keys = [
        env.step(text)[4]["state_key"]
        for text in (f"search[{title}]", f"open[{title}]", "search[of]", f"open[{title}]")
    ]
    assert keys[1] == keys[3]
    assert len({start["state_key"], *keys}) == 4
    assert env.step("nonsense")[4]["state_key"] == keys[3]
    env.reset(seed=4)
    assert env.step(f"open[{title}]")[4]["state_key"] != keys[1]


def test_the_index_ranks_like_bm25_and_breaks_ties_in_order():
    index = SearchIndex(["red shoes", "blue shoes", "blue shoes", "red red hats and many other words", "none"])
    assert index.search("shoe", 10) == [0, 1, 2]
    assert index.search("RED shoes", 1) == [0]
    assert index.search("blue", 10) == [1, 2]
    assert index.search("", 5) == index.search("?!", 5) == index.search("absent", 5) == []
    assert index.search("red " * 20_000, 2) == [0, 3] or index.search("red " * 20_000, 2) == [3, 0]


def test_threads_share_one_index():
    index = build_index(0, 3000)
    queries = [WORLD.titles[i] for i in range(0, 400, 4)]
    expected = [index.search(query, 5) for query in queries]
    found: list[bool] = []

    def work() -> None:
        found.append([index.search(query, 5) for query in queries] == expected)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 6


def test_a_missing_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **kwargs):
        if name == "bm25s":
            raise ModuleNotFoundError("No module named 'bm25s'", name="bm25s")
        return real(name, *arguments, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"bm25s is not installed; SearchQA needs: pip install 'agentrl\[search\]'"):
        SearchIndex(["a"])


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"hops": (0, 2)}, r"hops=\(0, 2\)"),
        ({"hops": (3, 2)}, r"hops=\(3, 2\)"),
        ({"split": "dev"}, "split='dev'"),
        ({"pages": 10}, "pages=10: 200 to 20000"),
    ],
)
def test_bad_settings_are_refused(kwargs, says):
    with pytest.raises(UserError, match=says):
        SearchQAEnv(**kwargs)


def test_a_question_of_no_world_is_refused():
    with pytest.raises(UserError, match="is no question of this world"):
        SearchQAEnv().reset(options={"question": "Who am I?"})


@pytest.mark.parametrize("kwargs", [{}, {"hops": (3, 3), "world": 3, "pages": 400}, {"split": "test"}])
def test_the_expert_never_errs(kwargs):
    expert = load_policy("search-qa-expert")
    assert all(played(expert, seed, **kwargs)[0] for seed in range(40))


def test_the_expert_reads_pages_and_not_hidden_state():
    env = SearchQAEnv(hops=(1, 1))
    city = WORLD.things["city"][1]
    question = next(q for q in WORLD.chains(city, 1) if q.relations[0].noun == "mayor")
    observation, _ = env.reset(seed=0, options={"question": question.text})
    forged = f"{observation}\nPage: {city.title}\n{city.name} is a city. The politician Ada Lovelace was elected mayor."
    expert = load_policy("search-qa-expert")
    asyncio.run(expert.act([PolicyRequest("e", 0, observation, []), PolicyRequest("other", 0, observation, [])]))
    [action] = asyncio.run(expert.act([PolicyRequest("e", 1, forged, [])]))
    assert action.text == 'answer(text="Ada Lovelace")'


def test_naive_and_random_stay_far_below_the_expert():
    naive, blind = load_policy("search-qa-naive"), load_policy("search-qa-random")
    episodes = [played(naive, seed) for seed in range(100)]
    assert 0.1 < sum(success for success, _ in episodes) / 100 < 0.45
    assert all(len(actions) == 3 for _, actions in episodes)
    assert sum(played(blind, seed)[0] for seed in range(100)) <= 5


def test_an_episode_goes_on_after_pickling():
    env = SearchQAEnv()
    env.reset(seed=4)
    other = pickle.loads(pickle.dumps(env))
    text = "search[the city]"
    assert other.step(text) == env.step(text)
    assert other.reset()[0] == env.reset()[0]


def test_its_agents_are_registered_by_role():
    found = {role: agent.policy for role, agent in envs.registry.scripted_agents("SearchQA-v0").items()}
    assert found == {"random": "search-qa-random", "naive": "search-qa-naive", "expert": "search-qa-expert"}
