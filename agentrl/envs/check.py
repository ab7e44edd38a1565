"""`check_env`: what the rollout, the credit methods and other people's agents rely on, proved for one environment.

The checks are functions that return what they saw, or raise `Broken`; `CHECKS` names them in order, with the way to
mend. The steps themselves are in `agentrl.envs.probe`.
"""

from __future__ import annotations

import itertools
import pickle
import random
import statistics
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import env_checker
from pydantic import BaseModel

from agentrl.envs.probe import LONG, TURNS, Broken, Probe, Step, canonical, hostile_texts, random_texts, short
from agentrl.envs.registry import load_plugins, scripted_agents
from agentrl.errors import UserError
from agentrl.policy import Policy, load_policy

FAST_S = 1e-3
"""Median seconds of a step, and of a reset, that ``fast = True`` promises to stay below."""
FURTHER = 10
"""Further tasks for an expert that has solved none."""


class Check(BaseModel):
    """What one check found."""

    name: str
    passed: bool
    detail: str
    """What was seen; of a failure, where it broke."""
    mend: str = ""
    """The way to mend a failure."""
    warning: bool = False
    """Passed, and yet worth a look."""

    def __str__(self) -> str:
        line = f"{'FAIL' if not self.passed else 'WARN' if self.warning else 'PASS'}  {self.name}: {self.detail}"
        return line if self.passed else f"{line}\n      to mend: {self.mend}"


class CheckReport(BaseModel):
    """All checks of one environment, in order. ``assert report.passed, str(report)`` is a test."""

    env: str
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


def check_env(
    env: str | Callable[[], gym.Env[Any, Any]],
    *,
    kwargs: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    actions: int = 1000,
    on_check: Callable[[Check], None] | None = None,
) -> CheckReport:
    """Checks that an environment keeps the contract of text environments (docs/environments.md).

    Args:
        env: registered id, ``"module:Id-v0"``, or a function that makes a new instance each time.
        kwargs: keyword arguments of the environment.
        seeds: of the episodes that are compared, at least two.
        actions: random and hostile actions that it must survive.
        on_check: called with each check as it is done, for progress.

    Raises:
        UserError: no such environment, it refuses its arguments, or fewer than two seeds.
    """
    if len({*seeds}) < 2:
        raise UserError(f"seeds={list(seeds)}: at least two different ones are compared")
    probe = Probe(env, dict(kwargs or {}), list(seeds), actions)
    checks = []
    for name, (function, mend) in CHECKS.items():
        try:
            told = function(probe)
            check = Check(name=name, passed=True, detail=told, warning=isinstance(told, Doubt))
        except Exception as error:
            check = Check(name=name, passed=False, detail=_told(error), mend=mend)
        checks.append(check)
        if on_check is not None:
            on_check(check)
    probe.close()
    return CheckReport(env=probe.name, checks=checks)


def _gymnasium(probe: Probe) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env_checker.check_env(probe.inner, skip_render_check=True, skip_close_check=True)
    said = [str(w.message).removeprefix("\x1b[33mWARN: ").removesuffix("\x1b[0m") for w in caught]
    return "; ".join(dict.fromkeys(said)) or "gymnasium.utils.env_checker.check_env has nothing to say"


def _global_random(probe: Probe) -> str:
    torch: Any = sys.modules.get("torch")  # watched where something has loaded it
    saved = random.getstate(), np.random.get_state(), torch and torch.get_rng_state()
    try:
        random.random()  # seeding with a constant, as the environment may have done before, shows only from elsewhere
        np.random.random()
        if torch:
            torch.rand(())
        before = _random_states(torch)
        for seed in probe.seeds[:2]:
            probe.play(probe.second, seed)
        after = _random_states(torch)
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        if torch:
            torch.set_rng_state(saved[2])
    if touched := [name for name in before if before[name] != after[name]]:
        raise Broken(f"the global state of {' and '.join(touched)} changed while it was made or played")
    return f"{', '.join(before)}: as before"


def _random_states(torch: Any) -> dict[str, str]:
    """Global generators by name."""
    states = {"random": repr(random.getstate()), "numpy.random": repr(np.random.get_state())}
    return states | ({"torch": repr(torch.get_rng_state().tolist())} if torch else {})


def _same_seed(probe: Probe) -> str:
    first = {seed: probe.play(probe.first, seed) for seed in probe.seeds}
    # Backwards, and on an instance with another past: what is left over from other episodes shows.
    for what, env in ("on the same instance", probe.first), ("on another instance", probe.second):
        for seed in reversed(probe.seeds):
            if difference := _difference(first[seed], probe.play(env, seed)):
                raise Broken(f"seed {seed} again, {what}: {difference}")
    return f"{len(probe.seeds)} seeds, each played three times"


