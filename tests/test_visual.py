"""Pictures from the environment through files, contexts, sampler, trainer and PRM."""

from __future__ import annotations

import asyncio
import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXTS
from toys import register

from agentrl import envs
from agentrl.batch import build_batch, score, score_microbatch
from agentrl.batch.rows import in_words
from agentrl.buffer import read_jsonl, write_jsonl
from agentrl.config import EnvConfig, OutcomeConfig, RolloutConfig, RunConfig
from agentrl.envs import TextEnv
from agentrl.envs.content import AnyContent
from agentrl.errors import DataError, ModelError, UserError
from agentrl.images import image_part, images_of, png_bytes, read_pixels
from agentrl.models.chat import ChatCodec
from agentrl.models.init import train_tokenizer
from agentrl.models.load import check_model_dir, load_model, load_tokenizer, save_model
from agentrl.models.vision import ImageReader, check_visual, reader_of, rope_positions
from agentrl.policy import PolicyRequest, Sampling, load_policy
from agentrl.rollout import Collector, ContextBuilder, Task, run
from agentrl.rollout.values import checked_observation
from agentrl.types import ImagePart, ImageSpan, TextPart, Trajectory, Turn, text_of
from environments.sokoban.board import draw_board, read_board
from environments.sokoban.visual import ALPHABET, PALETTE, draw_pixels, tiles
from policies.transformers import TransformersPolicy

