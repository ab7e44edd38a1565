"""The game of `vs_trl.py` as an environment of agentrl, its teacher, and the model that both sides train."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from guessing import FAREWELL, FIRST, HIGHEST, INSTRUCTIONS, MAX_TURNS, TOOL, Game, call, response
from tokenizers import AddedToken

import agentrl
from agentrl.envs import register
from agentrl.envs.arguments import CallSyntaxError
from agentrl.envs.core import Step
from agentrl.envs.tools import ToolEnv, tool
from agentrl.errors import ActionError
from agentrl.models.init import END, PAD, START
from agentrl.models.load import save_model
from agentrl.policy import PolicyRequest
from agentrl.train.sft import sft

ENV_ID = "guessing_env:Guessing-v0"
TEACHING_SEED = 500_000_000
"""First task of the demonstrations: far from those of training."""


class Guessing(ToolEnv):
    """The game: an answer without a tool call ends it, as in TRL's tool loop."""

    instructions = INSTRUCTIONS
    fast = True

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        self.game = Game(self.np_random)
        return FIRST, {}

    def guess(self, number: int) -> str:
        return response(self.game.guess(number))

    guess.__doc__ = f"{TOOL['says']}\n\nArgs:\n    number: {TOOL['number']}\n"
    guess = tool(guess)

    def parse_action(self, text: str) -> Any:
        try:
            return super().parse_action(text)
        except CallSyntaxError:
            return None

    def play(self, action: Any) -> Step:
        if action is None:
            return "", float(self.game.solved), True, {"success": self.game.solved}
        return super().play(action)

    def facts(self) -> dict[str, Any]:
        return {"success": self.game.solved}

    def on_invalid(self, error: ActionError) -> Step:
        return response(json.dumps({"error": str(error)})), 0.0, False, self.facts()


register("Guessing-v0", Guessing, max_turns=MAX_TURNS, summary="find a number by guessing")


def teacher(request: PolicyRequest) -> str:
    """Guesses any number that is still possible, and says goodbye when the game is over."""
    low, high = 1, HIGHEST
    for message in request.messages:
        if found := re.search(r"(\d+) is wrong\. The secret is (\w+)", str(message.content)):
            number = int(found[1])
            low, high = (max(low, number + 1), high) if found[2] == "higher" else (low, min(high, number - 1))
    if re.search(r"You (win|lose)|over\.", str(request.observation)):
        return FAREWELL
    return call(random.Random(request.seed).randint(low, high))


def make_model(out: Path, chat_template: str, *, episodes: int, seed: int, threads: int) -> dict[str, Any]:
    """Writes a Qwen2 of 0.93 M parameters that plays the game, with a tokenizer of its own.

    Args:
        out: directory to write.
        chat_template: TRL's of Qwen2.5: by its very text TRL knows how tool calls are to be parsed.
        episodes: demonstrations of `teacher` that it is cloned from.
        seed: of weights and demonstrations.
        threads: torch threads.

    Returns:
        what `agentrl.train.sft.sft` returns.
    """
    played = agentrl.collect(agentrl.FunctionPolicy(teacher), ENV_ID, episodes=episodes, seed=TEACHING_SEED + seed)
    tokenizer = make_tokenizer(_texts(played.trajectories, chat_template), chat_template)
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=420,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model: Any = transformers.Qwen2ForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    blank = out.with_name(f"{out.name}-blank")
    save_model(model, tokenizer, blank)
    learnt = sft(str(blank), played.trajectories, str(out), lr=2e-3, batch_tokens=2048, seed=seed, threads=threads)
    return {**learnt, "parameters": model.num_parameters()}


def make_tokenizer(texts: Iterable[str], chat_template: str) -> Any:
    """Trains a byte-level BPE with Qwen's way of splitting text and Qwen's marks of tool calls as tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    pattern = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1020,
        min_frequency=1,
        show_progress=False,
        special_tokens=[PAD, START, END],
        initial_alphabet=alphabet,
    )
    backend.train_from_iterator(texts, trainer)
    marks = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    backend.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=PAD, additional_special_tokens=[START]
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def _texts(episodes: Iterable[Any], chat_template: str) -> list[str]:
    texts = {chat_template, INSTRUCTIONS, json.dumps(Guessing.tools)}  # the template has the words around the tools
    for episode in episodes:
        for turn in episode.turns:
            texts |= {turn.observation, turn.action}
    return sorted(texts)
