"""The vocabulary: read this file first.

A *turn* is one call of the policy and the environment's answer. A *trajectory* is the turns of one episode. A *group*
is the trajectories of one task instance: same task, same seed, same first observation. Pydantic models at the edges
(files, HTTP, config); plain tensors inside (`agentrl.batch`). A trajectory survives a JSONL round trip exactly.

Shape letters used in every docstring and name of this project:

    N trajectories   M turns   K action tokens   G groups   B rows   L row length   V vocabulary   H hidden size
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

Role = Literal["system", "user", "assistant", "tool"]


class TextPart(BaseModel):
    """A piece of text inside a message with several parts."""

    type: Literal["text"] = "text"
    text: str


class ImagePart(BaseModel):
    """A picture inside a message, by reference: pixels never travel in a trajectory file (see `agentrl.images`).

    Two parts are equal when they name the same picture: file names are hashes of the pixels.
    """

    type: Literal["image"] = "image"
    path: str
    """Path of a PNG file, relative to the trajectory file's folder."""
    alt: str = ""
    """What the picture shows, in words: readers that take text only (a PRM, a log) read it in the picture's place."""
    _source: bytes | Path | None = PrivateAttr(default=None)
    """The PNG file's content, or the folder that `path` is relative to."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImagePart) and (self.path, self.alt) == (other.path, other.alt)

    def __hash__(self) -> int:
        return hash((self.path, self.alt))


Content = str | list[TextPart | ImagePart]
"""What a message holds: text, or text and image parts."""


def text_of(content: Content) -> str:
    """Returns `content` in words: a picture as its `alt`."""
    if isinstance(content, str):
        return content
    return "".join(part.text if isinstance(part, TextPart) else part.alt for part in content)


class ImageSpan(BaseModel):
    """Where a picture stands in a model's context."""

    start: int
    """First of its ids, the marks around it included."""
    length: int
    image: ImagePart
    text_ids: list[int] = Field(default_factory=list)
    """Ids of `image.alt`: what a model without eyes reads in the picture's place."""

    def moved(self, by: int) -> ImageSpan:
        """Returns the span with `by` added to its start."""
        return self.model_copy(update={"start": self.start + by})


class Message(BaseModel):
    """One entry of a conversation, as chat templates take it."""

    model_config = ConfigDict(frozen=True)

    role: Role
    content: Content


class StopReason(StrEnum):
    """Why an episode ended. The first three are the agent's own doing and can be scored; the rest are not."""

    TERMINATED = "terminated"
    TURN_LIMIT = "turn_limit"
    TOKEN_LIMIT = "token_limit"
    ENVIRONMENT_ERROR = "environment_error"
    POLICY_ERROR = "policy_error"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"

    @property
    def scorable(self) -> bool:
        """Whether an episode that ended so says anything about the policy."""
        return self is _TERMINATED or self is _TURN_LIMIT or self is _TOKEN_LIMIT


# Python 3.11 looks members up slowly, and this is asked several times an episode.
_TERMINATED, _TURN_LIMIT, _TOKEN_LIMIT = StopReason.TERMINATED, StopReason.TURN_LIMIT, StopReason.TOKEN_LIMIT


class Turn(BaseModel):
    """One call of the policy and the environment's answer.

    `prompt_ids` holds only what is *new* in the model's context before this action: the ids of all earlier turns of the
    same row come first. `new_row` says that the context did not extend the last turn's (first turn, or a context policy
    that dropped history), so that `prompt_ids` is then the whole context. Rows rebuilt this way are what the sampler
    saw, token for token; storage stays linear in the length of the episode.
    """

    model_config = ConfigDict(ser_json_inf_nan="constants")

    observation: Content
    """What the agent saw before acting."""
    action: str
    """The agent's full text (scripted policies: the action itself)."""
    prompt_ids: list[int] = Field(default_factory=list)
    prompt_images: list[ImageSpan] = Field(default_factory=list)
    """Pictures in `prompt_ids`, in order; `start` counts from the first of these ids."""
    action_ids: list[int] = Field(default_factory=list)
    """Sampled ids, including the end-of-turn token where it was sampled. Empty for policies without tokens."""
    action_logprobs: list[float] = Field(default_factory=list)
    """Natural log-probability (nats) of each action id under the distribution that was truly sampled from."""
    new_row: bool = True
    reward: float = 0.0
    """The environment's reward for this turn, in its own unit."""
    terminated: bool = False
    truncated: bool = False
    policy_version: int | None = None
    """Version of the weights that produced the action, the oldest if there were several; None for policies without."""
    policy_versions: list[tuple[int, int]] = Field(default_factory=list)
    """(version, number of ids) in order, where the weights changed in the middle of the action; else empty."""
    timings: dict[str, float] = Field(default_factory=dict)
    """Seconds spent: `policy`, `environment`."""
    info: dict[str, Any] = Field(default_factory=dict)
    """The environment's info after the action (JSON-compatible part)."""


class Trajectory(BaseModel):
    """The turns of one episode, with its outcome and the reason why it stopped."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    id: str
    group_id: str
    env: str
    """Environment id."""
    task: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the environment and `reset` options that define the task, beside the seed."""
    seed: int
    """Seed given to `reset`: with `task` it defines the task instance."""
    instructions: str = ""
    """System prompt."""
    start_info: dict[str, Any] = Field(default_factory=dict)
    """The environment's info after `reset` (JSON-compatible part)."""
    turns: list[Turn] = Field(default_factory=list)
    final_observation: Content | None = None
    """What the environment showed after the last action."""
    outcome: float = 0.0
    """Outcome reward of the whole episode."""
    success: bool = False
    stop_reason: StopReason = StopReason.TERMINATED
    error: str | None = None
    """For infrastructure failures: what went wrong."""
    iteration: int = 0
    policy: str = ""
    metadata: dict[str, Any] = Field(default_factory=dict)

    @property
    def scorable(self) -> bool:
        """False for infrastructure failures: these are counted and shown, never averaged, compared or trained on."""
        return self.stop_reason.scorable

    @property
    def truncated(self) -> bool:
        """Whether a limit, rather than the environment, ended the episode."""
        return self.stop_reason in (StopReason.TURN_LIMIT, StopReason.TOKEN_LIMIT)

    @property
    def total_reward(self) -> float:
        """Sum of the environment's rewards over the turns."""
        return sum(turn.reward for turn in self.turns)

    @property
    def action_tokens(self) -> int:
        """Number of sampled tokens."""
        return sum(len(turn.action_ids) for turn in self.turns)


class Group(BaseModel):
    """The trajectories of one task instance: same task, same seed, same first observation."""

    id: str
    trajectories: list[Trajectory]


class PreferencePair(BaseModel):
    """`winner` ended better than `loser`, inside one group. Holds positions in the list they were built from."""

    model_config = ConfigDict(frozen=True)

    winner: int
    loser: int
    weight: float = 1.0


def group_trajectories(trajectories: Iterable[Trajectory]) -> Iterator[Group]:
    """Yields the groups in order of first appearance, members in the order given."""
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.group_id, []).append(trajectory)
    for group_id, members in groups.items():
        yield Group.model_construct(id=group_id, trajectories=members)
