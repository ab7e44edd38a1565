"""The command line: ``agentrl demo | envs | policies | collect | init-model | sft | train | eval | report | view`` ...

Each command is a thin layer over a function of the same name. Heavy packages load inside the commands that need them,
so that ``agentrl --help`` answers at once.
"""

from agentrl.cli.app import app, main

__all__ = ["app", "main"]