def _other_seed(probe: Probe) -> str:
    if getattr(probe.inner, "single_task", False):
        return "not asked: the environment declares a single task (single_task = True)"
    episodes = {canonical([step.observation for step in probe.play(probe.first, seed)]) for seed in probe.seeds}
    if len(episodes) == 1:
        raise Broken(f"seeds {', '.join(map(str, probe.seeds))} all give the same episode")
    return f"{len(episodes)} different episodes of {len(probe.seeds)} seeds"


def _group_start(probe: Probe) -> str:
    for seed in probe.seeds:
        first: dict[str, str] = {}
        for member, env in enumerate((probe.first, probe.second, probe.first), 1):
            observation, info = probe.reset(env, seed)
            prompt = env.get_wrapper_attr("instructions") if env.has_wrapper_attr("instructions") else ""
            start = {"observation": observation, "info": info, "instructions": prompt}
            for name, value in start.items():
                if first.setdefault(name, canonical(value)) != canonical(value):
                    raise Broken(f"seed {seed}: the {name} of member {member} is not the first one's")
            probe.step(env, next(random_texts(env, seed=member)))  # members act differently
    return f"observation, info and instructions agree for {len(probe.seeds)} seeds"


class Doubt(str):
    """What a check tells that passed with a warning."""


def _agents(probe: Probe) -> str:
    """Every scripted agent can be made, and plays; the expert solves something."""
    told, doubt = [], False
    turns = getattr(probe.first.spec, "max_episode_steps", None) or TURNS
    for role, agent in _scripted(probe):
        solved = tried = 0
        for seed in _tried(probe.seeds, further=role == "expert"):
            if tried >= len(probe.seeds) and solved:
                break
            solved += probe.play(probe.first, seed, agent, turns)[-1].info.get("success") is True
            tried += 1
        told.append(f"{role} solved {solved} of {tried}")
        doubt |= role == "expert" and not solved
    if not doubt:
        return ", ".join(told) or "none registered"
    if not getattr(probe.inner, "hard", False):
        raise Broken(f"{', '.join(told)} tasks")
    return Doubt(f"{', '.join(told)}; the environment declares that its tasks are hard (hard = True)")


def _tried(seeds: Sequence[int], further: bool) -> Sequence[int]:
    """The seeds of a scripted agent; of one that solves none of them some `further` ones: chance is no defect."""
    return [*seeds, *range(max(seeds) + 1, max(seeds) + 1 + FURTHER)] if further else seeds


def _scripted(probe: Probe) -> list[tuple[str, Policy]]:
    """The registered agents by role, the best first."""
    named = scripted_agents(probe.env) if isinstance(probe.env, str) else {}
    return [(role, load_policy(agent.policy, **agent.options)) for role, agent in reversed(named.items())]


def _after_the_end(probe: Probe) -> str:
    env = probe.inner
    for (_, agent), seed in itertools.product([*_scripted(probe), ("", None)], probe.seeds):
        last = probe.play(env, seed, agent)[-1]
        if not last.terminated:
            continue
        try:
            env.step(last.action)
        except Exception as error:
            return f"refused with {type(error).__name__}"
        raise Broken(f"the episode of seed {seed} had terminated, and a further step was played")
    return f"not seen: no episode of {len(probe.seeds)} seeds terminated within {TURNS} turns"


def _any_text(probe: Probe) -> str:
    env = probe.first
    slowest, slow = 0.0, ""
    probe.reset(env, probe.seeds[0])
    for number, action in enumerate(itertools.islice(hostile_texts(env, probe), probe.actions)):
        started = perf_counter()
        try:
            step = probe.step(env, action)
        except Exception as error:
            raise Broken(f"action {number}, {short(action)}: {_told(error)}") from error
        if (took := perf_counter() - started) > slowest:
            slowest, slow = took, action
        if len(action) >= LONG / 2 and isinstance(step.observation, str) and len(step.observation) > LONG / 4:
            raise Broken(f"{short(action)} came back in an observation of {len(step.observation):,} characters")
        if step.terminated or step.truncated:
            probe.reset(env, probe.seeds[number % len(probe.seeds)])
    return f"{probe.actions:,} actions; the slowest took {1000 * slowest:.3g} ms: {short(slow)}"


def _ends(probe: Probe) -> str:
    """The environment's own ends, and what was complained of in all plays before."""
    if complaint := probe.complaints.get("ends"):
        raise Broken(complaint)
    for (_, agent), seed in itertools.product([*_scripted(probe), ("", None)], probe.seeds):
        last = probe.play(probe.inner, seed, agent)[-1]
        if last.terminated and last.truncated:
            raise Broken(f"terminated and truncated at once, without a turn limit, after {short(last.action)}")
    spec = probe.first.spec
    limit = spec.max_episode_steps if spec is not None else None
    told = f"turn limit {limit}" if limit else "no turn limit: give register one (max_turns), or episodes may not end"
    return f"{probe.terminated} episodes terminated, {probe.truncated} were truncated; {told}"


