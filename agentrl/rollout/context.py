"""Token in, token out: which ids a model sees before each action.

What was sampled is what is trained on. With history ``full`` one row grows through the whole episode: each turn appends
the sampled ids, verbatim, and the ids of the new observation. With ``window(k)`` the model sees the last k turns before
the current observation; while no more than k have passed the row simply grows, and from then on every turn starts a
fresh row. A `Turn` stores only what is new, so that storage stays linear in the length of the episode.

Left out: summaries and other learned contexts. They only need another way to make a fresh row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentrl.errors import AgentRLError
from agentrl.types import Content, ImageSpan

if TYPE_CHECKING:
    from agentrl.models.chat import ChatCodec, Tools


@dataclass(frozen=True, slots=True)
class Context:
    """What the policy is asked to continue."""

    ids: list[int]
    """Every id of the current row, for the policy."""
    prompt_ids: list[int]
    """The part that is new since the last sampled id; all of `ids` where `new_row`. Stored in the `Turn`."""
    new_row: bool
    images: list[ImageSpan] = field(default_factory=list)
    """Pictures in `ids`, in order."""
    prompt_images: list[ImageSpan] = field(default_factory=list)
    """Pictures in `prompt_ids`. Stored in the `Turn`."""


class ContextBuilder:
    """The token context of one episode. Call `observe`, then `act`, in turn.

    Args:
        codec: turns conversation into ids.
        instructions: system prompt.
        window: number of past turns that stay visible; None keeps all.
        tools: schemas of the tools that `instructions` tell of (``info["tool_schemas"]`` of `reset`).
        as_template: earlier turns are shown as the chat template shows them, without the thinking that it drops. Where
            that is not what was sampled, a new row starts.
    """

    def __init__(
        self,
        codec: ChatCodec,
        instructions: str,
        window: int | None = None,
        tools: Tools = (),
        *,
        as_template: bool = False,
    ) -> None:
        self._codec = codec
        self._as_template = as_template and codec.rewrites
        self._tools = tools
        self._instructions = instructions
        self._window = window
        self._turns = 0
        self._rewritten = False
        """Whether the template shows the last turn otherwise than it was sampled."""
        self._row: list[int] = []
        self._sent: list[int] = []
        self._actions: list[int] = []
        self._observation: Content = ""
        self._images: list[ImageSpan] = []
        kept = None if window is None and self._as_template else window or 0
        self._past: deque[tuple[Content, list[int]]] = deque(maxlen=kept)

    def observe(self, observation: Content) -> Context:
        """Returns the context in which the next action is to be sampled.

        Raises:
            AgentRLError: the ids handed out for the last turn were changed since; training on them would be wrong.
        """
        self._observation = observation
        if self._turns == 0:
            self._row = prompt = list(self._codec.start(self._instructions, observation, self._tools))
            new_row = True
        elif (self._window is None or self._turns <= self._window) and not self._rewritten:
            prompt = list(self._codec.extend(self._actions, observation))
            self._row = [*self._row, *self._actions, *prompt]
            self._check_prefix()
            new_row = False
        else:
            past = list(self._past)
            form = {"as_template": True} if self._as_template else {}
            self._row = prompt = list(self._codec.window(self._instructions, past, observation, self._tools, **form))
            new_row = True
        self._sent = list(self._row)
        images = self._images_in(prompt, new_row)
        before = len(self._row) - len(prompt)
        self._images = [*([] if new_row else self._images), *(image.moved(before) for image in images)]
        return Context(self._sent, prompt, new_row, list(self._images), images)

    def act(self, action_ids: Sequence[int]) -> None:
        """Records the ids sampled after the last `observe`."""
        self._actions = list(action_ids)
        self._turns += 1
        if self._past.maxlen != 0:
            shown = self._codec.as_template(action_ids) if self._as_template else self._actions
            self._rewritten = shown != self._actions or (self._as_template and self._codec.rewrites_prompt)
            self._past.append((self._observation, shown))

    def _images_in(self, prompt: list[int], new_row: bool) -> list[ImageSpan]:
        """Returns the pictures in `prompt`, found from its end backwards, observation by observation."""
        shown = [(self._observation, self._actions)]
        if new_row and self._turns:
            past = list(self._past)
            before = [[], *(actions for _, actions in past)]
            shown = list(zip([*(seen for seen, _ in past), self._observation], before, strict=True))
        if all(isinstance(observation, str) for observation, _ in shown):
            return []
        spans: list[ImageSpan] = []
        end, more = len(prompt), 0
        for observation, actions in reversed(shown):
            if not isinstance(observation, str):
                spans = [span.moved(end - more) for span in self._codec.image_spans(observation)] + spans
            if len(shown) > 1:
                end -= len(self._codec.extend(actions, observation)) + more + len(actions)
            # What stands before actions that are past may be longer or shorter than what stands before one to come.
            more = self._codec.past_prompt_excess if self._as_template else 0
        return spans

    def _check_prefix(self) -> None:
        """The sampler saw `_sent` and answered `_actions`: the new row must begin with exactly these."""
        sent, answered = len(self._sent), len(self._sent) + len(self._actions)
        if self._row[:sent] != self._sent or self._row[sent:answered] != self._actions:
            raise AgentRLError(
                f"turn {self._turns}: the context no longer begins with the {sent} ids the policy was given and the "
                f"{len(self._actions)} it sampled; policies must not change `PolicyRequest.context_ids`"
            )
