"""LoRA: one frozen base under policy, PRM and reference; adapters that learn, are saved, and merge."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from helpers import episodes, played_by
from toys import run_config, timeless
from typer.testing import CliRunner

from agentrl.batch import build_batch, score
from agentrl.cli.app import app
from agentrl.config import RunConfig
from agentrl.config.load import checked
from agentrl.config.schema import LoRAConfig, PairConfig, PolicyUpdateConfig, PRMConfig
from agentrl.errors import ConfigError, DataError, UserError
from agentrl.models.load import fingerprint, load_model
from agentrl.models.lora import (
    add_adapter,
    check_base,
    has_adapter,
    load_adapted,
    load_adapter,
    load_trainable,
    merged,
    plain_weights,
    reference_of,
    stored_parameters,
    trained_parameters,
    twin,
    write_adapter,
)
from agentrl.prm import ImplicitPRM
from agentrl.train.checkpoint import checkpoints
from agentrl.train.export import export_model
from agentrl.train.metrics import read_metrics
from agentrl.train.policy_update import make_optimizer, update_policy
from agentrl.train.preflight import needed_bytes
from agentrl.train.trainer import Trainer, train

LORA = LoRAConfig(rank=4, alpha=8)
OPRL: dict[str, Any] = {
    "lora": {"rank": 4, "alpha": 8},
    "credit__method": "oprl",
    "prm": {"lr": 1e-2},
    "policy_update": {"lr": 1e-2},
}


@pytest.fixture
def adapted(model_dir: Path) -> Any:
    """The tiny model with a fresh adapter on every linear layer."""
    torch.manual_seed(0)
    return load_trainable(str(model_dir), device="cpu", dtype="float32", lora=LORA)


def shaken(model: Any, size: float = 0.05) -> Any:
    """`model`, its adapter moved away from where it changes nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stored_parameters(model):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def logprobs(model: Any, seed: int = 0) -> torch.Tensor:
    return score(model, build_batch(episodes(seed)), budget=10**6).logprob