def _complaint(name: str, good: str) -> Callable[[Probe], str]:
    """Returns the check that nothing was complained of in any step so far."""

    def check(probe: Probe) -> str:
        if name in probe.complaints:
            raise Broken(probe.complaints[name])
        return good.format(steps=f"{probe.steps:,}")

    return check


def _declarations(probe: Probe) -> str:
    unknown = sorted({*probe.provides} - {"state_keys", "turn_rewards"})
    if unknown:
        raise Broken(f"provides has {unknown[0]!r}; known are state_keys and turn_rewards")
    if complaint := probe.complaints.get("declarations"):
        raise Broken(complaint)
    return f"provides {', '.join(sorted(probe.provides)) or 'nothing'}"


def _picklable(probe: Probe) -> str:
    """What `rollout.executor: process` sends to a worker: the registered spec and the arguments."""
    if isinstance(probe.env, str):
        load_plugins()
        spec = gym.registry.get(probe.env.rpartition(":")[2])
        pickle.loads(pickle.dumps((spec, probe.kwargs)))
        return "the registered spec and the arguments"
    pickle.loads(pickle.dumps(probe.env))
    return "the function that makes it"


def _speed(probe: Probe) -> str:
    step, reset = (statistics.median(probe.seconds[name]) for name in ("step", "reset"))
    told = f"a step takes {1000 * step:.3g} ms, a reset {1000 * reset:.3g} ms (medians)"
    if probe.fast and max(step, reset) >= FAST_S:
        raise Broken(f"{told}, and fast = True promises under {1000 * FAST_S:g} ms for each")
    return told + ("" if probe.fast else "; fast is not declared")


CHECKS: dict[str, tuple[Callable[[Probe], str], str]] = {
    "gymnasium's checker": (_gymnasium, "see https://gymnasium.farama.org/introduction/create_custom_env"),
    "global random state": (
        _global_random,
        "draw from self.np_random, not from random, numpy.random or torch; where a library insists, save its state and "
        "put it back",
    ),
    "same seed, same episode": (
        _same_seed,
        "draw from self.np_random alone (call super().reset(seed=seed) first), keep nothing from the last episode, and "
        "sort what comes from a set or the file system; no clock, no address in observation or info",
    ),
    "other seed, other episode": (
        _other_seed,
        "let self.np_random choose the task in reset; where there is one task only, declare single_task = True",
    ),
    "group members start alike": (
        _group_start,
        "make the start a function of the seed and the arguments: reset everything that the last episode changed",
    ),
    "scripted agents": (
        _agents,
        "name in register(agents=...) policies that agentrl policies lists, with options that they take, and that play "
        "every task; an expert is one that solves tasks within the turn limit (where the best there is may solve "
        "none, declare hard = True)",
    ),
    "step after the end": (
        _after_the_end,
        "raise in step once the episode has terminated, until reset (TextEnv does so)",
    ),
    "any text": (
        _any_text,
        "answer text that is no action with an observation that says what is wrong, and do not repeat it at length: "
        "TextEnv does it when parse_action raises ActionError",
    ),
    "ends": (
        _ends,
        "terminated (bool) is the task's own end, truncated the turn limit's: leave it to max_turns (Gymnasium's "
        "TimeLimit); put a bool info['success'] into the last step",
    ),
    "rewards": (
        _complaint("rewards", "finite numbers in {steps} steps"),
        "return a finite float, within reward_range where one is declared",
    ),
    "observations and info": (
        _complaint("observations and info", "text and JSON in {steps} steps"),
        "an observation is a str or a list of TextPart and ImagePart (a gymnasium.ObservationWrapper can put it into "
        "words); info holds str, int, float, bool, None, lists and dicts of these, and its named keys have the types "
        "of docs/environments.md",
    ),
    "declarations": (
        _declarations,
        "put a str info['state_key'] into reset and every step, invalid actions included (override on_invalid), or "
        "take state_keys out of provides",
    ),
    "picklable": (
        _picklable,
        "register it from a module that can be imported, by 'module:Class' (no lambda, no local class), with plain "
        "arguments",
    ),
    "speed": (_speed, "leave out fast = True: the environment then runs in threads; or make them faster"),
}
"""Name -> (check, how to mend what it finds). The later ones judge what the earlier ones saw."""


def _difference(one: list[Step], other: list[Step]) -> str:
    """Returns where two transcripts part, "" where they do not."""
    for turn, (first, second) in enumerate(zip(one, other, strict=False)):
        for name, a, b in zip(Step._fields, first, second, strict=True):
            if name == "info":
                a, b = ({key: value for key, value in info.items() if key != "usage"} for info in (a, b))
            if canonical(a) != canonical(b):
                return f"{name} of turn {turn} was {short(a)} and is {short(b)}"
    return "" if len(one) == len(other) else f"it had {len(one) - 1} turns and has {len(other) - 1}"


def _told(error: Exception) -> str:
    """Returns the message of a broken rule, or what was raised and where."""
    if isinstance(error, Broken):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {_cut(str(error))} ({where.filename}:{where.lineno})"


def _cut(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:297]}..."
