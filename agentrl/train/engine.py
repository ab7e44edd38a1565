"""The engine that samples: made for the model that is trained, given its new weights, and never trusted to have them.

Two checks follow each sync. A fingerprint shows that the weights arrived. The canary, log-probs of a fixed prompt as
the engine computes them, shows that it computes with them: an engine may hold copies (packed, fused, quantised) of what
it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from agentrl.config.schema import ModelConfig
from agentrl.errors import AgentRLError, UserError
from agentrl.models.attention import PackedSequences, lm_logits, run_ragged
from agentrl.models.load import fingerprint
from agentrl.models.lora import has_adapter, plain_weights
from agentrl.policy import ModelPolicy, load_policy

CANARY_LIMIT = {"float32": 1e-3, "bfloat16": 0.5}
"""Nats, by precision. The log-probs of the same weights differ by about 1e-6 in float32; a stale LM head is 2-4 off."""
_CANARY_TOKENS = 64


def make_engine(config: ModelConfig, model: Any, tokenizer: Any) -> ModelPolicy:
    """Returns the engine ``model.engine`` for `model`, with ``model.engine_options``.

    Raises:
        UserError: a policy without weights, or an option that it does not take.
    """
    try:
        policy = load_policy(config.engine, model=model, tokenizer=tokenizer, **config.engine_options)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        if not config.engine_options:
            raise UserError(f"model.engine={config.engine!r} takes no model, so that it cannot be trained") from error
        raise UserError(
            f"model.engine_options={config.engine_options} with model.engine={config.engine!r}: {error} "
            f"(agentrl policies {config.engine} shows its options)"
        ) from error
    if not isinstance(policy, ModelPolicy):
        raise UserError(f"model.engine={config.engine!r} has no weights and cannot be trained")
    return policy


def sync_engine(policy: ModelPolicy, model: Any, version: int, dtype: str = "float32") -> float | None:
    """Gives the engine the weights of `model` as `version` and checks that it has them.

    An engine that takes adapters gets the adapter, where the model is one, and any other the merged weights.

    Returns:
        the largest difference of the canary in nats; None for an engine that runs the trainer's own model.

    Raises:
        AgentRLError: other weights arrived, or the engine computes other log-probs.
    """
    engine: Any = policy
    rank: int = getattr(engine, "lora_rank", 0)
    if rank and has_adapter(model):
        engine.load_lora(model, version)
    else:
        weights = engine_weights(policy, model)
        policy.load_weights(weights, version)
        if getattr(engine, "model", None) is model:
            return None  # the same tensors: nothing could differ
        if (theirs := policy.fingerprint()) != (ours := fingerprint(weights)):
            raise AgentRLError(f"weight sync failed: the engine's weights are {theirs}, the trainer's {ours}")
    return check_canary(policy, model, dtype)


def engine_weights(policy: ModelPolicy, model: Any) -> Mapping[str, torch.Tensor]:
    """The weights as the engine names them: one with a copy of its own knows no adapters."""
    shared = getattr(policy, "model", None) is model
    weights: Mapping[str, torch.Tensor] = model.state_dict() if shared else plain_weights(model)
    return weights


def check_canary(policy: ModelPolicy, model: Any, dtype: str = "float32") -> float | None:
    """Compares the engine's log-probs of a fixed prompt with the trainer's.

    Returns:
        the largest difference in nats; None for an engine that runs the trainer's own model.

    Raises:
        AgentRLError: they differ by more than `CANARY_LIMIT`; with both numbers.
    """
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    ids = np.random.default_rng(0).integers(0, vocabulary, _CANARY_TOKENS).tolist()
    if (answer := policy.canary(ids)) is None:
        return None
    ours, theirs = _logprobs(model, ids), torch.tensor(answer)
    difference = (ours - theirs).abs().nan_to_num(torch.inf)
    worst = int(difference.argmax())
    if (off := float(difference[worst])) > CANARY_LIMIT[dtype]:
        raise AgentRLError(
            f"the engine ({policy.name}, version {policy.version} of the weights) does not compute what the trainer "
            f"does: log-prob of token {worst + 1} of a fixed prompt {float(theirs[worst]):.4f} in the engine, "
            f"{float(ours[worst]):.4f} in the trainer (limit {CANARY_LIMIT[dtype]} nats); its samples would be another "
            "policy's"
        )
    return off


@torch.no_grad()
def _logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """(len(ids) - 1,) log-probs of ``ids[1:]``."""
    tokens = torch.tensor(ids, device=model.get_input_embeddings().weight.device)
    hidden = run_ragged(model, tokens, torch.arange(len(ids), device=tokens.device), PackedSequences((len(ids),)))
    logits = lm_logits(model, hidden[:-1])
    return torch.log_softmax(logits.float(), -1).gather(-1, tokens[1:, None])[:, 0].cpu()
