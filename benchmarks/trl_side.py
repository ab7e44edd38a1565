"""The TRL side of `vs_trl.py`, run by the interpreter of TRL's own environment.

    python trl_side.py template         # prints TRL's version and its chat template of Qwen2.5, as JSON
    python trl_side.py train SETTINGS   # trains by turns with the benchmark (`guessing.Turns`); SETTINGS is JSON

`GRPOTrainer(environment_factory=...)` as TRL documents it. Where its defaults cost time for nothing here they are
turned off: bfloat16 (slower on a CPU), gradient checkpointing (the model is small), progress bars, reporting and
checkpoints.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from guessing import FIRST, INSTRUCTIONS, MAX_TURNS, PROBE, TOOL, Game, Turns
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen2_5_chat_template


class Guessing:
    """The game as TRL wants an environment: public methods are tools."""

    def reset(self, seed: int, **_: Any) -> None:
        self._game = Game(np.random.default_rng(seed))

    def guess(self, number: int):  # type: ignore[no-untyped-def]  # TRL would show the model the returned type too
        return self._game.guess(number)

    def get_reward(self) -> float:
        return float(self._game.solved)


# Written here rather than in the class, so that both sides take the words from one place.
Guessing.guess.__doc__ = f"{TOOL['says']}\n\nArgs:\n    number: {TOOL['number']}\n"


class Timed(GRPOTrainer):
    """The trainer with a clock at its parts, and counts of what it played."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.parts: dict[str, float] = {}
        self.played: dict[str, float] = {}
        super().__init__(*arguments, **named)

    def _timed(self, part: str, function: Any, *arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - started

    def _generate_single_turn(self, *arguments: Any, **named: Any) -> Any:
        return self._timed("generation", super()._generate_single_turn, *arguments, **named)

    def _generate_and_score_completions(self, *arguments: Any, **named: Any) -> Any:
        return self._timed("rollout", super()._generate_and_score_completions, *arguments, **named)

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **named: Any) -> Any:
        return self._timed("forward", super()._get_per_token_logps_and_entropies, *arguments, **named)

    def _generate(self, prompts: list[Any]) -> Any:
        result = super()._generate(prompts)
        _, completion_ids, tool_mask, completions, *_ = result
        answers = sum(message.get("role") == "assistant" for each in completions for message in each)
        self.played = {
            "tokens": sum(map(sum, tool_mask)),
            "trained": sum(map(len, completion_ids)),
            "turns": answers / len(completions),
        }
        return result


class ByTurns(transformers.TrainerCallback):
    """Ends a step where TRL has logged it; what the trainer does between two steps is part of the later one."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.trainer: Timed | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        assert self.trainer is not None
        versions = {name: module.__version__ for name, module in (("trl", trl), ("transformers", transformers))}
        facts = {"probe": probe(self.trainer), "parameters": self.trainer.model.num_parameters()}
        self.turns.ready({**facts, "versions": versions | {"torch": torch.__version__}})

    def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        assert self.trainer is not None
        parts = self.trainer.parts
        rollout, generation = parts["rollout"], parts["generation"]
        seconds = {"generation": generation, "rollout besides": rollout - generation, "forward": parts["forward"]}
        facts = {**self.trainer.played, "parts": seconds, "success": logs["reward"]}
        self.trainer.parts = {}
        self.turns.step(facts)


def probe(trainer: Timed) -> list[int]:
    """Returns the ids of the game's `PROBE`, put together as the tool loop does it."""
    first, action, said = PROBE
    tokenizer, messages = trainer._tokenizer, [_system(), {"role": "user", "content": first}]
    start = tokenizer.apply_chat_template(
        messages, tools=trainer.tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    answer = tokenizer(action + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    suffix = trainer._get_tool_suffix_ids([{"role": "tool", "name": TOOL["name"], "content": said}])
    return [*start, *answer, *suffix]


def _system() -> dict[str, str]:
    return {"role": "system", "content": INSTRUCTIONS}


def train(settings: dict[str, Any]) -> None:
    """Trains for `steps` steps, of which each waits for its turn."""
    torch.set_num_threads(settings["threads"])
    tasks = range(settings["first_seed"], settings["first_seed"] + settings["steps"] * settings["groups"])
    prompt = [_system(), {"role": "user", "content": FIRST}]
    batch = settings["groups"] * settings["group_size"]
    arguments = GRPOConfig(
        output_dir=settings["folder"],
        max_steps=settings["steps"],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_generations=settings["group_size"],
        shuffle_dataset=False,
        max_completion_length=settings["max_tokens"],
        generation_kwargs={"max_new_tokens": settings["max_new_tokens"]},  # the limit of one answer
        max_tool_calling_iterations=MAX_TURNS - 1,
        temperature=settings["temperature"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.0,
        seed=settings["seed"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    by_turns = ByTurns()
    trainer = Timed(
        model=transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32),
        processing_class=transformers.AutoTokenizer.from_pretrained(settings["model"]),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt, "seed": seed} for seed in tasks]),
        environment_factory=Guessing,
        callbacks=[by_turns],
    )
    by_turns.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    if sys.argv[1] == "template":
        print(json.dumps({"trl": trl.__version__, "chat_template": qwen2_5_chat_template}))
    else:
        train(json.loads(sys.argv[2]))
