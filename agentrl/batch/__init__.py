"""The trainer's batch: three index vectors, the rows a model reads, and log-probs at action positions only."""

from agentrl.batch.index import Index
from agentrl.batch.rows import Batch, MicroBatch, build_batch
from agentrl.batch.scoring import Centre, TokenScores, hidden_states, score, score_microbatch

__all__ = [
    "Batch",
    "Centre",
    "Index",
    "MicroBatch",
    "TokenScores",
    "build_batch",
    "hidden_states",
    "score",
    "score_microbatch",
]
