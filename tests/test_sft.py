"""The warm start: it learns what it is shown, in exactly the rows that the sampler will see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toys import SOKOBAN, make_model, parrot

from agentrl.buffer import write_jsonl
from agentrl.config import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.config.schema import parse_history
from agentrl.errors import DataError, ModelError, NonFiniteError
from agentrl.evaluate import evaluate
from agentrl.models.chat import ChatCodec
from agentrl.models.load import load_tokenizer
from agentrl.policy import Sampling, load_policy
from agentrl.rollout import Collector, ContextBuilder, Task
from agentrl.train import sft as module
from agentrl.train.sft import demonstrations, sft, tokenise
from agentrl.types import StopReason, Trajectory

ECHO = EnvConfig(id="Echo-v0", kwargs={"turns": 3})


def played(policy: Any, env: EnvConfig, episodes: int, history: str = "full", tokens: int = 3) -> list[Trajectory]:
    rollout = RolloutConfig(history=history, max_new_tokens=tokens)
    with Collector(policy, env, rollout, OutcomeConfig()) as collector:
        return collector.collect([Task(i, str(i)) for i in range(episodes)]).trajectories


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that knows the words of the word game."""
    return make_model(tmp_path_factory.mktemp("sft") / "blank", ECHO, hidden=64)


@pytest.fixture(scope="module")
def shown() -> list[Trajectory]:
    """Episodes that say every word back."""
    return played(parrot(1.0), ECHO, 300)


@pytest.mark.parametrize("history", ["full", "window(0)", "window(1)"])
def test_a_mapping_is_learnt(history: str, blank: Path, shown: list[Trajectory], tmp_path: Path) -> None:
    losses: list[float] = []
    result = sft(
        str(blank),
        shown[:200],
        str(tmp_path / "sft"),
        history=history,
        epochs=2,
        lr=5e-3,
        batch_tokens=256,
        threads=1,
        on_step=lambda state: losses.append(state["loss"]),
    )
    assert losses[0] > 4
    assert result["loss"] < 0.05
    assert (result["episodes"], result["turns"], result["steps"]) == (200, 600, len(losses))
    greedy = Sampling(temperature=0.0, max_new_tokens=3)
    model = load_policy("transformers", model=str(tmp_path / "sft"))
    found = evaluate(model, ECHO, episodes=40, seed=9000, rollout=RolloutConfig(history=history), sampling=greedy)
    assert found.success.value == 1
    assert found.action_tokens == 6  # a word and the end of the turn, three times


@pytest.mark.parametrize("history", ["full", "window(0)", "window(2)"])
@pytest.mark.parametrize(
    ("env", "name"),
    [
        (EnvConfig(**SOKOBAN), "sokoban-noisy-solver"),
        (EnvConfig(id="Sokoban-v0", kwargs={"size": 6}, max_turns=6), "random"),
    ],
    ids=["cells, no instructions", "board, instructions"],
)
def test_rows_are_those_of_the_sampler(env: EnvConfig, name: str, history: str, warm: Path) -> None:
    chat = ChatCodec(load_tokenizer(warm))
    for episode in played(load_policy(name), env, 4):
        context = ContextBuilder(chat, episode.instructions, parse_history(history))
        seen = tokenise(episode, chat, history)
        assert len(seen.turns) == len(episode.turns) > 0
        for turn in seen.turns:
            expected = context.observe(turn.observation)
            context.act(turn.action_ids)
            assert (turn.prompt_ids, turn.new_row) == (expected.prompt_ids, expected.new_row)
            assert turn.action_ids == [*chat.tokenizer.encode(turn.action, add_special_tokens=False), chat.end_id]
            assert len(turn.action_logprobs) == len(turn.action_ids)


@pytest.mark.parametrize("history", ["full", "window(0)", "window(2)"])
def test_what_a_model_played_is_tokenised_as_it_was_sampled(history: str, warm: Path) -> None:
    model = load_policy("transformers", model=str(warm))
    clean = 0
    for episode in played(model, EnvConfig(**SOKOBAN), 6, history, tokens=2):
        if any(turn.info["valid_action"] is False for turn in episode.turns):
            continue  # other ids may spell the same text
        clean += 1
        for before, after in zip(episode.turns, tokenise(episode, model.chat, history).turns, strict=True):  # type: ignore[attr-defined]
            assert after.model_copy(update={"action_logprobs": before.action_logprobs}) == before
    assert clean > 0


