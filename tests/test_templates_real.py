"""Contexts against real chat templates: what `ChatCodec` builds is what the template gives, or the trait is named.

Where a tokenizer comes from: `real_models`.
"""

from __future__ import annotations

import pytest
from real_models import from_npm, smollm2

from agentrl.errors import ModelError
from agentrl.models.chat import ChatCodec
from agentrl.models.load import load_tokenizer
from agentrl.models.traits import TemplateTrait as T
from agentrl.models.traits import template_traits
from agentrl.rollout import ContextBuilder

BOARD, NEXT = "######\n#@ $.#\n######", "######\n# @$.#\n######"
THOUGHT = "<think>\nThe box is to the right.\n</think>\n\nright"

TRAITS = {
    "smollm2": {T.DEFAULT_SYSTEM},
    "qwen3": {T.DROPS_THINKING},
    "qwen2_5": {T.DEFAULT_SYSTEM},
    "llama3": {T.ALWAYS_PROMPTS, T.TRIMS},
    "llama3_1": {T.TRIMS},
    "llama3_2": {T.TRIMS, T.ADDS_TO_SYSTEM, T.DATED},
}
"""What each family's template does, beside merging line breaks."""


_LOADED: dict[str, object] = {}


def real(name: str):
    """The tokenizer of a family, with a padding token where it has none."""
    if name not in _LOADED:
        tokenizer = load_tokenizer(smollm2() if name == "smollm2" else from_npm(name))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = "<|reserved_special_token_0|>"
        _LOADED[name] = tokenizer
    return _LOADED[name]


def rendered(tokenizer, system, *texts, **options):
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)


def contexts(codec, system, observations, actions, **options):
    """Plays through `ContextBuilder`; returns the context of every turn and whether it began a row."""
    builder = ContextBuilder(codec, system, **options)
    seen = []
    for observation, action in zip(observations, [*actions, None], strict=True):
        context = builder.observe(observation)
        seen.append((list(context.ids), context.new_row))
        if action is not None:
            builder.act(action)
    return seen


pytestmark = pytest.mark.slow


@pytest.fixture(params=TRAITS)
def family(request):
    return request.param, real(request.param)


def test_what_a_family_s_template_does_is_found_out(family):
    name, tokenizer = family
    assert template_traits(ChatCodec(tokenizer)) - {T.MERGES} == TRAITS[name]


@pytest.mark.parametrize("system", ["", "Answer with one word."])
def test_every_turn_s_context_is_the_template_s_and_begins_with_the_last_one(family, system):
    _, tokenizer = family
    codec = ChatCodec(tokenizer)
    assert codec.matches_template
    observations, actions = [BOARD, NEXT, "Solved. Again?"], ["right", "no more"]
    seen = contexts(codec, system, observations, [codec.encode_action(action) for action in actions])
    assert [new_row for _, new_row in seen] == [True, False, False]
    texts = [BOARD]
    for turn, (ids, _) in enumerate(seen):
        assert ids == rendered(tokenizer, system, *texts)
        if turn:
            last = seen[turn - 1][0]
            assert ids[: len(last)] == last
            sampled = codec.encode_action(actions[turn - 1])
            assert ids[len(last) : len(last) + len(sampled)] == sampled
        texts += [*actions[turn : turn + 1], *observations[turn + 1 : turn + 2]]


def test_default_system_texts_show_only_without_one(family):
    name, tokenizer = family
    codec = ChatCodec(tokenizer)
    own = {"smollm2": "named SmolLM", "qwen2_5": "created by Alibaba Cloud", "llama3_2": "Today Date"}.get(name)
    if own is None:
        assert tokenizer.decode(codec.start("", "x")).count("system") == 0
    else:
        assert own in tokenizer.decode(codec.start("", "x"))
        assert (own in tokenizer.decode(codec.start("Mine.", "x"))) == (name == "llama3_2")


def test_sampled_ids_stay_whatever_the_template_would_make_of_them(family):
    """White space around an action, odd ways to split a word, a turn cut off, special tokens: never encoded again."""
    _, tokenizer = family
    codec = ChatCodec(tokenizer)
    odd = [codec.encode_action(letter)[0] for letter in "right"]
    samples = [odd, [*codec.encode_action("\n\n right \n")], [*odd, codec.end_id], [], [codec.end_id]]
    seen = contexts(codec, "Sys", [BOARD] * (len(samples) + 1), samples)
    for (before, _), (after, new_row), sampled in zip(seen, seen[1:], samples, strict=False):
        assert not new_row
        assert after[: len(before) + len(sampled)] == before + sampled


