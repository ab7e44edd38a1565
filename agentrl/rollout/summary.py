"""What an evaluation counts of an episode: a few numbers, with or without the trajectory they come from."""

from __future__ import annotations

from dataclasses import dataclass

from agentrl.types import StopReason, Trajectory


@dataclass(slots=True)
class Summary:
    """One episode that came to its end."""

    task: int
    """Place of its task in the collection."""
    member: int
    seed: int
    """Of the task."""
    outcome: float
    success: bool
    stop_reason: StopReason
    turns: int
    invalid: int
    """Turns whose text was no action."""
    action_tokens: int
    seconds: float
    """Time of its policy calls (each shared by its whole batch) and environment steps."""
    error: str | None = None

    @property
    def scorable(self) -> bool:
        """False for infrastructure failures."""
        return self.stop_reason.scorable


def summarise(trajectory: Trajectory, task: int, member: int) -> Summary:
    """Returns the summary of a finished, scored trajectory."""
    turns = trajectory.turns
    return Summary(
        task=task,
        member=member,
        seed=trajectory.seed,
        outcome=trajectory.outcome,
        success=trajectory.success,
        stop_reason=trajectory.stop_reason,
        turns=len(turns),
        invalid=sum(turn.info.get("valid_action") is False for turn in turns),
        action_tokens=trajectory.action_tokens,
        seconds=sum(sum(turn.timings.values()) for turn in turns),
        error=trajectory.error,
    )
