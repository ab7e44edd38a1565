"""How a conversation becomes token ids: token in, token out.

A conversation's ids only ever grow. The chat template is rendered a few times, once, with sentinel strings in place of
texts, and split at them:

    head      before the first observation (with or without the system text inside)
    prompt    between an observation and the action: end of the user's turn, generation prompt
    glue      between an action and the next observation: end of the assistant's turn, the next user header

From then on the template is never called again. The text of each new observation is tokenised alone, between the ids
of these pieces, and sampled ids are used verbatim: never decoded and encoded again, never rendered again by a template
that rewrites earlier turns (many drop the thinking of earlier turns). What the trainer sees is what the sampler saw.

Two deliberate differences from rendering afresh, both in favour of the environment's exact words: white space around an
observation is kept where the template would strip it (the first row of a board keeps its indentation), and special
tokens spelled out in an observation stay plain text (a page that says ``<|im_end|>`` cannot end the user's turn).

Tools are part of the head, in the template's own form where it has one (`apply_chat_template(tools=...)`), and in the
words of `describe_tools` where it has none.

A picture is the marks that the template writes around one, with as many placeholders between as the model's image
processor makes of it; where it stands travels beside the ids (`ImageSpan`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from agentrl.envs.tools import describe_tools
from agentrl.errors import ModelError
from agentrl.types import Content, ImagePart, ImageSpan, TextPart, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from agentrl.models.vision import ImageReader

_CACHE = 4096
"""Texts whose ids are kept. Members of a group share observations, so that most look-ups hit."""

Tools = Sequence[Mapping[str, Any]]
"""Schemas in OpenAI's function format (`agentrl.envs.ToolEnv.tools`)."""

_SYSTEM, _FIRST, _ACTION, _SECOND = "sentinelSystemQx", "sentinelFirstQx", "sentinelActionQx", "sentinelSecondQx"