def test_the_same_arguments_give_the_same_weights(blank: Path, shown: list[Trajectory], tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        sft(str(blank), shown[:40], str(tmp_path / name), lr=1e-2, batch_tokens=256, seed=seed, threads=1)
    one, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again", "other"))
    assert one == again != other


def test_every_epoch_shows_every_episode_once(shown: list[Trajectory], warm: Path) -> None:
    chat = ChatCodec(load_tokenizer(warm))
    ready = [tokenise(t, chat, "full") for t in shown[:50]]
    plan = module._plan(ready, epochs=3, batch_tokens=400, seed=1)
    flat = [i for step in plan for i in step]
    epochs = [flat[start : start + 50] for start in range(0, 150, 50)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 3
    assert epochs[0] != epochs[1]
    longest = max(sum(len(turn.prompt_ids) + len(turn.action_ids) for turn in t.turns) for t in ready)
    for step in plan:
        assert sum(len(s.prompt_ids) + len(s.action_ids) for i in step for s in ready[i].turns) < 400 + longest


def test_only_the_action_carries_loss(blank: Path, shown: list[Trajectory], tmp_path: Path) -> None:
    # The loss of a uniform model is ln V for each action token, however many context tokens stand before it.
    from agentrl.models.load import load_model, save_model

    model = load_model(blank)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    save_model(model, load_tokenizer(blank), tmp_path / "flat")
    losses: list[float] = []
    options = {"batch_tokens": 10**6, "threads": 1, "on_step": lambda state: losses.append(state["loss"])}
    sft(str(tmp_path / "flat"), shown[:10], str(tmp_path / "out"), **options)
    vocabulary = torch.tensor(float(model.config.vocab_size))
    assert losses == [pytest.approx(float(vocabulary.log()), abs=1e-5)]


# --- what is learnt from ---


@pytest.fixture(scope="module")
def mixed() -> list[Trajectory]:
    """Successes, failures, and one episode that a fault ended."""
    made = played(parrot(0.6), ECHO, 30)
    return [made[0].model_copy(update={"stop_reason": StopReason.ENVIRONMENT_ERROR}), *made[1:]]


@pytest.mark.parametrize("form", ["trajectories", "file", "files", "both"])
def test_only_finished_episodes_and_on_request_only_successes(
    form: str, mixed: list[Trajectory], tmp_path: Path
) -> None:
    file = tmp_path / "demos.jsonl"
    write_jsonl(file, mixed)
    data: Any = {"trajectories": mixed, "file": str(file), "files": [file], "both": [file, *mixed]}[form]
    times = 2 if form == "both" else 1
    successes = sum(t.success for t in mixed[1:])
    assert 0 < successes < 29
    assert len(demonstrations(data)) == 29 * times
    assert len(demonstrations(data, only_success=True)) == successes * times


def test_only_success_reaches_the_training(blank: Path, mixed: list[Trajectory], tmp_path: Path) -> None:
    result = sft(str(blank), mixed, str(tmp_path / "sft"), only_success=True, threads=1)
    assert result["episodes"] == sum(t.success for t in mixed[1:])


def test_nothing_to_learn_from_is_refused(blank: Path, mixed: list[Trajectory], tmp_path: Path) -> None:
    lost = [t for t in mixed[1:] if not t.success]
    out = tmp_path / "sft"
    with pytest.raises(DataError, match=r"the demonstrations: no finished episodes with turns to learn from, out of 0"):
        sft(str(blank), [], str(out))
    with pytest.raises(DataError, match=r"no finished episodes with turns to learn from, out of 1"):
        sft(str(blank), mixed[:1], str(out))
    with pytest.raises(DataError, match=rf"no successful episodes to learn from, out of {len(lost)}"):
        sft(str(blank), lost, str(out), only_success=True)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl: no finished episodes"):
        sft(str(blank), [tmp_path / "empty.jsonl"], str(out))
    with pytest.raises(DataError, match=r"no trajectory file .*none\.jsonl"):
        sft(str(blank), str(tmp_path / "none.jsonl"), str(out))
    with pytest.raises(ModelError, match=r"no model directory 'nowhere'"):
        sft("nowhere", mixed, str(out))
    assert not out.exists()


def test_a_broken_line_is_named(blank: Path, mixed: list[Trajectory], tmp_path: Path) -> None:
    file = tmp_path / "demos.jsonl"
    write_jsonl(file, mixed)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"demos\.jsonl line 30: cut off before its end"):
        sft(str(blank), file, str(tmp_path / "sft"))


# --- how it ends ---


def test_time_is_up_after_a_step_at_least(
    blank: Path, shown: list[Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(module.time, "perf_counter", clock)
    options = {"batch_tokens": 256, "threads": 1}
    first = sft(str(blank), shown, str(tmp_path / "a"), max_seconds=0.5, **options)
    assert first["steps"] == 1
    some = sft(str(blank), shown, str(tmp_path / "b"), max_seconds=5.0, **options)
    assert 1 < some["steps"] < sft(str(blank), shown, str(tmp_path / "c"), **options)["steps"]
    assert (tmp_path / "a" / "model.safetensors").exists()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_writes_no_model(
    where: str, blank: Path, shown: list[Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.load_model

    def spoilt(*arguments: Any, **options: Any) -> Any:
        model = real(*arguments, **options)
        weight = next(model.parameters())
        if where == "loss":
            with torch.no_grad():
                weight.fill_(torch.nan)
        else:
            weight.register_hook(lambda gradient: gradient * torch.nan)
        return model

    monkeypatch.setattr(module, "load_model", spoilt)
    with pytest.raises(NonFiniteError, match=r"sft: loss .* gradient norm nan at step 0; lower the learning rate"):
        sft(str(blank), shown[:10], str(tmp_path / "sft"), threads=1)
    assert not (tmp_path / "sft").exists()