BOARD = "######\n#@ $.#\n# *+##\n######".replace("+", " ")
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- else -%}{{- part['text'] -}}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""ChatML with image parts, as Qwen2.5-VL writes them."""


def noise(seed: int, height: int = 56, width: int = 84) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def make_vl_model(path: Path, kind: str) -> Path:
    """A tiny random Qwen2.5-VL or Qwen3-VL, its tokenizer trained by `agentrl.models.init`, saved to `path`."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )
    from transformers import Qwen2VLImageProcessorPil as Processor

    tokenizer = train_tokenizer(TEXTS, vocab=300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *MARKS]})
    tokenizer.chat_template = TEMPLATE
    marks = dict(
        zip(
            ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
            tokenizer.convert_tokens_to_ids(list(MARKS)),
            strict=True,
        )
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    eyes = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    torch.manual_seed(0)
    if kind == "qwen2.5":
        eyes |= {"patch_size": 14, "fullatt_block_indexes": [1], "window_size": 56}
        config: Any = Qwen2_5_VLConfig(text_config=text, vision_config=eyes, **marks)
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    else:
        eyes |= {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        text |= {"head_dim": 16}
        config = Qwen3VLConfig(text_config=text, vision_config=eyes, **marks)
        model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():  # distributions that are neither flat nor certain, and depend on the picture
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8)
    processor = Processor(
        patch_size=config.vision_config.patch_size, size={"shortest_edge": 56 * 56, "longest_edge": 9e5}
    )
    model.image_reader = ImageReader(processor, config.image_token_id)
    save_model(model, tokenizer, path)
    return path


@pytest.fixture(scope="module", params=["qwen2.5", "qwen3"])
def vl_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vl_model(tmp_path_factory.mktemp("vl") / request.param, request.param)


@pytest.fixture(scope="module")
def seeing(vl_dir: Path) -> Any:
    return load_model(vl_dir, train=True)


@pytest.fixture(scope="module")
def codec(vl_dir: Path, seeing: Any) -> ChatCodec:
    return ChatCodec(load_tokenizer(vl_dir), images=reader_of(seeing))


class Slides(TextEnv):
    """One to three parts a turn, pictures of several sizes and words in changing order, whatever the agent says."""

    instructions = "Look."
    fast = True

    def begin(self, options: dict[str, Any]) -> Any:
        self.observation_space = AnyContent()
        self.turn = 0
        return self.show(), {}

    def parse_action(self, text: str) -> str:
        return text

    def play(self, action: str) -> Any:
        self.turn += 1
        return self.show(), 0.0, False, {}

    def show(self) -> list[TextPart | ImagePart]:
        seed = int(self.np_random.integers(1000))
        first = image_part(noise(seed, 60, 56 + 30 * self.turn), alt=f"up {seed}")
        second = image_part(noise(seed + 1), alt="down")
        return [[first], [TextPart(text="left"), first, TextPart(text="right"), second], [second, first]][self.turn % 3]


register("TestSlides-v0", Slides)


def play(
    policy: Any, env: str = "TestSlides-v0", *, history: str = "full", tasks: int = 2, **kwargs: Any
) -> list[Trajectory]:
    """Some episodes of four turns, two for each task."""
    rollout = RolloutConfig(history=history, max_new_tokens=4, max_context_tokens=2000, concurrency=8)
    with Collector(policy, EnvConfig(id=env, kwargs=kwargs, max_turns=4), rollout, OutcomeConfig()) as collector:
        return collector.collect([Task(i, f"{i}", 2) for i in range(tasks)], seed=1).trajectories


# The environment


def test_a_picture_shows_the_tile_of_every_cell() -> None:
    cells = read_board(BOARD)
    assert draw_board(*cells) == BOARD
    board = "#.$\n*@+"
    pixels = draw_pixels(board, 16)
    assert pixels.shape == (32, 48, 3)
    for row, line in enumerate(board.split("\n")):
        for column, char in enumerate(line):
            tile = pixels[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            assert (tile == PALETTE[tiles(16)[ALPHABET.index(char)]]).all()


@pytest.mark.parametrize("cell", [12, 16, 28, 32, 64])
def test_no_two_tiles_look_alike(cell: int) -> None:
    made = tiles(cell)
    assert made.max() < len(PALETTE)
    assert all((made[a] != made[b]).mean() > 0.1 for a in range(7) for b in range(a))


@pytest.mark.parametrize("show", ["both", "image"])
def test_same_levels_rewards_and_states_as_in_text(show: str) -> None:
    text, visual = envs.make("Sokoban-v0", split="train"), envs.make("VisualSokoban-v0", split="train", show=show)
    for seed in range(5):
        (board, info), (seen, visual_info) = text.reset(seed=seed), visual.reset(seed=seed)
        assert info == visual_info
        for action in ("up", "left", "nonsense", "down", "right"):
            assert text_of(seen) == board
            assert np.array_equal(read_pixels(images_of(seen)[0]), visual.render())
            assert (draw_pixels(info["state_key"]) == visual.render()).all()
            (board, *rest), (seen, *visual_rest) = text.step(action), visual.step(action)
            info = rest[-1]
            assert rest == visual_rest
            if rest[1] or rest[2]:
                break


def test_an_invalid_action_shows_the_picture_again_under_an_error_line() -> None:
    env = envs.make("VisualSokoban-v0", show="image")
    first, _ = env.reset(seed=0)
    for _ in range(2):
        seen = env.step("jump")[0]
        assert seen == [TextPart(text="Invalid action: answer up, down, left or right\n"), *first]
    assert seen in env.observation_space
    assert [3] not in env.observation_space


def test_the_solver_solves_it() -> None:
    rollout, env = RolloutConfig(), EnvConfig(id="VisualSokoban-v0", kwargs={"show": "image", "max_solution": 6})
    with Collector(load_policy("sokoban-solver"), env, rollout, OutcomeConfig()) as collector:
        done = collector.collect([Task(i, f"{i}") for i in range(10)]).trajectories
    assert all(t.success for t in done)


@pytest.mark.parametrize(("settings", "says"), [({"show": "words"}, "show='words'"), ({"cell": 4}, "cell=4")])
def test_settings_that_make_no_picture_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        envs.make("VisualSokoban-v0", **settings)
    with pytest.raises(UserError, match="Sokoban-v0 has it"):
        envs.make("VisualSokoban-v0").unwrapped.tabular()


# Pictures in files


def test_pixels_survive_naming_pickling_and_reading() -> None:
    pixels = noise(0)
    part = image_part(pixels, alt="noise")
    assert part == image_part(pixels.copy(), alt="noise")
    assert part.path != image_part(noise(1)).path
    assert part.path != image_part(pixels.reshape(84, 56, 3)).path
    again = pickle.loads(pickle.dumps(part))
    assert (read_pixels(again) == pixels).all()
    assert ImagePart.model_validate_json(part.model_dump_json()) == part
    assert "_source" not in part.model_dump_json()


@pytest.mark.parametrize("wrong", [np.zeros((2, 2)), np.zeros((2, 2, 3)), np.zeros((0, 2, 3), np.uint8), "x.png", None])
def test_what_is_no_picture_is_refused(wrong: Any) -> None:
    with pytest.raises(UserError, match="picture"):
        image_part(wrong)


def test_without_pillow_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r'pip install "agentrl\[images\]"'):
        image_part(noise(0))


def test_a_trajectory_file_brings_its_pictures_each_once(tmp_path: Path) -> None:
    episodes = play(load_policy("random"), "VisualSokoban-v0", show="image")
    file = tmp_path / "one" / "episodes.jsonl"
    write_jsonl(file, episodes)
    parts = {
        p
        for t in episodes
        for o in [*(turn.observation for turn in t.turns), t.final_observation]
        for p in images_of(o)
    }
    assert sorted(p.path for p in parts) == sorted(
        str(p.relative_to(file.parent)) for p in file.parent.glob("images/*")
    )
    assert all((file.parent / p.path).read_bytes() == png_bytes(p) for p in parts)
    before = {p: p.stat().st_mtime_ns for p in file.parent.glob("images/*")}
    back = read_jsonl(file)
    assert back == episodes
    # From one folder to another, pictures and all; those that lie there already are not written again.
    write_jsonl(tmp_path / "two" / "copy.jsonl", back)
    write_jsonl(file, back)
    assert {p: p.stat().st_mtime_ns for p in file.parent.glob("images/*")} == before
    copied = read_jsonl(tmp_path / "two" / "copy.jsonl")
    assert copied == episodes
    first = images_of(copied[0].turns[0].observation)[0]
    assert (read_pixels(first) == read_pixels(images_of(episodes[0].turns[0].observation)[0])).all()


def test_a_picture_that_is_not_there_is_named(tmp_path: Path) -> None:
    def read(path: str) -> None:
        turn = Turn(observation=[ImagePart(path=path)], action="")
        write_jsonl(tmp_path / "t.jsonl", [Trajectory(id="a", group_id="g", env="e", seed=0, turns=[turn])])
        read_pixels(images_of(read_jsonl(tmp_path / "t.jsonl")[0].turns[0].observation)[0])

    with pytest.raises(DataError, match=r"gone.png.*copy the folder 'images'"):
        read("images/gone.png")
    with pytest.raises(DataError, match="outside the folder"):
        read("../secret.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text.png.*no readable picture"):
        read("text.png")


def test_gymnasium_dicts_become_parts_and_bare_paths_are_refused() -> None:
    picture, text = checked_observation("E", {"text": "look", "image": noise(0)})
    assert (picture, text) == (image_part(noise(0)), TextPart(text="look"))
    with pytest.raises(UserError, match=r"'E'.*'x.png' without its pixels"):
        checked_observation("E", [ImagePart(path="x.png")])
    with pytest.raises(UserError, match="returned a dict"):
        checked_observation("E", {"image": noise(0)})


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_pictures_come_out_of_every_executor(executor: str, tmp_path: Path) -> None:
    rollout = RolloutConfig(executor=executor, workers=1)
    with Collector(load_policy("random"), EnvConfig(id="VisualSokoban-v0", max_turns=2), rollout, OutcomeConfig()) as c:
        episodes = c.collect([Task(0, "0", 2)]).trajectories
    write_jsonl(tmp_path / "t.jsonl", episodes)
    assert len(list(tmp_path.glob("images/*.png"))) >= 1
    assert read_jsonl(tmp_path / "t.jsonl") == episodes


# Contexts


def test_the_codec_writes_what_template_and_processor_write(codec: ChatCodec, seeing: Any) -> None:
    reader = reader_of(seeing)
    assert reader is not None
    parts = [image_part(noise(0)), TextPart(text="one"), image_part(noise(1, 100, 70))]
    ids = codec.start("rules", parts)
    content = [{"type": "image"}, {"type": "text", "text": "one"}, {"type": "image"}]
    rendered = codec.tokenizer.apply_chat_template(
        [{"role": "system", "content": "rules"}, {"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
    )
    for part in images_of(parts):
        grid = reader.processor(images=[read_pixels(part)], return_tensors="pt")["image_grid_thw"]
        rendered = rendered.replace("<|image_pad|>", "<pad>" * (int(grid.prod()) // 4), 1)
    assert ids == codec.tokenizer(rendered.replace("<pad>", "<|image_pad|>"), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("window", [None, 0, 1, 2])
def test_spans_say_where_every_picture_stands(codec: ChatCodec, seeing: Any, window: int | None) -> None:
    reader = reader_of(seeing)
    assert reader is not None
    builder = ContextBuilder(codec, "rules", window)
    fake = [*codec._image_marks[0], reader.token_id, *codec._image_marks[1]]
    shown: list[ImagePart] = []
    for turn in range(5):
        new = [image_part(noise(10 * turn + k, 60 + 28 * k), alt=f"up {turn}") for k in range(turn % 3)]
        shown += new
        context = builder.observe([TextPart(text="see <|image_pad|>"), *new] if turn != 3 else "just words")
        visible = [s.image for s in context.images]
        assert visible == shown[len(shown) - len(visible) :]
        if window is None:
            assert visible == shown
        marks = {i for s in context.images for i in range(s.start, s.start + s.length)}
        for span in context.images:
            ids = context.ids[span.start : span.start + span.length]
            inner = [reader.token_id] * reader.read(span.image).tokens
            assert ids == [*codec._image_marks[0], *inner, *codec._image_marks[1]]
            assert span.text_ids == codec.tokenizer(span.image.alt, add_special_tokens=False)["input_ids"]
        # Placeholders elsewhere were sampled: they are words.
        others = [i for i in range(len(context.ids)) if context.ids[i] == reader.token_id and i not in marks]
        assert bool(others) == (turn > 0 and window != 0)
        offset = len(context.ids) - len(context.prompt_ids)
        assert [s.moved(offset) for s in context.prompt_images] == [s for s in context.images if s.start >= offset]
        builder.act([*fake, codec.end_id])


def test_text_models_refuse_pictures_with_a_way_out(model_dir: Path, model: Any) -> None:
    with pytest.raises(ModelError, match=r"holds an image.*Qwen2.5-VL"):
        ChatCodec(load_tokenizer(model_dir)).start("", [image_part(noise(0))])
    with pytest.raises(ModelError, match="cannot show a message with an image part"):
        ChatCodec(load_tokenizer(model_dir), images=ImageReader(None, 5))
    span = ImageSpan(start=0, length=2, image=image_part(noise(0)))
    turn = Turn(
        observation="", action="", prompt_ids=[5, 5, 3], prompt_images=[span], action_ids=[1], action_logprobs=[0.0]
    )
    batch = build_batch([Trajectory(id="a", group_id="g", env="e", seed=0, turns=[turn])])
    with pytest.raises(ModelError, match="Qwen3ForCausalLM reads text only"):
        score(model, batch, budget=100)


# The model


def test_a_model_that_sees_is_saved_with_its_processor(vl_dir: Path, seeing: Any, tmp_path: Path) -> None:
    check_model_dir(vl_dir)
    assert (vl_dir / "preprocessor_config.json").exists()
    check_visual(seeing)
    assert reader_of(copy.deepcopy(seeing)) is reader_of(seeing)
    save_model(seeing, load_tokenizer(vl_dir), tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="no image processor"):
        load_model(tmp_path / "m")


def test_a_model_that_places_pictures_its_own_way_is_refused(seeing: Any) -> None:
    other = copy.deepcopy(seeing)
    text, forward = other.base_model.language_model, other.base_model.language_model.forward

    def flat(*arguments: Any, **options: Any) -> Any:
        if "ragged" in options:
            options["position_ids"] = torch.arange(options["position_ids"].shape[-1]).expand(3, 1, -1)
        return forward(*arguments, **options)

    check_visual(other)
    text.forward = flat
    with pytest.raises(ModelError, match="differ from the model's own"):
        check_visual(other)


def test_a_family_that_is_not_supported_is_named(pristine: Any) -> None:
    other = copy.deepcopy(pristine)
    other.image_reader = ImageReader(None, 5)
    with pytest.raises(ModelError, match=r"Qwen3ForCausalLM has no get_rope_index.*Qwen2.5-VL"):
        check_visual(other)


def test_sampled_logprobs_are_the_models_own(seeing: Any, vl_dir: Path) -> None:
    """Log-probs of whole contexts by the model's own forward pass, one at a time, pixels and all."""
    policy = TransformersPolicy(seeing, tokenizer=load_tokenizer(vl_dir))
    reader = reader_of(seeing)
    assert reader is not None
    compared = 0
    for t in play(policy):
        row: list[int] = []
        images: list[ImagePart] = []
        for turn in t.turns:
            row += turn.prompt_ids
            images += [s.image for s in turn.prompt_images]
            at = len(row)
            row += turn.action_ids
            if reader.token_id in turn.action_ids:
                break  # a sampled placeholder is text to us; the model's own forward pass cannot know
            compared += 1
            ids = torch.tensor([row])
            with torch.no_grad():
                logits = seeing(
                    input_ids=ids,
                    mm_token_type_ids=(ids == reader.token_id).int(),
                    pixel_values=torch.cat([reader.read(i).pixels for i in images]),
                    image_grid_thw=torch.cat([reader.read(i).grid for i in images]),
                ).logits[0]
            logp = logits.log_softmax(-1)[range(at - 1, len(row) - 1), row[at:]]
            torch.testing.assert_close(logp, torch.tensor(turn.action_logprobs), atol=1e-4, rtol=0)
    assert compared > 6


@pytest.mark.parametrize("history", ["full", "window(1)"])
@pytest.mark.parametrize("budget", [10, 100_000])
def test_trainer_and_sampler_agree_also_from_a_file(
    seeing: Any, vl_dir: Path, tmp_path: Path, history: str, budget: int
) -> None:
    policy = TransformersPolicy(seeing, tokenizer=load_tokenizer(vl_dir), prefill_budget=budget)
    episodes = play(policy, history=history, tasks=3)
    assert len({s.image for t in episodes for turn in t.turns for s in turn.prompt_images}) >= 15
    write_jsonl(tmp_path / "t.jsonl", episodes)
    for batch in build_batch(episodes), build_batch(read_jsonl(tmp_path / "t.jsonl")):
        ours = score(seeing, batch, budget=budget).logprob
        torch.testing.assert_close(ours, batch.behaviour, atol=1e-4, rtol=0)


def test_the_kv_cache_is_kept_across_turns_and_never_across_pictures(
    seeing: Any, vl_dir: Path, codec: ChatCodec
) -> None:
    policy = TransformersPolicy(seeing, tokenizer=load_tokenizer(vl_dir))

    def ask(episode: str, seed: int) -> tuple[list[float], int]:
        context = ContextBuilder(codec, "rules").observe([image_part(noise(seed))])
        request = PolicyRequest(
            episode,
            0,
            "",
            (),
            context_ids=context.ids,
            context_images=context.images,
            sampling=Sampling(max_new_tokens=2),
        )
        before = policy.sampler.prefilled_tokens
        [action] = asyncio.run(policy.act([request]))
        return action.logprobs or [], policy.sampler.prefilled_tokens - before

    first, cost = ask("a", 1)
    assert ask("a", 1) == (pytest.approx(first, abs=1e-5), 1), (
        "the same context again: its last token is read for the logits"
    )
    other, cost_other = ask("a", 2)
    assert 1 < cost_other < cost, "the same ids with another picture: read again from the picture on"
    assert ask("fresh", 2) == (pytest.approx(other, abs=1e-5), cost)
    assert other != pytest.approx(first, abs=1e-3), "what the model answers depends on the picture"


def test_rows_with_equal_ids_and_other_pictures_are_not_merged(seeing: Any, codec: ChatCodec) -> None:
    def episode(name: str, seed: int) -> Trajectory:
        context = ContextBuilder(codec, "rules").observe([image_part(noise(seed))])
        turn = Turn(
            observation="",
            action="",
            prompt_ids=context.prompt_ids,
            prompt_images=context.prompt_images,
            action_ids=[7],
            action_logprobs=[0.0],
        )
        return Trajectory(id=name, group_id="g", env="e", seed=0, turns=[turn])

    batch = build_batch([episode("a", 1), episode("b", 2), episode("c", 1)])
    assert len(batch.rows) == 2
    assert batch.rows[0] == batch.rows[1]
    a, b, c = score(seeing, batch, budget=1000).logprob.tolist()
    assert a == c != pytest.approx(b, abs=1e-4)


def test_gradients_reach_the_vision_tower_and_do_not_depend_on_the_budget(seeing: Any, vl_dir: Path) -> None:
    batch = build_batch(play(TransformersPolicy(seeing, tokenizer=load_tokenizer(vl_dir))))

    def gradients(budget: int) -> list[torch.Tensor]:
        seeing.zero_grad(set_to_none=True)
        for micro in batch.microbatches(budget):
            score_microbatch(seeing, micro).logprob.sum().backward()
        return [p.grad.clone() for p in seeing.parameters() if p.grad is not None]

    one, many = gradients(100_000), gradients(1)
    seeing.zero_grad(set_to_none=True)
    assert len(one) == len(many) == len(list(seeing.parameters()))
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3 * max(1.0, float(a.abs().max())), rtol=0)


def test_positions_of_text_are_plain(seeing: Any) -> None:
    assert rope_positions(seeing, [1, 2, 3], []).tolist() == [[0, 1, 2]] * 3


# Training


def test_a_run_trains_on_pictures_and_its_prm_reads_words(vl_dir: Path, tmp_path: Path, trainer_of: Any) -> None:
    config = RunConfig(
        run_dir=str(tmp_path / "run"),
        iterations=2,
        model={"path": str(vl_dir)},
        env={"id": "VisualSokoban-v0", "kwargs": {"show": "image", "max_solution": 3}, "max_turns": 2},
        rollout={"groups": 2, "group_size": 3, "max_new_tokens": 3, "max_context_tokens": 2000},
        credit={"method": "oprl"},
        eval={"every": 0},
    )
    trainer = trainer_of(config)
    metrics = trainer.iterate()
    metrics = trainer.iterate()
    assert metrics["logprob_mismatch"] < 1e-4
    assert metrics["policy_grad_norm"] > 0
    batch = trainer.last.batch
    assert any(batch.images_of_row)
    assert trainer.last.signals.token_reward.shape == (batch.index.K,)
    stored = read_jsonl(tmp_path / "run" / "trajectories" / "iteration-000001.jsonl")
    assert (tmp_path / "run" / "trajectories" / stored[0].turns[0].prompt_images[0].image.path).exists()
    trainer.save()
    words = [in_words(t) for t in batch.trajectories]
    seen = build_batch(words)
    assert seen.index.K == batch.index.K
    assert not any(seen.images_of_row)
    assert torch.equal(seen.token_ids, batch.token_ids)
    board = text_of(words[0].turns[0].observation)
    assert board in trainer.tokenizer.decode(words[0].turns[0].prompt_ids)
    assert reader_of(trainer.model).token_id not in words[0].turns[0].prompt_ids
    blind = batch.trajectories[0].model_copy(deep=True)
    blind.turns[0].observation = [image_part(noise(0))]
    with pytest.raises(DataError, match="PRM reads text only"):
        trainer.judge.judge(build_batch([blind]), trainer.model)


def test_demonstrations_in_pictures_can_be_learnt(vl_dir: Path, tmp_path: Path) -> None:
    from agentrl.train.sft import sft

    episodes = play(load_policy("sokoban-solver"), "VisualSokoban-v0", show="image", max_solution=3)
    write_jsonl(tmp_path / "demos.jsonl", episodes)
    losses: list[float] = []
    sft(
        str(vl_dir),
        tmp_path / "demos.jsonl",
        str(tmp_path / "out"),
        epochs=6,
        lr=3e-3,
        on_step=lambda step: losses.append(step["loss"]),
    )
    assert losses[-1] < 0.8 * losses[0]
    policy = TransformersPolicy(str(tmp_path / "out"))
    assert len(play(policy)) == 4
    run(policy.aclose())
