"""Text environments of other packages behind `TextEnv`, one file each. The packages are imported when one is made."""

from agentrl.envs import register

register(
    "TextWorldExpress-v0",
    "environments.adapters.textworld_express:TextWorldExpressEnv",
    max_turns=100,
    summary="eight text games of rooms and objects (needs the extra textworld-express, and Java)",
    agents={"random": "random", "expert": "adapter-expert"},
)
register(
    "TextArena-v0",
    "environments.adapters.textarena:TextArenaEnv",
    max_turns=100,
    summary="board, card, word and puzzle games, alone or against a scripted opponent (needs the extra textarena)",
    agents={"random": "random"},
)
register(
    "ReasoningGym-v0",
    "environments.adapters.reasoning_gym:ReasoningGymEnv",
    max_turns=10,
    summary="a hundred generators of questions with verified answers (needs the extra reasoning-gym)",
    agents={"expert": "adapter-expert"},
)
register(
    "BabyAI-v0",
    "environments.adapters.babyai:BabyAIEnv",
    max_turns=64,
    summary="grid missions of BabyAI and MiniGrid, the view put into words (needs the extra minigrid)",
    agents={"random": "random", "expert": "adapter-expert"},
)
register(
    "ScienceWorld-v0",
    "environments.adapters.scienceworld:ScienceWorldEnv",
    max_turns=100,
    summary="thirty science tasks in a simulated house (needs the extra scienceworld, and Java)",
    agents={"expert": "adapter-expert"},
)