def base_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors below every adapter, by their names in a plain model."""
    state = model.state_dict()
    return {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if "lora_" not in name}


# --- one base ---


def test_a_fresh_adapter_stands_on_every_linear_layer_and_changes_nothing(adapted: Any, model_dir: Path) -> None:
    plain = load_model(model_dir)
    assert torch.equal(logprobs(adapted), logprobs(plain))
    linear = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    carrying = {n.removesuffix(".base_layer") for n, _ in adapted.named_modules() if n.endswith(".base_layer")}
    assert carrying == linear
    assert all("lora_" in n for n, p in adapted.named_parameters() if p.requires_grad)
    assert not adapted.training


def test_policy_prm_and_reference_hold_the_base_once(adapted: Any) -> None:
    prm, reference = twin(adapted), reference_of(adapted)
    places = {name: tensor.data_ptr() for name, tensor in base_tensors(adapted).items()}
    for other in (prm, reference):
        assert {name: tensor.data_ptr() for name, tensor in base_tensors(other).items()} == places
    own = {p.data_ptr() for p in trained_parameters(adapted)}
    assert own.isdisjoint(p.data_ptr() for p in trained_parameters(prm))
    assert not trained_parameters(reference)
    assert not has_adapter(reference)


def test_one_model_s_adapter_never_acts_in_another(adapted: Any, model_dir: Path) -> None:
    untouched = logprobs(load_model(model_dir))
    prm, reference = twin(adapted), reference_of(adapted)
    shaken(prm)
    assert torch.equal(logprobs(adapted), untouched)
    assert not torch.allclose(logprobs(prm), untouched, atol=1e-3)
    shaken(adapted, 0.2)
    assert torch.equal(logprobs(reference), untouched)


def test_a_model_without_adapter_is_copied_whole(model: Any) -> None:
    other, frozen = twin(model), reference_of(model)
    assert {p.data_ptr() for p in other.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    assert all(p.requires_grad for p in other.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert merged(model) is model


def test_the_policy_gradient_reaches_adapters_alone(adapted: Any) -> None:
    made = played_by(adapted, episodes(1))
    batch, config = build_batch(made), PolicyUpdateConfig(lr=1e-2)
    before = fingerprint(reference_of(adapted))
    update_policy(adapted, make_optimizer(adapted, config), batch, torch.randn(batch.index.K), config)
    assert {name for name, p in adapted.named_parameters() if p.grad is not None} == {
        name for name, p in adapted.named_parameters() if "lora_" in name
    }
    assert fingerprint(reference_of(adapted)) == before
    assert not torch.equal(logprobs(adapted), logprobs(reference_of(adapted)))


def test_the_prm_learns_on_the_policy_s_base(adapted: Any) -> None:
    made = played_by(adapted, episodes(2))
    batch = build_batch(made)
    prm = ImplicitPRM(twin(adapted), adapted, PRMConfig(lr=1e-2, beta=0.5, updates=20), PairConfig())
    outcome = torch.tensor([t.outcome for t in made])
    acts, base = logprobs(adapted), fingerprint(reference_of(adapted))
    first = prm.step(batch, outcome, adapted, (), 0)[1]
    assert first["prm_moved"] > 0
    after = prm.judge(batch, adapted)[1]
    assert after["pair_accuracy"] > first["pair_accuracy"]
    assert after["pair_margin"] > 0
    assert torch.equal(logprobs(adapted), acts)
    assert fingerprint(reference_of(adapted)) == base


def test_a_rebased_reference_takes_the_policy_s_adapter(adapted: Any) -> None:
    made = played_by(adapted, episodes(3))
    batch, outcome = build_batch(made), torch.tensor([t.outcome for t in made])
    config = PRMConfig(lr=1e-3, reference="rebase", rebase_every=1)
    prm = ImplicitPRM(twin(adapted), adapted, config, PairConfig())
    base = fingerprint(reference_of(adapted))
    shaken(adapted)
    assert not torch.equal(logprobs(prm.reference), logprobs(adapted))
    prm.step(batch, outcome, adapted, (), 1)
    assert torch.equal(logprobs(prm.reference), logprobs(adapted))
    assert fingerprint(reference_of(adapted)) == base


def test_a_half_precision_base_has_adapters_in_full(model_dir: Path) -> None:
    model = load_trainable(str(model_dir), device="cpu", dtype="bfloat16", lora=LORA)
    assert {t.dtype for t in base_tensors(model).values() if t.is_floating_point()} == {torch.bfloat16}
    assert {p.dtype for p in trained_parameters(model)} == {torch.float32}
    made = played_by(model, episodes(4))
    config = PolicyUpdateConfig(lr=1e-2)
    batch = build_batch(made)
    metrics = update_policy(model, make_optimizer(model, config), batch, torch.randn(batch.index.K), config)
    assert metrics["logprob_mismatch"] == 0
    assert metrics["policy_grad_norm"] > 0
    whole = merged(model)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    assert {t.dtype for t in base_tensors(model).values() if t.is_floating_point()} == {torch.bfloat16}
    assert whole.get_input_embeddings().weight is whole.get_output_embeddings().weight


# --- files ---


def test_a_merged_model_is_a_plain_one_with_the_same_log_probs(adapted: Any) -> None:
    shaken(adapted)
    whole = merged(adapted)
    assert not any("lora" in name for name in whole.state_dict())
    torch.testing.assert_close(logprobs(whole), logprobs(adapted), atol=1e-5, rtol=0)
    assert not torch.allclose(logprobs(whole), logprobs(reference_of(adapted)), atol=1e-2)
    assert fingerprint(plain_weights(adapted)) == fingerprint(whole)


def test_an_adapter_is_read_back_exactly_here_and_by_peft(adapted: Any, model_dir: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    shaken(adapted)
    write_adapter(adapted, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix in (".json", ".safetensors")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
    ]
    fresh = load_trainable(str(model_dir), device="cpu", dtype="float32", lora=LORA)
    load_adapter(fresh, tmp_path)
    assert torch.equal(logprobs(fresh), logprobs(adapted))
    assert torch.equal(logprobs(load_adapted(tmp_path)), logprobs(adapted))
    theirs = PeftModel.from_pretrained(load_model(model_dir), tmp_path).merge_and_unload()
    torch.testing.assert_close(logprobs(theirs), logprobs(adapted), atol=1e-5, rtol=0)


def test_an_adapter_over_another_base_or_of_another_rank_is_refused(
    adapted: Any, model_dir: Path, model: Any, tmp_path: Path
) -> None:
    write_adapter(adapted, tmp_path)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    with pytest.raises(UserError, match="give the model that the run was started with"):
        check_base(add_adapter(model, LORA, "other"), tmp_path)
    wider = load_trainable(str(model_dir), device="cpu", dtype="float32", lora=LoRAConfig(rank=5))
    with pytest.raises(UserError, match="another rank"):
        load_adapter(wider, tmp_path)


# --- what cannot work ---


def test_targets_that_are_not_there_are_refused_with_those_that_are(model: Any) -> None:
    with pytest.raises(UserError, match=r"query_key.*linear layers here: .*q_proj"):
        add_adapter(model, LoRAConfig(rank=2, targets=["query_key"]), "m")


def test_tied_embeddings_carry_no_adapter(model: Any) -> None:
    for target in ("embed_tokens", "lm_head"):
        with pytest.raises(UserError, match="one tensor"):
            add_adapter(twin(model), LoRAConfig(rank=2, targets=[target]), "m")


def test_named_targets_alone_carry_an_adapter(model: Any) -> None:
    add_adapter(model, LoRAConfig(rank=2, targets=["q_proj", "v_proj"]), "m")
    assert {n.split(".")[4] for n, _ in model.named_parameters() if "lora_" in n} == {"q_proj", "v_proj"}


def test_dropout_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora.dropout=0.1: the trainer's log-probs would differ"):
        checked(RunConfig, {"lora": {"rank": 8, "dropout": 0.1}})


def test_without_peft_the_run_says_how_to_get_it(warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr("agentrl.models.lora.find_spec", lambda name: None if name == "peft" else there(name))
    with pytest.raises(UserError, match=r"pip install 'agentrl\[lora\]'"):
        train(run_config(tmp_path / "run", warm, **OPRL))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_needs_room_for_adapters_and_one_merged_model(adapted: Any, model: Any) -> None:
    size = sum(p.numel() * 4 for p in adapted.parameters())
    small = sum(p.numel() * 4 for p in trained_parameters(adapted))
    assert needed_bytes([adapted, twin(adapted)], [], 2, 0) == 3 * 6 * small + 2 * size


# --- runs ---


KL = OPRL | {"policy_update": {"lr": 1e-2, "kl_coef": 0.01}, "prm": {"lr": 1e-2, "reference": "frozen"}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, warm: Path) -> Path:
    """Folder of a finished OPRL run with LoRA, a KL term and a frozen reference."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    train(run_config(folder, warm, **KL))
    return folder


