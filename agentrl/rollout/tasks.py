"""What is to be played: tasks, the episodes they come to, and the promise that a group shares its start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agentrl.errors import UserError
from agentrl.rollout.seeds import mix
from agentrl.types import Content, Trajectory


@dataclass(slots=True)
class Task:
    """One task instance, played by `members` episodes: a group."""

    seed: int
    """Seed given to `reset`."""
    group_id: str
    members: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    """Options given to `reset`."""
    skip: frozenset[int] = frozenset()
    """Members that are not played: an earlier collection has them. All others keep their numbers and seeds."""


class Job(NamedTuple):
    """One episode that is to be played."""

    task: Task
    order: tuple[int, int]
    """(place of the task, member): canonical order of episodes."""
    seeds: tuple[int, int]
    """What `action_seed` is made of: (hash of the collection's seed and iteration, number among its seed's members)."""

    @property
    def action_seed(self) -> int:
        """`episode_seed` of this episode; made when it is asked for: many a plain function plays without."""
        base, number = self.seeds
        return mix(mix(base, self.task.seed), number)


def jobs_of(tasks: Sequence[Task], seed: int, iteration: int) -> list[Job]:
    """Returns the episodes of `tasks` in canonical order.

    A seed that occurs in several tasks (with other options, or the same task drawn twice) goes on counting members, so
    that no two episodes share their random numbers.

    Raises:
        UserError: a group id that occurs twice, or a group without members.
    """
    if len({task.group_id for task in tasks}) < len(tasks):
        repeated = [group for group, count in Counter(task.group_id for task in tasks).items() if count > 1]
        raise UserError(f"several tasks have the group_id {repeated[0]!r}; give each task its own")
    played: dict[int, int] = {}
    jobs, base = [], mix(mix(0, seed), iteration)
    for place, task in enumerate(tasks):
        if task.members < 1:
            raise UserError(f"task {task.group_id!r} has members={task.members}; a group has at least one")
        before = played.get(task.seed, 0)
        played[task.seed] = before + task.members
        for member in range(task.members):
            if member not in task.skip:
                jobs.append(Job(task, (place, member), (base, before + member)))
    return jobs


class Starts:
    """Compares the first observations of group members: an environment that ignores its seed is found at once."""

    def __init__(self) -> None:
        self._first: dict[int, tuple[int, str, Content]] = {}

    def check(self, trajectory: Trajectory, job: Job, instructions: str, observation: Content) -> None:
        """Compares a start with that of the first member of its group.

        Raises:
            UserError: they differ; names the environment, the seed and the first difference.
        """
        place, member = job.order
        first, *wanted = self._first.setdefault(place, (member, instructions, observation))
        if wanted == [instructions, observation]:
            return
        what, theirs, ours = "instructions", str(wanted[0]), instructions
        if theirs == ours:
            what, theirs, ours = "first observation", str(wanted[1]), str(observation)
        length = min(len(ours), len(theirs))
        at = next((i for i in range(length) if ours[i] != theirs[i]), length)
        raise UserError(
            f"environment {trajectory.env!r}: reset(seed={trajectory.seed}) twice gave two different starts in group "
            f"{trajectory.group_id!r}: the {what} of members {first} and {member} differ at character {at}: "
            f"{theirs[at : at + 40]!r} and {ours[at : at + 40]!r}; draw all randomness from self.np_random, after "
            "super().reset(seed=seed)"
        )
