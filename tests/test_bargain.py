"""Bargaining: the rule that scores a deal, the partner's concessions, offers in free text, splits and agents."""

from __future__ import annotations

import asyncio
import itertools
import pickle
import random

import numpy as np
import pytest

from agentrl import envs
from agentrl.envs.registry import scripted_agents
from agentrl.errors import ActionError, UserError
from agentrl.policy import Policy, PolicyRequest, load_policy
from environments.social.bargain import BargainEnv, topics
from environments.social.deals import CONCESSION, Stakes, counter_offer, demand, draw_stakes, in_split, worth

STAKES = Stakes(own=((9, 5, 0), (4, 2, 0)), theirs=((0, 2, 3), (0, 6, 8)), floor=4, their_floor=6)
"""Issue one is dear to us, issue two to them: (0, 1) is worth 11 to us and 6 to them."""


def started(seed: int = 0, **kwargs: object) -> BargainEnv:
    env = BargainEnv(**kwargs)
    env.reset(seed=seed)
    return env


# --- the rule ---


@pytest.mark.parametrize(
    ("deal", "score"),
    [
        ((0, 1), 10.0),  # the best that they could agree to: 9 + 2
        ((0, 2), 10 * 5 / 7),  # 9 to us, 8 to them
        ((1, 1), 10 * 3 / 7),
        ((1, 2), 10 * 1 / 7),
        ((2, 0), 0.0),  # exactly the floor
        ((2, 2), 0.0),  # below it
        (None, 0.0),
    ],
)
def test_the_score_is_the_share_of_the_attainable_gain(deal, score):
    assert STAKES.best == 11
    assert STAKES.score(deal) == pytest.approx(score)


def test_an_efficient_deal_cannot_be_bettered_for_one_without_loss_to_the_other():
    efficient = {deal for deal in STAKES.deals if STAKES.efficient(deal)}
    assert efficient == {(0, 0), (0, 1), (0, 2), (1, 2), (2, 2)}


@pytest.mark.parametrize(
    ("strategy", "time", "moves", "least"),
    [
        ("steady", 0.5, 9, 14 - 8 * 0.5),
        ("hard", 0.5, 9, 14 - 8 * 0.25),
        ("reciprocal", 0.5, 0, 14 - 8 * 0.25),
        ("reciprocal", 0.5, 2, 14 - 8 * 0.75),
        ("reciprocal", 1.0, 9, 6),
        ("steady", 1.0, 0, 6),
        ("hard", 1.0, 0, 6),
    ],
)
def test_what_the_partner_demands(strategy, time, moves, least):
    assert demand(STAKES, strategy, time, moves) == pytest.approx(least)


def test_the_counter_offer_is_the_nearest_deal_that_meets_the_demand():
    assert counter_offer(STAKES, 6, near=(0, 0)) == (0, 1)
    assert counter_offer(STAKES, 9, near=(0, 0)) == (1, 2), "as near as (2, 1), and better for the partner"
    assert counter_offer(STAKES, 11, near=(0, 0)) == (2, 2)


@pytest.mark.parametrize(("issues", "options"), [*itertools.product((2, 3, 4), (2, 3, 5))])
def test_drawn_stakes_hold_what_is_promised(issues, options):
    rng = np.random.default_rng(issues)
    for _ in range(50):
        stakes = draw_stakes(rng, issues, options, "all")
        for points in (stakes.own, stakes.theirs):
            assert [len(line) for line in points] == [options] * issues
            assert sum(map(max, points)) == 6 * issues + 2
            assert max(map(max, points)) <= 9, "one digit each"
            assert all(line in (tuple(sorted(line)), tuple(sorted(line, reverse=True))) for line in points)
        assert [a[0] > a[-1] for a in stakes.own] == [b[0] < b[-1] for b in stakes.theirs], "opposite ends"
        assert stakes.best - stakes.floor >= 0.3 * (6 * issues + 2)
        theirs = max(stakes.deals, key=lambda deal: worth(stakes.theirs, deal))
        assert stakes.score(theirs) == 0


def test_splits_are_one_in_ten_never_meet_and_are_the_same_on_every_machine():
    rng = np.random.default_rng(0)
    drawn = [draw_stakes(rng, 3, 4, "all") for _ in range(1500)]
    assert 0.07 < np.mean([in_split(stakes, "test") for stakes in drawn]) < 0.13
    assert not any(in_split(stakes, "train") and in_split(stakes, "test") for stakes in drawn)
    assert in_split(STAKES, "test")
    for split in ("train", "test"):
        env = BargainEnv(split=split)
        for seed in range(20):
            env.reset(seed=seed)
            assert in_split(env._stakes, split)


# --- offers in free text ---