def test_the_end_of_a_turn_is_where_sampling_stops(family):
    name, tokenizer = family
    codec = ChatCodec(tokenizer)
    ends = {"llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "llama3_2": "<|eot_id|>"}
    assert codec.end_id == tokenizer.convert_tokens_to_ids(ends.get(name, "<|im_end|>"))
    assert tokenizer.eos_token_id in codec.stop_ids
    cut, whole = codec.encode_action("right")[:-1], codec.encode_action("right")
    assert cut + codec.extend(cut, NEXT) == whole + codec.extend(whole, NEXT)


def test_white_space_of_observations_is_kept_where_the_template_trims(family):
    name, tokenizer = family
    codec = ChatCodec(tokenizer)
    text = tokenizer.decode(codec.start("", "   #\n # \n"))
    assert "   #\n # \n" in text
    assert ("   #\n # \n" in tokenizer.decode(rendered(tokenizer, "", "   #\n # \n"))) == (T.TRIMS not in TRAITS[name])


def test_a_date_in_the_template_can_be_fixed():
    codec = ChatCodec(real("llama3_2"), template_options={"date_string": "01 Jan 2025"})
    assert T.DATED not in template_traits(codec)
    assert "Today Date: 01 Jan 2025" in codec.tokenizer.decode(codec.start("", "x"))


# --- thinking ---


def test_thinking_stays_in_one_row_or_is_dropped_in_a_row_of_its_own():
    tokenizer = real("qwen3")
    codec = ChatCodec(tokenizer)
    observations, texts = [BOARD, NEXT, "Solved."], [THOUGHT, "up"]
    actions = [codec.encode_action(text) for text in texts]
    whole = contexts(codec, "Sys", observations, actions)
    assert [new_row for _, new_row in whole] == [True, False, False]
    assert THOUGHT in tokenizer.decode(whole[-1][0])
    shown = contexts(codec, "Sys", observations, actions, as_template=True)
    # The second action has no thinking: the template shows it as it was sampled, and its row goes on.
    assert [new_row for _, new_row in shown] == [True, True, False]
    assert shown[0][0] == rendered(tokenizer, "Sys", BOARD)
    assert shown[1][0] == rendered(tokenizer, "Sys", BOARD, THOUGHT, NEXT)
    assert shown[2][0] == rendered(tokenizer, "Sys", BOARD, THOUGHT, NEXT, "up", "Solved.")
    assert "The box" not in tokenizer.decode(shown[2][0])


def test_a_window_drops_thinking_too():
    tokenizer = real("qwen3")
    codec = ChatCodec(tokenizer)
    actions = [codec.encode_action(THOUGHT)] * 3
    shown = contexts(codec, "Sys", ["a", "b", "c", "d"], actions, as_template=True, window=1)
    assert shown[3] == (rendered(tokenizer, "Sys", "c", THOUGHT, "d"), True)


def test_unfinished_thinking_is_shown_as_it_is():
    codec = ChatCodec(real("qwen3"))
    unfinished = codec.encode_action("<think>\nhm")[:-1]
    assert codec.as_template(unfinished) == unfinished
    ids = codec.encode_action(f"<think>\nfirst\n</think>\n\n{THOUGHT}")
    assert codec.decode(codec.as_template(ids)) == "right"
    assert codec.as_template(codec.encode_action("<think>\n</think>\n\n")) == [codec.end_id]


def test_without_thinking_the_empty_thought_before_an_action_is_forgotten_once_it_is_past():
    tokenizer = real("qwen3")
    codec = ChatCodec(tokenizer, template_options={"enable_thinking": False})
    assert not codec.matches_template
    assert template_traits(codec) - {T.MERGES} == {T.DROPS_THINKING, T.FORGETS_PROMPT}
    actions = [codec.encode_action("up"), codec.encode_action("down")]
    whole = contexts(codec, "Sys", [BOARD, NEXT, "Solved."], actions)
    assert [new_row for _, new_row in whole] == [True, False, False]
    assert tokenizer.decode(whole[2][0]).count("<think>\n\n</think>") == 3
    shown = contexts(codec, "Sys", [BOARD, NEXT, "Solved."], actions, as_template=True)
    assert [new_row for _, new_row in shown] == [True, True, True]
    options = {"enable_thinking": False}
    assert shown[1][0] == rendered(tokenizer, "Sys", BOARD, "up", NEXT, **options)
    assert shown[2][0] == rendered(tokenizer, "Sys", BOARD, "up", NEXT, "down", "Solved.", **options)


def test_a_template_without_thinking_goes_on_in_one_row():
    codec = ChatCodec(real("qwen2_5"))
    seen = contexts(codec, "Sys", [BOARD, NEXT], [codec.encode_action(THOUGHT)], as_template=True)
    assert [new_row for _, new_row in seen] == [True, False]


def test_a_tokenizer_without_padding_says_how_to_set_it():
    tokenizer = load_tokenizer(from_npm("llama3_1"))
    with pytest.raises(ModelError, match=r"no padding token: set `pad_token` in `tokenizer_config.json`"):
        ChatCodec(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template: put a Jinja template into `chat_template.jinja`"):
        ChatCodec(tokenizer)