def test_a_run_keeps_adapters_and_leaves_a_merged_model(run: Path, warm: Path) -> None:
    last = checkpoints(run / "checkpoints")[-1]
    for name in ("policy", "prm"):
        assert {p.name for p in (last / name).glob("*.safetensors")} == {"adapter_model.safetensors"}
        assert json.loads((last / name / "base.json").read_text()) == {
            "path": str(warm),
            "fingerprint": fingerprint(load_model(warm)),
            "dtype": "float32",
        }
    policy, prm = load_adapted(last / "policy"), load_adapted(last / "prm")
    assert fingerprint(load_model(run / "model")) == fingerprint(merged(policy))
    torch.testing.assert_close(logprobs(load_model(run / "model")), logprobs(policy), atol=1e-5, rtol=0)
    assert not torch.equal(logprobs(prm), logprobs(policy))
    for record in read_metrics(run):
        assert record["prm_moved"] > 0
        assert record["logprob_mismatch"] < 1e-4


def test_after_two_iterations_the_base_is_what_it_was(
    warm: Path, tmp_path: Path, trainer_of: Callable[..., Trainer]
) -> None:
    trainer = trainer_of(run_config(tmp_path, warm, **KL))
    trainer.iterate()
    trainer.iterate()
    untouched = load_model(warm)
    assert fingerprint(base_tensors(trainer.model)) == fingerprint(untouched)
    assert trainer.last is not None
    batch = trainer.last.batch
    expected = score(untouched, batch, budget=10**6).logprob
    torch.testing.assert_close(trainer.last.signals.reference_logprob, expected, atol=1e-5, rtol=0)
    assert trainer.judge.prm is not None
    assert trainer.judge.prm.reference is trainer.judge.initial
    places = {t.data_ptr() for t in base_tensors(trainer.model).values()}
    for model in (trainer.judge.prm.model, trainer.judge.initial):
        assert {t.data_ptr() for t in base_tensors(model).values()} == places


