"""Names of environments: Gymnasium's registry, filled from the entry-point group ``agentrl.environments``.

An entry point names a module whose import registers its environments (with `register`, or `gymnasium.register`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple

import gymnasium as gym

from agentrl.envs.wrappers import wrap
from agentrl.errors import UnknownNameError, UserError
from agentrl.remote.address import is_ours, is_remote, name_of

_OURS: dict[str, str] = {}
_AGENTS: dict[str, dict[str, Agent]] = {}
_ENDS_ITSELF: set[str] = set()

ROLES = ("random", "naive", "expert")
"""What scripted agents are good for: a floor, what a little sense reaches, a ceiling."""


class Agent(NamedTuple):
    """A scripted agent by the name of its policy (`agentrl.policy.load_policy`) and the policy's options."""

    policy: str
    options: dict[str, Any]


def register(
    env_id: str,
    entry_point: Any,
    *,
    max_turns: int | None = None,
    summary: str = "",
    agents: Mapping[str, str | tuple[str, dict[str, Any]]] | None = None,
    ends_itself: bool = False,
    **kwargs: Any,
) -> None:
    """Registers an environment under `env_id` in Gymnasium's registry.

    Args:
        env_id: e.g. ``"Sokoban-v0"``.
        entry_point: the class, or ``"module:Class"`` (imported on first use).
        max_turns: turn limit; episodes that reach it are truncated by Gymnasium's `TimeLimit`.
        summary: one line for ``agentrl envs``.
        agents: scripted agents by role (``random``, ``naive``, ``expert``): a policy's name, or its name and options,
            ``{"random": "random", "naive": ("lock-noisy-solver", {"skill": 0.5}), "expert": "lock-solver"}``.
        ends_itself: a turn limit of the run goes to the environment, as its argument `max_turns`, instead of to
            `TimeLimit`: for outcomes that come with the end alone, and which an episode cut off from outside never has.
        **kwargs: default keyword arguments of the environment.

    Raises:
        UserError: `agents` has another role.
    """
    if unknown := sorted({*(agents or {})} - {*ROLES}):
        raise UserError(f"environment {env_id!r}: agents has {unknown[0]!r}; roles are {', '.join(ROLES)}")
    named = {role: agents[role] for role in ROLES if role in agents} if agents else {}
    _AGENTS[env_id] = {
        role: Agent(a, {}) if isinstance(a, str) else Agent(a[0], dict(a[1])) for role, a in named.items()
    }
    _OURS[env_id] = summary
    if ends_itself:
        _ENDS_ITSELF.add(env_id)
    if env_id not in gym.registry:
        gym.register(
            env_id,
            entry_point,
            max_episode_steps=max_turns,
            kwargs=kwargs,
            disable_env_checker=True,
            order_enforce=False,
        )


@cache
def load_plugins() -> dict[str, str]:
    """Imports every installed environment plugin once. Returns the broken ones: name -> why."""
    broken = {}
    for point in entry_points(group="agentrl.environments"):
        try:
            point.load()
        except Exception as error:
            broken[point.name] = f"{type(error).__name__}: {error}"
            warnings.warn(f"environment plugin {point.name!r} could not be loaded: {broken[point.name]}", stacklevel=2)
    return broken


def environment_ids() -> dict[str, str]:
    """Text environments known by name: id -> one-line summary."""
    load_plugins()
    return dict(sorted(_OURS.items()))


def scripted_agents(env_id: str) -> dict[str, Agent]:
    """The scripted agents that an environment was registered with: role -> agent, in the order of `ROLES`.

    A served environment has those of the local one that has its name.
    """
    load_plugins()
    return dict(_AGENTS.get(name_of(env_id), {}))


def make(
    env_id: str, *, max_turns: int | None = None, wrappers: Sequence[Mapping[str, Any]] = (), **kwargs: Any
) -> gym.Env[Any, Any]:
    """Makes an environment: one of ours, or any Gymnasium id with text observations and actions.

    Args:
        env_id: registered id, or ``"module:Id-v0"`` to import `module` first.
        max_turns: overrides the registered turn limit; see `register` for environments that end themselves.
        wrappers: ``{"name": ..., **options}`` each (`agentrl.envs.wrappers`), the first innermost.
        **kwargs: keyword arguments of the environment.

    Raises:
        UnknownNameError: no such id; the message offers the nearest.
        UserError: the environment or a wrapper refused its arguments.
        EnvironmentFailure: a served environment's server does not answer.
    """
    if is_remote(env_id):
        if is_ours(env_id):
            from agentrl.remote.env import make_remote

            return make_remote(env_id, max_turns=max_turns, wrappers=wrappers, **kwargs)
        from agentrl.remote.openenv import make_openenv

        return make_openenv(env_id, max_turns=max_turns, wrappers=wrappers, **kwargs)
    load_plugins()
    module, _, name = env_id.rpartition(":")
    if not module and name not in gym.registry:
        raise UnknownNameError("environment", env_id, [*_OURS], "agentrl envs lists all")
    if name in _ENDS_ITSELF and max_turns is not None:
        kwargs, max_turns = {**kwargs, "max_turns": max_turns}, None
    try:
        env = gym.make(env_id, max_episode_steps=max_turns, **kwargs)
    except TypeError as error:
        raise UserError(f"environment {env_id!r} cannot be made with {kwargs}: {error}") from error
    except gym.error.Error as error:
        raise UserError(f"environment {env_id!r} cannot be made: {error}") from error
    except ModuleNotFoundError as error:
        raise UserError(f"environment {env_id!r}: {error}; is the package that has it installed?") from error
    return wrap(env, wrappers)
