"""Sokoban as text and as pictures: seeded generated levels, Boxoban files, an exact solver and scripted agents."""

from agentrl.envs import register

register(
    "Sokoban-v0",
    "environments.sokoban.env:SokobanEnv",
    max_turns=20,
    summary="push every box onto a target; XSB board text, moves up/down/left/right",
    agents={"random": "random", "naive": ("sokoban-noisy-solver", {"skill": 0.25}), "expert": "sokoban-solver"},
)

register(
    "VisualSokoban-v0",
    "environments.sokoban.visual:VisualSokobanEnv",
    max_turns=20,
    summary="Sokoban as a picture and text; same rules, levels and agents as Sokoban-v0",
    agents={"random": "random", "naive": ("sokoban-noisy-solver", {"skill": 0.25}), "expert": "sokoban-solver"},
)
