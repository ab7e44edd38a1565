"""`agentrl explain`: settings, plan, memory, cost and warnings of a run that has not begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentrl.cli import app
from agentrl.config import load_config
from agentrl.models.load import load_model
from agentrl.train import estimate

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
        return {item.name: item.value for item in estimate.memory(config, estimate.read_shape(str(model_dir)), work)}

    P = estimate.read_shape(str(model_dir)).parameters
    oprl, grpo = items(), items("credit={method: grpo}", "policy_update.kl_coef=0")
    assert (oprl["weights"], grpo["weights"]) == (12 * P, 4 * P)
    assert (oprl["optimiser"], grpo["optimiser"]) == (16 * P, 8 * P)
    half = items("policy_update.tokens_per_microbatch=8192")
    assert half["activations"] == oprl["activations"] / 2
    assert items("rollout.concurrency=96")["kv cache"] == oprl["kv cache"] / 2
    assert items("lora.rank=2")["optimiser"] < oprl["optimiser"] / 2


def test_work_counts_tokens_by_history(model_dir: Path) -> None:
    lengths = estimate.Lengths(10, 20, 5, 2, measured=True)
    one_turn = estimate.work_of(config_of(model_dir), lengths)
    assert (one_turn.sampled, one_turn.row, one_turn.read) == (192 * 20, 27, 192 * 10 * 27)
    whole = estimate.work_of(config_of(model_dir, "rollout.history=full"), lengths)
    assert (whole.row, whole.read) == (225, 192 * 225)


def test_cost_is_two_operations_a_parameter_and_token(model_dir: Path) -> None:
    config = config_of(model_dir, "credit={method: grpo}", "policy_update.kl_coef=0")
    shape = estimate.read_shape(str(model_dir))
    work = estimate.work_of(config, estimate.Lengths(10, 20, 0, 2, measured=True))
    found = {item.name: item.value for item in estimate.cost(config, shape, work)}
    body = 2 * shape.body * work.read
    head = 2 * shape.hidden * shape.vocab * work.sampled
    attention = 2 * shape.layers * shape.heads_width * work.row * work.read
    assert found == {"sampling": body + head + attention, "policy": pytest.approx(3 * (body + head + attention))}


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
    everything = run(path, "--all", "--episodes", 0)
    assert "prm.beta" in everything.output
    assert "No estimate of memory and cost" in everything.output
    refused = run(path, "rollout.top_p=0.9")
    assert (refused.exit_code, "every importance ratio" in " ".join(refused.output.split())) == (2, True)
