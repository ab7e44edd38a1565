"""What an iteration plays: tasks dealt out, groups without contrast replaced (dynamic sampling), limits respected."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from agentrl.config import RunConfig
from agentrl.rollout import Collected, Collector, Task
from agentrl.types import Trajectory, group_trajectories


class Dealer:
    """Deals the task instances of a run: fresh seeds, or those of a pool in seeded epochs.

    Args:
        config: the run.
        drawn: tasks dealt so far.
    """

    def __init__(self, config: RunConfig, drawn: int = 0) -> None:
        self.config, self.drawn = config, drawn

    def deal(self, groups: int, iteration: int, first: int = 0) -> list[Task]:
        """Returns the next `groups` tasks; their group ids count from `first` inside the iteration."""
        rollout, base = self.config.rollout, self.config.training_seeds()[0]
        places = range(self.drawn, self.drawn + groups)
        self.drawn += groups
        if rollout.tasks:
            epochs = {place // rollout.tasks for place in places}
            deal = {e: np.random.default_rng((self.config.seed, e)).permutation(rollout.tasks) for e in epochs}
            numbers = [int(deal[place // rollout.tasks][place % rollout.tasks]) for place in places]
        else:
            numbers = list(places)
        return [
            Task(seed=base + number, group_id=f"{iteration:06d}-{first + g:04d}", members=rollout.group_size)
            for g, number in enumerate(numbers)
        ]


@dataclass
class Gathered:
    """The episodes of an iteration."""

    played: Collected
    """Everything that was played, over all collections."""
    trajectories: list[Trajectory]
    """What is trained on."""
    dropped: dict[str, float] = field(default_factory=dict)
    """Metrics: what was left out and why."""


def gather(collector: Collector, dealer: Dealer, config: RunConfig, iteration: int) -> Gathered:
    """Plays the episodes of an iteration.

    With `rollout.dynamic_sampling` groups whose raw outcomes are all equal are left out and further tasks are played in
    their place, at most `rollout.max_refills` times; with `outcome.truncated=excluded` so are episodes that a limit cut
    off (before the groups are looked at).

    Raises:
        UserError: the tasks or the environment are not usable.
        InfrastructureError: every single episode of a collection failed.
    """
    wanted, dynamic = config.rollout.groups, config.rollout.dynamic_sampling
    played: Collected | None = None
    kept: list[Trajectory] = []
    counts: Counter[str] = Counter()
    groups = dealt = 0
    while True:
        tasks = dealer.deal(wanted - groups, iteration, dealt)
        dealt += len(tasks)
        # A pool may deal a task twice in an iteration: each collection draws its actions from a stream of its own.
        refill = counts["refills"]
        seed = int(np.random.SeedSequence((config.seed, refill)).generate_state(1)[0]) if refill else config.seed
        new = collector.collect(tasks, seed=seed, iteration=iteration)
        played = new if played is None else _joined(played, new)
        found = new.trajectories
        if config.outcome.truncated == "excluded":
            found = [t for t in found if not t.truncated]
            counts["truncated_excluded"] += len(new.trajectories) - len(found)
        for group in group_trajectories(found):
            if dynamic and len({t.outcome for t in group.trajectories}) == 1:
                counts["groups_dropped"] += 1
                continue
            groups += 1
            kept += group.trajectories
        if not dynamic or groups >= wanted or counts["refills"] >= config.rollout.max_refills:
            break
        counts["refills"] += 1
    metrics = {name: float(counts[name]) for name in ("groups_dropped", "refills")} if dynamic else {}
    if config.outcome.truncated == "excluded":
        metrics["truncated_excluded"] = float(counts["truncated_excluded"])
    return Gathered(played, kept, metrics)


def _joined(first: Collected, second: Collected) -> Collected:
    """Two collections as one."""
    return Collected(
        trajectories=[*first.trajectories, *second.trajectories],
        failed=[*first.failed, *second.failed],
        retried=first.retried + second.retried,
        seconds={name: first.seconds[name] + second.seconds[name] for name in first.seconds},
        counts=dict(Counter(first.counts) + Counter(second.counts)),
    )
