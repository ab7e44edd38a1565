"""A combination lock as text: one symbol a turn, a reward only at the end, and scripted agents."""

from agentrl.envs import register

register(
    "Lock-v0",
    "environments.lock.env:LockEnv",
    max_turns=18,
    summary="open a combination lock symbol by symbol; a wrong one sets back",
    agents={"random": "random", "naive": ("lock-noisy-solver", {"skill": 0.5}), "expert": "lock-solver"},
)