def test_offers_are_read_from_free_text():
    env = started(seed=1)
    first, last = (tuple(end for _ in range(3)) for end in (0, 3))
    names = [(name, options[0], options[-1]) for name, options in zip(env._issue_names(), env._names, strict=True)]
    low = ", ".join(f"{name}={option}" for name, option, _ in names)
    high = " ".join(f"{name} = {option.upper()}" for name, _, option in reversed(names))
    bare = " ".join(option for _, option, _ in names)
    for text, deal in [
        (f"offer {low}", first),
        (f"OFFER: {high}", last),
        (f"Listen. I can do <offer>{low}</offer>, is that a deal?", first),
        (f"Not <offer>{low}</offer>!\nBut I can do\n<offer>\n{high}\n</offer>", last),
        (f"Fine then.\n> offer {bare}", first),
        (f"<offer>{bare}</offer>\naccept", first),
        ("accept", "accept"),
        ("I thought about it.\n**Accept.**", "accept"),
        ("Hm, reject.\nReject!", "reject"),
        ("leave", "leave"),
    ]:
        assert env.parse_action(text) == deal, text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no offer in it"),
        ("I would never accept that", "no offer in it"),
        ("offer a b", "3 options, this one 2"),
        ("offer a b c d", "3 options, this one 4"),
        ("offer a b z", "no option 'z' for issue3; options: a, b, c, d"),
        ("<offer>issue1=a issue2=b</offer>", "lacks issue3"),
        ("offer price=a issue2=b issue3=c", "no issue 'price'"),
        ("\ud800" * 9, "no offer in it"),
        ("<offer>" * 100_000, "no offer in it"),
        ("\n#" * 500_000, "no offer in it"),
    ],
)
def test_other_text_costs_a_round_and_says_what_is_missing(text, says):
    env = started(observation="short", rounds=2)
    with pytest.raises(ActionError, match=says):
        env.parse_action(text)
    observation, reward, terminated, _, info = env.step(text)
    assert observation.startswith("Invalid action: ")
    assert observation.endswith("left 1")
    assert (reward, terminated, info["valid_action"]) == (0, False, False)
    assert env.step(text)[1:3] == (0, True), "the partner leaves after the last round"
    with pytest.raises(UserError, match="after the episode ended"):
        env.step("accept")


@pytest.mark.parametrize("observation", ["text", "short"])
@pytest.mark.parametrize(("issues", "options"), [(2, 2), (3, 4), (4, 5)])
def test_every_admissible_action_is_understood_and_every_offer_is_listed_once(observation, issues, options):
    env = BargainEnv(observation=observation, issues=issues, options=options)
    for seed in range(len(topics())):
        _, info = env.reset(seed=seed)
        parsed = [env.parse_action(action) for action in info["admissible_actions"]]
        assert parsed[-3:] == ["accept", "reject", "leave"]
        assert sorted(parsed[:-3]) == env._stakes.deals


def test_topics_have_four_issues_of_five_options_without_spaces():
    for topic in topics():
        assert len(topic["roles"]) == 2
        assert [len(issue["options"]) for issue in topic["issues"]] == [5] * 4
        for issue in topic["issues"]:
            names = [issue["name"], *issue["options"]]
            assert len(set(names)) == 6
            assert all(name == name.lower() and name.replace("-", "").isalnum() for name in names)


# --- play ---


def test_accepting_leaving_and_an_accepted_offer_end_the_episode_with_their_score():
    env = started(observation="short")
    stakes = env._stakes
    _, reward, terminated, _, info = env.step("leave")
    assert (reward, terminated, info["success"]) == (0, True, False)
    env.reset(seed=0)
    assert env.step("accept")[1:3] == (stakes.score(env._deal), True)
    env.reset(seed=0)
    dream = max(stakes.deals, key=lambda deal: worth(stakes.theirs, deal))
    _, reward, terminated, _, info = env.step(env._worded(dream))
    assert terminated
    assert info["reward_parts"]["points"] == worth(stakes.own, dream)


def test_success_is_strictly_above_the_threshold_and_may_be_the_reward():
    for threshold, success in ((6.0, True), (9.99, True)):
        env = started(seed=3, reward="success", partner="steady", threshold=threshold, observation="short")
        best = next(
            deal
            for deal in env._stakes.deals
            if worth(env._stakes.own, deal) == env._stakes.best
            and worth(env._stakes.theirs, deal) >= env._stakes.their_floor
        )
        done = False
        while not done:
            _, reward, done, _, info = env.step(env._worded(best))
        assert (reward, info["success"], info["reward_parts"]["score"]) == (1.0, success, 10.0)
    exact = BargainEnv(threshold=STAKES.score((1, 1)))
    exact.reset(seed=0)
    exact._stakes, exact._deal = STAKES, (1, 1)
    exact._names, exact._theirs = [["a", "b", "c"]] * 2, (0, 0)
    assert exact._info()["success"] is False


@pytest.mark.parametrize("partner", sorted(CONCESSION))
def test_a_partner_never_agrees_below_its_floor_and_its_demand_only_sinks(partner):
    for seed in range(40):
        env = started(seed=seed, partner=partner, observation="short")
        rng, worths, done = random.Random(seed), [], False
        while not done:
            worths.append(worth(env._stakes.theirs, env._theirs))
            _, _, done, _, info = env.step(rng.choice(info_actions(env)))
        assert min(worths) >= env._stakes.their_floor
        assert env._deal is None or worth(env._stakes.theirs, env._deal) >= env._stakes.their_floor
        assert info["reward_parts"]["score"] <= 10


