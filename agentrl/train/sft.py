"""Supervised fine-tuning on recorded episodes: the warm start before RL.

Demonstrations may come from any policy, scripted ones included: their actions are text and are turned into tokens by
the very code that builds contexts while sampling, so that the model learns to answer exactly the rows it will see.
Only action tokens (with the end-of-turn token) carry loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from agentrl.batch import Batch, build_batch, score_microbatch
from agentrl.buffer import read_jsonl
from agentrl.config.schema import parse_history
from agentrl.errors import DataError, NonFiniteError
from agentrl.models.chat import ChatCodec
from agentrl.models.load import load_model, load_tokenizer, save_model
from agentrl.models.vision import reader_of
from agentrl.rollout.context import ContextBuilder
from agentrl.types import Trajectory, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tokenise(trajectory: Trajectory, chat: ChatCodec, history: str) -> Trajectory:
    """Returns the episode with ids for `chat`'s tokenizer: what a model policy would have recorded acting so.

    Action log-probs are unknown and set to 0; turns that already hold ids of another tokenizer are tokenised anew.
    """
    tools = trajectory.start_info.get("tool_schemas", ())
    context = ContextBuilder(chat, trajectory.instructions, parse_history(history), tools)
    turns: list[Turn] = []
    for turn in trajectory.turns:
        prompt = context.observe(turn.observation)
        ids = chat.encode_action(turn.action)
        context.act(ids)
        turns.append(
            turn.model_copy(
                update={
                    "prompt_ids": prompt.prompt_ids,
                    "prompt_images": prompt.prompt_images,
                    "new_row": prompt.new_row,
                    "action_ids": ids,
                    "action_logprobs": [0.0] * len(ids),
                }
            )
        )
    return trajectory.model_copy(update={"turns": turns})


def demonstrations(
    data: str | Path | Iterable[str | Path | Trajectory],
    *,
    only_success: bool = False,
    on_error: Literal["skip", "raise"] = "raise",
    on_skip: Callable[[DataError], None] | None = None,
) -> list[Trajectory]:
    """Returns the episodes of `data` that can be learnt from: those that infrastructure ended are left out.

    Args:
        data: JSONL files, or trajectories.
        only_success: leave out episodes that failed.
        on_error: what a broken line does (see `read_jsonl`).
        on_skip: called with the error of each skipped line; None warns.

    Raises:
        DataError: a broken line (``raise``), or nothing left to learn from.
    """
    items = [data] if isinstance(data, (str, Path)) else list(data)
    found: list[Trajectory] = []
    for item in items:
        found += [item] if isinstance(item, Trajectory) else read_jsonl(item, on_error=on_error, on_skip=on_skip)
    kept = [t for t in found if t.scorable and t.turns and (t.success or not only_success)]
    if not kept:
        what = "successful episodes" if only_success else "finished episodes with turns"
        files = ", ".join(str(item) for item in items if not isinstance(item, Trajectory))
        raise DataError(f"{files or 'the demonstrations'}: no {what} to learn from, out of {len(found)}")
    return kept


def sft(
    model: str,
    data: str | Path | Iterable[str | Path | Trajectory],
    out: str,
    *,
    history: str = "full",
    epochs: int = 1,
    lr: float = 1e-3,
    batch_tokens: int = 8192,
    max_seconds: float | None = None,
    only_success: bool = False,
    seed: int = 0,
    threads: int | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Fine-tunes a model directory on recorded episodes and writes the result to `out`.

    Args:
        model: directory to start from.
        data: JSONL files, or trajectories.
        out: directory to write.
        history: context policy, as in training (``full`` or ``window(k)``).
        epochs: passes over the data.
        lr: peak learning rate; linear warm-up over the first 5 % of steps, cosine decay to a tenth.
        batch_tokens: tokens of one optimiser step.
        max_seconds: stops early, though never before the first step (the schedule then ends early too).
        only_success: leave out episodes that failed.
        seed: order of the data.
        threads: torch threads on a CPU.
        on_step: called after each step with `step`, `steps`, `loss`, `tokens_per_second`.

    Returns:
        `loss` (mean negative log-likelihood per action token over the last tenth of the steps, nats), `steps`,
        `episodes`, `turns`, `tokens`, `seconds`.

    Raises:
        DataError: a broken line, or nothing to learn from.
        ModelError: `model` lacks something.
        NonFiniteError: the loss or its gradient became NaN or infinite; nothing is written.
    """
    started = time.perf_counter()
    if threads is not None:
        torch.set_num_threads(threads)
    episodes = demonstrations(data, only_success=only_success)
    tokenizer = load_tokenizer(model)
    lm = load_model(model, train=True)
    chat = ChatCodec(tokenizer, images=reader_of(lm))
    episodes = [tokenise(t, chat, history) for t in episodes]
    plan = _plan(episodes, epochs, batch_tokens, seed)
    losses, tokens = _fit(lm, episodes, plan, lr, batch_tokens, max_seconds, started, on_step)
    save_model(lm, tokenizer, out)
    last = losses[-max(1, len(losses) // 10) :]
    return {
        "model": str(out),
        "loss": sum(last) / len(last),
        "steps": len(losses),
        "episodes": len(episodes),
        "turns": sum(len(t.turns) for t in episodes),
        "tokens": tokens,
        "seconds": time.perf_counter() - started,
    }


def _fit(
    lm: PreTrainedModel,
    episodes: Sequence[Trajectory],
    plan: Sequence[Sequence[int]],
    lr: float,
    batch_tokens: int,
    max_seconds: float | None,
    started: float,
    on_step: Callable[[dict[str, float]], None] | None,
) -> tuple[list[float], int]:
    """Takes the steps of `plan`. Returns the loss of each and the tokens read; see `sft` for the rest."""
    optimizer = torch.optim.AdamW(lm.parameters(), lr=lr, weight_decay=0.01)
    losses: list[float] = []
    tokens = 0
    for step, members in enumerate(plan):
        done = step / len(plan)
        if max_seconds is not None and step > 0:
            done = max(done, (time.perf_counter() - started) / max_seconds)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / (0.05 * len(plan) + 1)) * (0.55 + 0.45 * math.cos(math.pi * done))
        batch = build_batch([episodes[i] for i in members])
        losses.append(_step(lm, optimizer, batch, batch_tokens, step))
        tokens += batch.tokens
        if on_step is not None:
            rate = tokens / (time.perf_counter() - started)
            on_step({"step": step + 1, "steps": len(plan), "loss": losses[-1], "tokens_per_second": rate})
    return losses, tokens


def _step(lm: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: Batch, batch_tokens: int, step: int) -> float:
    """Takes one optimiser step on the mean negative log-likelihood of the batch's action tokens; returns it."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for micro in batch.microbatches(batch_tokens):
        loss = -score_microbatch(lm, micro).logprob.sum() / batch.index.K
        loss.backward()
        total += float(loss.detach())
    grad_norm = float(torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0))
    if not (math.isfinite(total) and math.isfinite(grad_norm)):
        raise NonFiniteError(f"sft: loss {total}, gradient norm {grad_norm} at step {step}; lower the learning rate")
    optimizer.step()
    return total


def _plan(episodes: Sequence[Trajectory], epochs: int, batch_tokens: int, seed: int) -> list[list[int]]:
    """Shuffled mini-batches of episodes of about `batch_tokens` tokens each."""
    size = [sum(len(turn.prompt_ids) + len(turn.action_ids) for turn in t.turns) for t in episodes]
    random = np.random.default_rng(seed)
    plan: list[list[int]] = []
    for _ in range(epochs):
        room = 0
        for i in random.permutation(len(episodes)).tolist():
            if room < size[i]:
                plan.append([])
                room = batch_tokens
            plan[-1].append(i)
            room -= size[i]
    return plan
