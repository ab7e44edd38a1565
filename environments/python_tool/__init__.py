"""Arithmetic and word problems with a Python interpreter as a tool, and scripted agents."""

from agentrl.envs import register

register(
    "PythonTool-v0",
    "environments.python_tool.env:PythonToolEnv",
    max_turns=6,
    summary="solve arithmetic and word problems with a Python interpreter as a tool",
    agents={"random": "python-tool-random", "naive": "python-tool-naive", "expert": "python-tool-expert"},
)
