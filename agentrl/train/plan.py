"""The batch plan: every number of an iteration, derived from the configuration and printed before it runs."""

from __future__ import annotations

from agentrl.config.schema import RunConfig
from agentrl.credit import load_credit
from agentrl.train.mismatch import corrects


def batch_plan(config: RunConfig) -> str:
    """Returns the plan as a few lines of text: episodes, optimiser steps, forward passes, evaluations."""
    rollout, update, prm = config.rollout, config.policy_update, config.prm
    episodes = rollout.groups * rollout.group_size
    method, options = load_credit(config.credit.method, config.credit.options)
    pool = f"a pool of {rollout.tasks}" if rollout.tasks else "fresh seeds"
    steps = update.epochs * min(update.minibatches, episodes)
    lines = [
        f"rollout   {rollout.groups} groups x {rollout.group_size} = {episodes} episodes an iteration ({pool}), "
        f"at most {min(rollout.concurrency, episodes)} at once; history {rollout.history}",
        f"policy    {update.epochs} epoch x {update.minibatches} mini-batches = {steps} AdamW steps, "
        f"about {-(-episodes // max(1, update.minibatches))} episodes each, lr {update.lr:g} ({update.schedule})",
        f"memory    forward passes of at most {update.tokens_per_microbatch:,} tokens; no effect on the result",
    ]
    if config.lora.rank:
        targets = config.lora.targets if isinstance(config.lora.targets, str) else ", ".join(config.lora.targets)
        lines.append(f"lora      adapters of rank {config.lora.rank} over one frozen base, on {targets}")
    if corrects(update):
        lines.append(
            f"mismatch  tis {update.tis} (cap {update.tis_cap:g}), reject {update.reject} "
            f"[{update.reject_low:g}, {update.reject_high:g}], beyond {update.mismatch_tolerance:g} nats of difference"
        )
    needs = method.needs_of(options)
    if "prm" in needs:
        groups = "all groups" if prm.groups_per_update is None else f"{prm.groups_per_update} groups"
        lines.append(
            f"prm       {prm.updates} AdamW steps ({prm.loss}) on {groups} of the last {prm.replay_iterations} "
            f"iterations, lr {prm.lr:g}, reference {prm.reference}, {prm.order.replace('_', ' ')}"
        )
    if "values" in needs:
        critic = config.critic
        lines.append(f"critic    {critic.epochs} epoch x {critic.minibatches} mini-batches, lr {critic.lr:g}")
    lines.append(f"credit    {config.credit.method} {config.credit.options or ''}".rstrip())
    every = f"every {config.eval.every} iterations" if config.eval.every else "never"
    lines.append(
        f"total     {config.iterations} iterations = {config.iterations * episodes:,} episodes; "
        f"evaluation on {config.eval.episodes} held-out tasks {every}"
    )
    return "\n".join(lines)
