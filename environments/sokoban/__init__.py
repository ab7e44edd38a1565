"""Sokoban as text: seeded generated levels, Boxoban files, an exact solver and scripted agents."""

from agentrl.envs import register

register(
    "Sokoban-v0",
    "environments.sokoban.env:SokobanEnv",
    max_turns=20,
    summary="push every box onto a target; XSB board text, moves up/down/left/right",
)