def test_a_resumed_run_equals_an_unbroken_one(run: Path, warm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(checkpoints(folder / "checkpoints")[-1])
    train(run_config(folder, warm, **KL), resume=True)
    ours, theirs = ([timeless(record) for record in read_metrics(path)] for path in (folder, run))
    assert ours == theirs
    assert (folder / "model/model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()


def test_a_run_does_not_resume_over_another_base(run: Path, warm: Path, tmp_path: Path) -> None:
    other, folder = tmp_path / "base", tmp_path / "run"
    shutil.copytree(warm, other)
    train(run_config(folder, other, **KL | {"iterations": 1}))
    shutil.copy(run / "model/model.safetensors", other)
    with pytest.raises(UserError, match="give the model that the run was started with"):
        train(run_config(folder, other, **KL | {"iterations": 1}), resume=True)


def test_a_run_with_a_broken_adapter_says_which_checkpoint_to_remove(run: Path, warm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (checkpoints(folder / "checkpoints")[-1] / "prm/adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(DataError, match="remove it to resume from the one before"):
        train(run_config(folder, warm, **KL), resume=True)


def test_a_critic_has_an_adapter_of_its_own(warm: Path, tmp_path: Path, trainer_of: Callable[..., Trainer]) -> None:
    trainer = trainer_of(run_config(tmp_path, warm, lora=OPRL["lora"], credit__method="ppo", critic={"lr": 1e-2}))
    trainer.iterate()
    critic = trainer.judge.critic
    assert critic is not None
    assert fingerprint(base_tensors(critic.model)) == fingerprint(load_model(warm))
    assert not torch.equal(logprobs(critic.model), logprobs(trainer.model))
    assert trainer.save().joinpath("critic/adapter_model.safetensors").exists()


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("centred", [False, True])
def test_a_frozen_prm_reference_and_the_kl_term_share_one_forward_pass(
    lora: int, centred: bool, warm: Path, tmp_path: Path, trainer_of: Callable[..., Trainer], monkeypatch: Any
) -> None:
    settings = KL | {"lora": {"rank": lora}, "prm": {"lr": 1e-2, "reference": "frozen", "centred": centred}}
    trainer = trainer_of(run_config(tmp_path, warm, **settings))
    passes: list[Any] = []

    def counted(model: Any, *arguments: Any, **options: Any) -> Any:
        passes.append(model)
        return score(model, *arguments, **options)

    monkeypatch.setattr("agentrl.prm.implicit.score", counted)
    monkeypatch.setattr("agentrl.train.judge.score", counted)
    trainer.iterate()
    assert trainer.last is not None
    assert passes.count(trainer.judge.initial) == 1
    alone = score(trainer.judge.initial, trainer.last.batch, budget=trainer.judge.budget).logprob
    assert torch.equal(trainer.last.signals.reference_logprob, alone)


def test_an_export_is_a_model_that_transformers_loads(run: Path, warm: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    last = checkpoints(run / "checkpoints")[-1]
    for part, out in (("policy", tmp_path / "policy"), ("prm", tmp_path / "prm")):
        facts = export_model(run, out, part=part)
        assert facts["merged into"] == str(warm)
        plain = AutoModelForCausalLM.from_pretrained(out, attn_implementation="agentrl").eval()
        torch.testing.assert_close(logprobs(plain), logprobs(load_adapted(last / part)), atol=1e-5, rtol=0)
        AutoTokenizer.from_pretrained(out)
    assert fingerprint(load_model(tmp_path / "policy")) == fingerprint(load_model(run / "model"))


def test_an_export_follows_its_base_to_another_place(run: Path, warm: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(warm, moved)
    export_model(run, tmp_path / "out", base=str(moved))
    assert fingerprint(load_model(tmp_path / "out")) == fingerprint(load_model(run / "model"))
    with pytest.raises(UserError, match="give the model that the run was started with"):
        export_model(run, tmp_path / "other", base=str(run / "model"))


def test_an_older_checkpoint_and_the_adapter_alone(run: Path, tmp_path: Path) -> None:
    older = checkpoints(run / "checkpoints")[0]
    export_model(run, tmp_path / "adapter", iteration=2, adapter=True)
    assert torch.equal(logprobs(load_adapted(tmp_path / "adapter")), logprobs(load_adapted(older / "policy")))
    with pytest.raises(UserError, match="it is not empty"):
        export_model(run, tmp_path / "adapter", adapter=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"iteration": 9}, "there are: iteration-000002"), ({"part": "pmr"}, "no part 'pmr'; it has: policy, prm")],
)
def test_what_a_run_does_not_have_cannot_be_exported(run: Path, tmp_path: Path, options: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        export_model(run, tmp_path / "out", **options)
    with pytest.raises(UserError, match="holds no checkpoint"):
        export_model(tmp_path, tmp_path / "out")


def test_the_command_exports_and_names_what_it_wrote(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "merged into" in result.output
    assert (tmp_path / "out/config.json").exists()


def test_a_lora_run_learns_and_its_prm_orders_new_episodes(hesitant: Path, tmp_path: Path) -> None:
    config = run_config(
        tmp_path / "run",
        hesitant,
        iterations=16,
        env={"id": "Echo-v0"},
        rollout={"groups": 8, "group_size": 8, "history": "full", "max_new_tokens": 3},
        checkpoint__every=16,
        lora={"rank": 8, "alpha": 16},
        credit={"method": "oprl", "options": {"alpha": 0.3}},
        prm={"lr": 5e-3},
        policy_update={"lr": 5e-3},
    )
    train(config)
    records = read_metrics(tmp_path / "run")
    success = [record["success"] for record in records]
    assert fmean(success[-4:]) > 2 * fmean(success[:4])
    accuracy = [record["pair_accuracy"] for record in records if record.get("pair_accuracy") is not None]
    assert fmean(accuracy[-6:]) > 0.75
