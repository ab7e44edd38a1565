"""An environment's own text, to train a tokenizer on."""

from __future__ import annotations

import random

from agentrl.config.schema import EnvConfig
from agentrl.envs import make
from agentrl.types import text_of

_MOST_WORDS = 64


def environment_texts(env: EnvConfig | str, episodes: int = 64, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Plays random episodes and returns what is read and written in them.

    Actions are drawn among ``info["admissible_actions"]``; where the environment lists none, only first observations
    are read (collect demonstrations instead, and train the tokenizer on those).

    Args:
        env: environment, with the keyword arguments of training.
        episodes: number of episodes, with the seeds `seed`, `seed + 1`, ...
        seed: of the first episode and of the actions.

    Returns:
        (texts, words): instructions, observations and actions, and the actions that are single words and deserve a
        token of their own (none where there are too many of them).
    """
    env = EnvConfig(id=env) if isinstance(env, str) else env
    rng = random.Random(seed)
    world = make(env.id, max_turns=env.max_turns, wrappers=env.wrappers, **env.kwargs)
    texts, actions = [], set()
    try:
        for episode in range(episodes):
            observation, info = world.reset(seed=seed + episode)
            texts += [str(getattr(world.unwrapped, "instructions", "")), text_of(observation)]
            done = False
            while not done and (choices := info.get("admissible_actions")):
                actions.update(choices)
                texts.append(rng.choice(choices))
                observation, _, terminated, truncated, info = world.step(texts[-1])
                texts.append(text_of(observation))
                done = terminated or truncated
    finally:
        world.close()
    words = sorted(action for action in actions if action.isalpha())
    return [text for text in texts if text], words if len(words) <= _MOST_WORDS else []