class ChatCodec:
    """Turns conversations into ids and sampled ids into text, by the tokenizer's own chat template.

    Attributes:
        stop_ids: end-of-turn ids; sampling stops after one of them.
        end_id: the one of them that the template writes after an assistant's turn.
        pad_id: the padding id.
        system_role: whether the template has one. Where it does not, the system text goes in front of the first
            observation, a blank line between.
        matches_template: whether a short plain conversation built from the pieces has exactly the ids that
            `apply_chat_template` gives. False for templates that rewrite earlier turns; nothing breaks then, since
            earlier turns are never rendered again here.
    """

    stop_ids: frozenset[int]
    end_id: int
    pad_id: int
    system_role: bool
    matches_template: bool

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template_options: Mapping[str, Any] | None = None,
        images: ImageReader | None = None,
    ) -> None:
        """Finds the template's pieces.

        Args:
            tokenizer: any tokenizer with a chat template and a padding token.
            template_options: variables for the template, e.g. ``{"enable_thinking": False}``.
            images: how the model reads pictures (`agentrl.models.vision.reader_of`); None: text only.

        Raises:
            ModelError: no chat template, no generation prompt, no end-of-turn or padding token, or a template that
                cannot be taken apart; the message says how to mend it.
        """
        self.tokenizer = tokenizer
        self._options = dict(template_options or {})
        if not tokenizer.chat_template:
            raise ModelError(f"{self._name} has no chat template: {HOW_TO_SET['chat template']}")
        if tokenizer.pad_token_id is None:
            raise ModelError(f"{self._name} has no padding token: {HOW_TO_SET['pad token']}")
        self.pad_id = int(tokenizer.pad_token_id)
        self._text_ids = lru_cache(_CACHE)(self._encode_text)
        self._head = lru_cache(_CACHE)(self._encode_head)

        self._plain_head, self._system_head = self._find_heads()
        self.system_role = self._system_head is not None
        prompt, glue, between = self._find_prompt_and_glue()
        self._between = self._encode_piece(between)
        self._prompt_text, self._prompt = prompt, self._encode_piece(prompt)
        glue_ids = self._encode_piece(glue)
        self.end_id, after_end = self._find_end(glue_ids)
        self._glue_cut, self._glue_ended = glue_ids, glue_ids[after_end:]
        eos = tokenizer.eos_token_id
        self.stop_ids = frozenset({self.end_id} if eos is None else {self.end_id, int(eos)})
        self.matches_template = self._agrees_with_template()
        self._think_end = self._find_think_end()
        self._images = images
        self._image_marks = ((), ()) if images is None else self._find_image_marks(images.token_id)

    def start(self, instructions: str, observation: Content, tools: Tools = ()) -> list[int]:
        """Returns the ids of a new context, up to and including the generation prompt.

        Args:
            instructions: system text; empty for none (templates with a default system text then show that).
            observation: what the agent sees first.
            tools: what `instructions` end with in words (`describe_tools`), as schemas: a template that can show tools
                is given these instead. Where the words are not there, a run has put its own text in their place, and
                no tools are shown.
        """
        return [
            *self._head(instructions, json.dumps(list(tools)) if tools else ""),
            *self._observation_ids(observation),
            *self._prompt,
        ]

    def extend(self, last_action_ids: Sequence[int], observation: Content) -> list[int]:
        """Returns the ids that follow a context and the action sampled in it, up to the next action.

        The end of the assistant's turn is left out where it was sampled (the last id is in `stop_ids`) and written
        where the turn's token limit cut the action off.
        """
        ended = bool(last_action_ids) and last_action_ids[-1] in self.stop_ids
        glue = self._glue_ended if ended else self._glue_cut
        return [*glue, *self._observation_ids(observation), *self._prompt]

    def window(
        self,
        instructions: str,
        past: Sequence[tuple[Content, Sequence[int]]],
        observation: Content,
        tools: Tools = (),
        *,
        as_template: bool = False,
    ) -> list[int]:
        """Returns the ids of a context that shows only some past turns, then `observation`.

        Args:
            instructions: system text.
            past: (observation, action ids) of the turns to show, oldest first.
            observation: what the agent sees now.
            tools: see `start`.
            as_template: what the template writes before an action that is past stands before these, where it writes
                something else before one to come (an empty thought).
        """
        shown = [*(seen for seen, _ in past), observation]
        ids = self.start(instructions, shown[0], tools)
        for (_, action_ids), following in zip(past, shown[1:], strict=True):
            if as_template:
                ids[len(ids) - len(self._prompt) :] = self._between
            ids += action_ids
            ids += self.extend(action_ids, following)
        return ids

    def as_template(self, action_ids: Sequence[int]) -> list[int]:
        """Returns the sampled ids that the template shows of an action once it is past.

        These are all of them, or those after the thinking where the template drops that. Nothing is encoded again.
        """
        ids = list(action_ids)
        if self._think_end is None or self._think_end not in ids:
            return ids
        ids = ids[len(ids) - ids[::-1].index(self._think_end) :]
        while ids and ids[0] not in self.stop_ids and not self.decode(ids[:1]).strip("\n"):
            ids = ids[1:]
        return ids

    @property
    def rewrites(self) -> bool:
        """Whether the template may show an action, or what stands before it, otherwise once it is past."""
        return self._think_end is not None or self.rewrites_prompt

    @property
    def rewrites_prompt(self) -> bool:
        """Whether other ids stand before an action that is past than before one to come."""
        return self._between != self._prompt

    @property
    def past_prompt_excess(self) -> int:
        """How many ids more stand before an action that is past than before one to come."""
        return len(self._between) - len(self._prompt)

    def image_spans(self, observation: Content) -> list[ImageSpan]:
        """Returns where the pictures of `observation` stand in ids that end with it (`start`, `extend`, `window`).

        `start` counts from the end of those ids, and so is negative.
        """
        if isinstance(observation, str):
            return []
        at = -len(self._prompt)
        spans: list[ImageSpan] = []
        for part in reversed(observation):
            length = len(self._part_ids(part))
            at -= length
            if isinstance(part, ImagePart):
                spans.append(ImageSpan(start=at, length=length, image=part, text_ids=list(self._text_ids(part.alt))))
        return spans[::-1]

    def encode_action(self, text: str) -> list[int]:
        """Returns the ids of an action that was not sampled (a demonstration), with the end-of-turn token."""
        return [*self._text_ids(text), self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of sampled ids, special tokens left out."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    @property
    def _name(self) -> str:
        return f"tokenizer {self.tokenizer.name_or_path!r}" if self.tokenizer.name_or_path else "the tokenizer"

    def _observation_ids(self, observation: Content) -> tuple[int, ...]:
        if isinstance(observation, str):
            return self._text_ids(observation)
        if not any(isinstance(part, ImagePart) for part in observation):
            return self._text_ids(text_of(observation))
        return tuple(i for part in observation for i in self._part_ids(part))

    def _part_ids(self, part: TextPart | ImagePart) -> tuple[int, ...]:
        if isinstance(part, TextPart):
            return self._text_ids(part.text)
        if self._images is None:
            raise ModelError(
                "the observation holds an image, but this chat codec takes text only; take a vision-language model "
                "(Qwen2.5-VL, Qwen3-VL), have the environment describe what it shows in words, or leave the image "
                "parts out"
            )
        before, after = self._image_marks
        return (*before, *[self._images.token_id] * self._images.read(part).tokens, *after)

    def _encode_piece(self, text: str) -> tuple[int, ...]:
        """Ids of a piece of the template: special tokens are what they are."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encode_text(self, text: str) -> tuple[int, ...]:
        """Ids of foreign text: special tokens spelled out in it stay plain text."""
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _encode_head(self, instructions: str, tools: str) -> tuple[int, ...]:
        """Ids of the head; `tools` is JSON, "" for none."""
        heads = None
        if tools and instructions.endswith(words := describe_tools(schemas := json.loads(tools))):
            bare = instructions.removesuffix(words).rstrip()
            if (heads := self._tool_heads(bare, schemas)) is not None:
                instructions = bare
        if heads is None:
            heads = self._system_head if instructions and self._system_head else (self._plain_head,)
        before, *after = map(self._encode_piece, heads)
        if not after:
            return before + (self._encode_text(instructions + "\n\n") if instructions else ())
        return before + self._encode_text(instructions) + after[0]

    def _tool_heads(self, instructions: str, tools: Tools) -> tuple[str, ...] | None:
        """Returns the head with `tools` in it, split at the system text if there is any to show.

        None where the template leaves them out, or puts them behind the first observation: what follows that must be
        what follows it without tools.
        """
        system = self._system_head if instructions else None
        shown, at = ((("system", _SYSTEM),), (_SYSTEM, _FIRST)) if system else ((), (_FIRST,))
        try:
            *heads, rest = _split(self._render(*shown, ("user", _FIRST), tools=tools), *at)
        except ValueError:
            return None
        names = [str(tool.get("function", tool)["name"]) for tool in tools]
        if tuple(heads) == (system or (self._plain_head,)) or not all(name in "".join(heads) for name in names):
            return None
        return tuple(heads) if rest == self._prompt_text else None

    def _render(self, *contents: tuple[str, Any], generate: bool = True, tools: Tools = ()) -> str:
        """Renders (role, content) pairs; any failure of the template is a ValueError."""
        from jinja2 import TemplateError

        messages = [{"role": role, "content": content} for role, content in contents]
        try:
            options = {**self._options, "tools": list(tools)} if tools else self._options
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate, **options
            )
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(str(error)) from error
        return str(text)

    def _find_heads(self) -> tuple[str, tuple[str, str] | None]:
        """Returns the head without system text, and (before, after) of the system text or None without such a role."""
        try:
            (plain, _) = _split(self._render(("user", _FIRST)), _FIRST)
        except ValueError as error:
            raise ModelError(
                f"{self._name}: its chat template cannot show one user message ({error}); {HOW_TO_SET['chat template']}"
            ) from error
        try:
            before, after, _ = _split(self._render(("system", _SYSTEM), ("user", _FIRST)), _SYSTEM, _FIRST)
        except ValueError:  # the template refuses the role, or drops its text
            return plain, None
        return plain, (before, after)

    def _find_prompt_and_glue(self) -> tuple[str, str, str]:
        """Returns what stands before an action to come, after one, and before one that is past."""
        turns = (("user", _FIRST), ("assistant", _ACTION), ("user", _SECOND))
        try:
            _, between, glue, prompt = _split(self._render(*turns), _FIRST, _ACTION, _SECOND)
            closed = _split(self._render(*turns, generate=False), _SECOND)[1]
        except ValueError as error:
            raise ModelError(
                f"{self._name}: its chat template cannot show a conversation of several turns ({error}); "
                f"{HOW_TO_SET['chat template']}"
            ) from error
        # Templates such as Mistral's need no generation prompt: an action follows the user's turn directly.
        if prompt == closed and prompt != between:
            raise ModelError(
                f"{self._name}: its chat template ignores add_generation_prompt, so that the model would be asked to "
                f"act after {prompt!r} where its own turns begin with {between!r}; end the template with "
                "{% if add_generation_prompt %}...{% endif %} that writes the assistant's header"
            )
        return prompt, glue, between

    def _find_image_marks(self, token_id: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the ids that the template writes before and after the placeholders of a picture."""
        content: Any = [{"type": "image"}, {"type": "text", "text": _FIRST}]
        try:
            (before, _) = _split(self._render(("user", content)), _FIRST)
        except ValueError as error:
            raise ModelError(
                f"{self._name}: its chat template cannot show a message with an image part ({error}); "
                f"{HOW_TO_SET['chat template']}"
            ) from error
        marked = self._encode_piece(before.removeprefix(self._plain_head))
        if not before.startswith(self._plain_head) or marked.count(token_id) != 1:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            raise ModelError(
                f"{self._name}: for an image part its chat template writes {before.removeprefix(self._plain_head)!r}, "
                f"where the model's placeholder {token!r} must stand once"
            )
        at = marked.index(token_id)
        return marked[:at], marked[at + 1 :]

    def _find_end(self, glue: tuple[int, ...]) -> tuple[int, int]:
        """Returns the end-of-turn id and the position in `glue` after it (0 where the template writes none)."""
        eos = self.tokenizer.eos_token_id
        if eos is not None and eos in glue:
            return int(eos), glue.index(eos) + 1
        special = set(self.tokenizer.all_special_ids)
        special.update(self.tokenizer.added_tokens_decoder)
        for position, token in enumerate(glue):
            if token in special:
                return token, position + 1
        if eos is None:
            raise ModelError(
                f"{self._name}: no token ends an assistant's turn: the chat template writes none and there is no end "
                f"token; {HOW_TO_SET['end token']}"
            )
        return int(eos), 0

    def _find_think_end(self) -> int | None:
        """Returns the id that ends thinking, where the template drops the thinking of earlier turns."""
        ids = self._encode_piece("</think>")
        thought = ("assistant", f"<think>\n{_SYSTEM}\n</think>\n\n{_ACTION}")
        try:
            text = self._render(("user", _FIRST), thought, ("user", _SECOND))
        except ValueError:
            return None
        return ids[0] if len(ids) == 1 and _ACTION in text and _SYSTEM not in text else None

    def _agrees_with_template(self) -> bool:
        texts = ("Answer with one word.", "#@ $.\n# one", "up", "# @$.\n# two")
        conversation = list(zip(("system", "user", "assistant", "user"), texts, strict=True))
        if not self.system_role:
            conversation = [("user", f"{texts[0]}\n\n{texts[1]}"), *conversation[2:]]
        ids = self.window(texts[0], [(texts[1], self.encode_action(texts[2]))], texts[3])
        try:
            return ids == list(self._encode_piece(self._render(*conversation)))
        except ValueError:
            return False


def _split(text: str, *sentinels: str) -> list[str]:
    """Splits `text` at the sentinels, each of which must occur once and in this order."""
    pieces = []
    for sentinel in sentinels:
        before, found, text = text.partition(sentinel)
        if not found:
            raise ValueError("it drops, repeats or reorders messages")
        pieces.append(before)
    if any(sentinel in piece for sentinel in sentinels for piece in (*pieces, text)):
        raise ValueError("it drops, repeats or reorders messages")
    return [*pieces, text]


HOW_TO_SET = {
    "chat template": (
        "put a Jinja template into `chat_template.jinja` in the model's directory, or set `tokenizer.chat_template` "
        "and save the tokenizer there (`tokenizer.save_pretrained(directory)`); instruction-tuned models come with one"
    ),
    "pad token": (
        "set `pad_token` in `tokenizer_config.json` to a token that is in the vocabulary and never sampled (e.g. "
        '"<|endoftext|>"), or set `tokenizer.pad_token` and save the tokenizer to the directory'
    ),
    "end token": (
        'set `eos_token` in `tokenizer_config.json` to the token that ends a turn (e.g. "<|im_end|>"), or set '
        "`tokenizer.eos_token` and save the tokenizer to the directory"
    ),
}
"""What a tokenizer can lack -> how to set it."""
