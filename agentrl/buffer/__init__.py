"""Trajectories kept, stored as JSONL, and paired for the PRM."""

from agentrl.buffer.buffer import TrajectoryBuffer
from agentrl.buffer.jsonl import read_jsonl, write_jsonl
from agentrl.buffer.pairs import pair_counts, preference_pairs

__all__ = ["TrajectoryBuffer", "pair_counts", "preference_pairs", "read_jsonl", "write_jsonl"]