def info_actions(env: BargainEnv) -> list[str]:
    return [action for action in env._actions if action.startswith("offer") or action == "reject"]


def test_reciprocity_moves_for_movement_and_not_for_stubbornness():
    def after(offers: list[int]) -> float:
        env = started(seed=2, partner="reciprocal", observation="short")
        ranked = sorted(env._stakes.deals, key=lambda deal: worth(env._stakes.theirs, deal))
        for rank in offers:
            env.step(env._worded(ranked[rank]))
        return env._moves

    assert after([0, 0, 0]) == 0
    assert after([0, 20, 0, 20]) == 1, "an offer taken back and made again is no movement"


@pytest.mark.parametrize("observation", ["text", "short"])
def test_same_seed_same_transcript_other_seed_another(observation):
    def transcript(seed: int) -> list[object]:
        env, rng = BargainEnv(observation=observation), random.Random(7)
        shown, info = env.reset(seed=seed)
        lines, done = [shown, info], False
        while not done:
            *step, info = env.step(rng.choice(info["admissible_actions"]))
            lines += [*step, info]
            done = step[2]
        return lines

    state = random.getstate(), np.random.get_state()[1].tolist()
    assert transcript(5) == transcript(5) != transcript(6)
    assert state == (random.getstate(), np.random.get_state()[1].tolist()), "no global generator is touched"


def test_equal_state_keys_have_equal_futures():
    """From states with one key, reached on different ways, every offer leads to the same answer."""
    futures: dict[tuple[str, str], set[str]] = {}
    shared = 0
    for way in range(60):
        env = started(seed=4, observation="short", issues=2, options=2, rounds=4, partner="reciprocal")
        rng, done = random.Random(way), False
        while not done:
            key = env._info()["state_key"]
            action = rng.choice(env._actions)
            shown, reward, done, _, info = env.step(action)
            seen = futures.setdefault((key, action), set())
            shared += bool(seen)
            seen.add(f"{info['state_key']} {shown} {reward} {done}")
    assert shared > 50
    assert all(len(seen) == 1 for seen in futures.values())


def test_private_values_of_the_partner_are_not_shown():
    env = started(seed=1)
    before = env._show()
    flipped = tuple(tuple(reversed(line)) for line in env._stakes.theirs)
    env._stakes = Stakes(env._stakes.own, flipped, env._stakes.floor, env._stakes.their_floor)
    assert env._show() == before


def test_it_can_be_pickled_in_the_middle_of_an_episode():
    env = started(seed=1)
    env.step("reject")
    twin = pickle.loads(pickle.dumps(env))
    assert twin.step("reject") == env.step("reject")


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"issues": 5}, "issues=5"),
        ({"options": 1}, "options=1"),
        ({"rounds": 1}, "rounds=1"),
        ({"partner": "nice"}, "partner='nice'"),
        ({"split": "tset"}, "split='tset'"),
        ({"reward": "dense"}, "reward='dense'"),
        ({"observation": "board"}, "observation='board'"),
        ({"threshold": 10}, "threshold=10"),
    ],
)
def test_impossible_settings_are_refused(kwargs, says):
    with pytest.raises(UserError, match=says):
        envs.make("Bargain-v0", **kwargs)


# --- agents ---


def success(policy: Policy, episodes: int, **kwargs: object) -> float:
    env, reached = envs.make("Bargain-v0", **kwargs), 0
    for seed in range(episodes):
        observation, info = env.reset(seed=seed)
        done, turn = False, 0
        while not done:
            request = PolicyRequest("e", turn, observation, [], info, seed=1000 * seed + turn)
            [action] = asyncio.run(policy.act([request]))
            observation, _, done, _, info = env.step(action.text)
            assert info["valid_action"]
            turn += 1
        reached += info["success"]
    return reached / episodes


@pytest.mark.parametrize("partner", [*CONCESSION, "mixed"])
def test_the_expert_nearly_always_succeeds(partner):
    assert success(load_policy("bargain-expert"), 100, partner=partner) >= 0.95


def test_the_naive_and_the_random_agent_rarely_do_and_skill_helps():
    assert success(load_policy("bargain-agreeable"), 100) < 0.1
    assert success(load_policy("random"), 60) < 0.1
    noisy = [success(load_policy("bargain-noisy-expert", skill=skill), 60) for skill in (0, 0.5, 0.8)]
    assert noisy[0] < noisy[1] < noisy[2]
    with pytest.raises(UserError, match="skill=2"):
        load_policy("bargain-noisy-expert", skill=2)


def test_the_scripted_agents_are_registered_with_the_environment():
    assert list(scripted_agents("Bargain-v0")) == ["random", "naive", "expert"]
