"""`agentrl explain`: settings, plan, memory, cost and warnings of a run that has not begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from agentrl.cli import app
from agentrl.config import load_config
from agentrl.config.schema import LoRAConfig
from agentrl.models import attention
from agentrl.models.attention import PackedSequences, run_ragged
from agentrl.models.load import load_model
from agentrl.models.lora import add_adapter
from agentrl.train import estimate, footprint

ROOT = Path(__file__).resolve().parents[1]


def config_of(model_dir: Path, *overrides: str) -> Any:
    return load_config(ROOT / "configs" / "sokoban_oprl.yaml", [f"model.path={model_dir}", *overrides])


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["explain", *map(str, arguments)], env={"COLUMNS": "80"})


def test_the_shape_is_that_of_the_model(model_dir: Path) -> None:
    shape, model = estimate.read_shape(str(model_dir)), load_model(model_dir)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    matrices = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    assert shape.body == sum(p.numel() for p in matrices)


def test_models_are_those_that_the_method_needs(model_dir: Path) -> None:
    assert estimate.models_of(config_of(model_dir)) == {"prm": True, "reference": False}
    grpo = config_of(model_dir, "credit={method: grpo}", "policy_update.kl_coef=0")
    assert estimate.models_of(grpo) == {}
    assert estimate.models_of(config_of(model_dir, "credit={method: ppo}", "policy_update.kl_coef=0")) == {
        "critic": True
    }


def test_memory_grows_with_what_holds_it(model_dir: Path) -> None:
    def items(*overrides: str) -> dict[str, float]:
        config = config_of(model_dir, *overrides)
        work = estimate.work_of(config, estimate.Lengths(10, 20, 0, 2, measured=True))
        return {item.name: item.value for item in footprint.memory(config, estimate.read_shape(str(model_dir)), work)}

    P = estimate.read_shape(str(model_dir)).parameters
    oprl, grpo = items(), items("credit={method: grpo}", "policy_update.kl_coef=0")
    assert (oprl["weights"], grpo["weights"]) == (12 * P, 4 * P)
    assert (oprl["optimiser"], grpo["optimiser"]) == (16 * P, 8 * P)
    half = items("policy_update.tokens_per_microbatch=8192")
    assert half["activations"] == oprl["activations"] / 2
    assert items("rollout.concurrency=96")["kv cache"] == oprl["kv cache"] / 2
    assert items("lora.rank=2")["optimiser"] < oprl["optimiser"] / 2


def kept_bytes(layers: int, lengths: tuple[int, ...], head_norms: bool, rank: int, dtype: torch.dtype) -> int:
    """Bytes that a forward pass keeps for its backward pass, parameters left out."""
    settings: Any = (Qwen3Config if head_norms else LlamaConfig)(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        attn_implementation="agentrl",
    )
    model: Any = (Qwen3ForCausalLM if head_norms else LlamaForCausalLM)(settings)
    if rank:
        model = add_adapter(model, LoRAConfig(rank=rank), "base")
    if dtype != torch.float32:
        model.compute_dtype = dtype
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # alive, so that no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            kept[address] = tensor
        return tensor

    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run_ragged(model, torch.zeros_like(positions), positions, PackedSequences(lengths))
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("head_norms", [False, True], ids=["llama", "qwen3"])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_keeps_what_the_estimate_counts(head_norms: bool, rank: int, dtype: torch.dtype) -> None:
    if rank:
        pytest.importorskip("peft")
    few, many = (10,) * 8 + (12,), (10,) * 16 + (12,) * 2

    def per_token(layers: int) -> float:  # a difference: what does not grow with the tokens falls out
        sizes = [kept_bytes(layers, lengths, head_norms, rank, dtype) for lengths in (few, many)]
        return (sizes[1] - sizes[0]) / (sum(many) - sum(few))

    shape = estimate.Shape(0, 1, 64, 128, 64, 96, 64, head_norms)
    expected = footprint.layer_bytes(shape, rank, 4 if dtype == torch.float32 else 2)
    assert per_token(3) - per_token(2) == pytest.approx(expected, rel=0.03)


def test_the_largest_of_what_takes_turns_counts(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def items(*overrides: str) -> dict[str, float]:
        config = config_of(model_dir, *overrides)
        work = estimate.work_of(config, estimate.Lengths(10, 20, 0, 2, measured=True))
        found = footprint.memory(config, estimate.read_shape(str(model_dir)), work)
        return {item.name: item.value for item in found} | {"peak": footprint.peak(found)}

    cpu, gpu = items(), items("model.device=cuda")
    assert "allocator" in cpu
    assert "allocator" not in gpu, "nothing is known of it"
    assert gpu["step"] == gpu["gradients"]
    held = cpu["weights"] + cpu["optimiser"]
    learning = ("gradients", "activations", "backward", "logits", "allocator")
    assert cpu["peak"] == pytest.approx(held + sum(cpu[name] for name in learning))
    tiny = items("policy_update.tokens_per_microbatch=16")
    assert tiny["peak"] == pytest.approx(held + sum(tiny[name] for name in learning))
    assert tiny["allocator"] > tiny["kv cache"], "a small one is not handed back before the update"
    monkeypatch.setattr(attention, "WORTH_TRIMMING", 0)
    tiny = items("policy_update.tokens_per_microbatch=16")
    assert tiny["peak"] == pytest.approx(held + tiny["kv cache"])


def test_the_cache_has_room_for_the_longest_episode(model_dir: Path) -> None:
    config = config_of(model_dir, "rollout.history=full")
    work = estimate.work_of(config, estimate.Lengths(10, 20, 5, 2, measured=True, longest=14))
    assert (work.row, work.context) == (225, 5 + 14 * 22)


def test_work_counts_tokens_by_history(model_dir: Path) -> None:
    lengths = estimate.Lengths(10, 20, 5, 2, measured=True)
    one_turn = estimate.work_of(config_of(model_dir), lengths)
    assert (one_turn.sampled, one_turn.row, one_turn.rows) == (192 * 20, 27, 192 * 10 * 27)
    whole = estimate.work_of(config_of(model_dir, "rollout.history=full"), lengths)
    assert (whole.row, whole.rows) == (225, 192 * 225)


def test_what_rows_begin_with_alike_is_counted_once_on_a_cpu(model_dir: Path) -> None:
    lengths = estimate.Lengths(10, 20, 5, 2, measured=True)
    sizes = ["rollout.groups=6", "rollout.group_size=4"]
    windowed = estimate.work_of(config_of(model_dir, *sizes), lengths)
    assert windowed.read == windowed.rows - (24 * 10 - 1) * 5
    whole = estimate.work_of(config_of(model_dir, *sizes, "rollout.history=full"), lengths)
    assert whole.read == whole.rows - 23 * 5 - (24 - 6) * 20
    gpu = estimate.work_of(config_of(model_dir, *sizes, "rollout.history=full", "model.device=cuda"), lengths)
    assert gpu.read == gpu.rows == whole.rows


def test_cost_is_two_operations_a_parameter_and_token(model_dir: Path) -> None:
    settings = ["credit={method: grpo}", "policy_update.kl_coef=0"]
    config = config_of(model_dir, *settings, "policy_update.minibatches=1")
    shape = estimate.read_shape(str(model_dir))
    work = estimate.work_of(config, estimate.Lengths(10, 20, 0, 2, measured=True))
    found = {item.name: item.value for item in estimate.cost(config, shape, work)}
    body = 2 * shape.body * work.read
    head = 2 * shape.hidden * shape.vocab * work.sampled
    attention = 2 * shape.layers * shape.heads_width * work.row * work.read
    assert found == {"sampling": body + head + attention, "policy": pytest.approx(3 * (body + head + attention))}
    several = estimate.cost(config_of(model_dir, *settings, "policy_update.minibatches=4"), shape, work)
    assert several[-1].value == pytest.approx(4 * (body + head + attention)), "log-probs before the first step"


def test_no_more_is_sampled_than_an_episode_may(model_dir: Path) -> None:
    lengths = estimate.Lengths(10, 20, 5, 2, measured=True)
    assert estimate.work_of(config_of(model_dir, "rollout.max_episode_tokens=7"), lengths).sampled == 192 * 7


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["rollout.group_size=1"], "refused at the start: rollout.group_size=1 with credit.method=oprl"),
        ([], "rollout.history=window(0) with a PRM: the policy sees the current observation alone"),
        (["rollout.group_size=2"], "most groups will be all successes or all failures"),
        (["eval.every=0"], "no held-out evaluation"),
        (["eval.episodes=25"], "+-20 points"),
        (["rollout.tasks=4"], "a task occurs several times"),
        (["rollout.temperature=0.7"], "rollout.temperature=0.7"),
        (["policy_update.epochs=5"], "5 epochs x 4 mini-batches"),
        (["prm.reference=behaviour"], "cancels out of the step reward"),
    ],
)
def test_warnings_name_the_setting_and_the_way_out(model_dir: Path, overrides: list[str], warning: str) -> None:
    assert any(warning in one for one in estimate.warnings_of(config_of(model_dir, *overrides)))


def test_a_sound_run_has_no_warning(model_dir: Path) -> None:
    assert estimate.warnings_of(config_of(model_dir, "rollout.history=full")) == []


def test_the_command_explains_a_run(model_dir: Path, tmp_path: Path) -> None:
    path = ROOT / "configs" / "sokoban_oprl.yaml"
    result = run(path, f"model.path={model_dir}", "--episodes", 4, "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["lengths"]["measured"]
    assert 10 < found["lengths"]["prompt"] < 200
    assert found["memory_bytes"]["peak"] > found["memory_bytes"]["weights"] > 0
    assert set(found["flops"]) == {"sampling", "reference", "prm", "policy"}
    assert "prm.beta" not in found["settings"], "the default is 0.05"
    assert found["settings"]["prm.reference"] == "frozen"
    assert "24 groups x 8 = 192 episodes" in result.output
    assert max(map(len, result.stdout.splitlines()[:-2])) <= 80
    everything = run(path, f"model.path={tmp_path / 'nowhere'}", "--all", "--episodes", 0)
    assert "prm.beta" in everything.output
    assert "No estimate of memory and cost" in everything.output
    refused = run(path, "rollout.top_p=0.9")
    assert (refused.exit_code, "every importance ratio" in " ".join(refused.output.split())) == (2, True)


def test_settings_are_shown_as_they_are_written(model_dir: Path) -> None:
    result = run(
        ROOT / "configs" / "sokoban_oprl.yaml", f"model.path={model_dir}", "env.instructions='Question: [b] a :cat:'"
    )
    assert result.exit_code == 0, result.output
    assert "Question: [b] a :cat:" in result.output


def test_a_model_that_is_nowhere_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no folder "models" here: the name could be one of the hub
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(ROOT / "configs" / "sokoban_oprl.yaml", "model.path=models/nothere", "--episodes", 2)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("No estimate")]
    assert "no directory 'models/nothere', and as a hub name its configuration could not be loaded" in line
    assert "hf download models/nothere" in line
    (tmp_path / "models").mkdir()
    result = run(ROOT / "configs" / "sokoban_oprl.yaml", "model.path=models/nothere", "--episodes", 2)
    assert "no model directory 'models/nothere' (agentrl init-model makes one" in result.output
