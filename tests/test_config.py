"""Configuration: what is read, what is refused, and how the refusal reads."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from agentrl.config import RunConfig, config_sha256, dotted, dump_config, load_config
from agentrl.config.load import parse_assignments
from agentrl.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_file_and_overrides_all_defaults() -> None:
    assert load_config() == RunConfig()


def test_file_then_overrides_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "prm:\n  beta: 0.2\n  lr: 1e-4\niterations: 7\n")
    config = load_config(path, ["prm.beta=0.3", "prm.beta=0.4", "credit.options.alpha=0.5", "env.kwargs={size: 8}"])
    assert config.prm.beta == 0.4
    assert config.prm.lr == 1e-4
    assert config.iterations == 7
    assert config.credit.options == {"alpha": 0.5}
    assert config.env.kwargs == {"size": 8}


def test_environment_variables_stand_between_file_and_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "prm: {beta: 0.1, lr: 1e-4}\niterations: 3\n")
    monkeypatch.setenv("AGENTRL__PRM__BETA", "0.2")
    monkeypatch.setenv("AGENTRL__PRM__LR", "1e-3")
    monkeypatch.setenv("AGENTRL__ITERATIONS", "")
    config = load_config(path, ["prm.lr=1e-2"])
    assert (config.prm.beta, config.prm.lr, config.iterations) == (0.2, 0.01, 3)
    monkeypatch.setenv("AGENTRL__PRM__BTA", "1")
    with pytest.raises(ConfigError, match=r"'prm\.bta' in the environment variable AGENTRL__PRM__BTA"):
        load_config(path)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1.0e-4", ".0001", "0.0001", "1.e-4"])
def test_floats_are_read_as_people_write_them(text: str) -> None:
    (value,) = parse_assignments([f"x={text}"]).values()
    assert isinstance(value, float)
    assert value == 1e-4


def test_free_dictionaries_get_floats_too(tmp_path: Path) -> None:
    # No schema stands behind these: a string would go through to the credit method.
    config = load_config(write(tmp_path, "credit: {options: {floor: 1e-6, low: -.inf, word: e4, version: '1e4'}}"))
    assert config.credit.options == {"floor": 1e-6, "low": -math.inf, "word": "e4", "version": "1e4"}


def test_empty_sections_and_files_are_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "prm:\npairs:\n")) == RunConfig()
    assert load_config(write(tmp_path, "# nothing\n")) == RunConfig()


def test_override_of_an_anchored_mapping_changes_one_key_only(tmp_path: Path) -> None:
    path = write(tmp_path, "env:\n  kwargs: &k {size: 6}\n  eval_kwargs: *k\n")
    env = load_config(path, ["env.kwargs.size=8"]).env
    assert (env.kwargs, env.eval_kwargs) == ({"size": 8}, {"size": 6})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prm.bta=1", "unknown key 'prm.bta' on the command line; did you mean 'prm.beta'?"),
        ("beta=1", "unknown key 'beta' on the command line; did you mean 'prm.beta'?"),
        ("lr=1", "did you mean 'prm.lr' or 'critic.lr' or 'policy_update.lr'?"),
        ("PRM.beta=1", "unknown key 'PRM' on the command line; did you mean 'prm'?"),
        ("zzzz=1", "unknown key 'zzzz' on the command line; known: name, run_dir,"),
        ("prm.zzzz=1", "section 'prm' has init, beta,"),
        ("prm.beta=-1", "prm.beta=-1 on the command line: should be greater than 0"),
        ("prm.loss=dop", "prm.loss=dop on the command line: should be 'dpo', 'ipo' or 'ce'"),
        ("prm.lr=.inf", "prm.lr=inf on the command line: should be a finite number"),
        ("iterations=many", "iterations=many on the command line: should be a valid integer"),
        ("pairs.match_length=no", "pairs.match_length=false on the command line: should be int | None"),
        ("rollout.history=win", "rollout.history=win on the command line: history is 'full' or 'window(k)'"),
        ("policy_update.betas=[0.9]", "policy_update.betas.1"),
        ("prm=3", "prm=3 on the command line: a section, with the keys init, beta,"),
        ("prm.beta.x=1", "prm.beta={'x': 1} on the command line: should be a valid number"),
        ("prm.holdout=0.5", "set prm.updates > 1"),
        ("prm.beta", "'prm.beta' assigns nothing; write KEY=VALUE"),
        ("prm.lr=[", "value of 'prm.lr=[' is not YAML"),
    ],
)
def test_mistakes_name_the_key_the_place_and_the_way_out(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert message in str(error.value)
    assert "pydantic" not in str(error.value)
    assert "\n" not in str(error.value)


def test_mistakes_in_a_file_name_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\nprm:\n  beta: 0.1\n  bta: 0.2\n")
    with pytest.raises(ConfigError, match=r"unknown key 'prm.bta' in .*run.yaml line 4; did you mean 'prm.beta'\?"):
        load_config(path)
    path = write(tmp_path, "policy_update:\n  lr: -1e-3\nprm: {beta: x}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    first, second = sorted(str(error.value).splitlines())
    assert first.startswith("policy_update.lr=-0.001 in ")
    assert first.endswith("line 2: should be greater than 0")
    assert second.startswith("prm.beta=x in ")
    assert "line 3" in second


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "prm:\n  beta: 0.1\n  lr: 1e-5\n  beta: 0.2\n")
    with pytest.raises(ConfigError, match=r"'prm.beta' stands twice, in .* line 2 and line 4"):
        load_config(path)


@pytest.mark.parametrize("text", ["prm: [", "- a\n- b\n", "just text\n", "a: b: c\n", "\t x: 1\n"])
def test_files_that_are_no_settings(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(write(tmp_path, text))


def test_missing_file_offers_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"no configuration file .*rum\.yaml.*did you mean .*run\.yaml"):
        load_config(tmp_path / "rum.yaml")
    with pytest.raises(ConfigError, match="no folder"):
        load_config(tmp_path / "nowhere" / "run.yaml")


def test_dumped_configuration_reads_back_equal(tmp_path: Path) -> None:
    overrides = ["prm.lr=1e-7", "policy_update.dual_clip=null", "policy_update.betas=[0.8, 0.95]"]
    config = load_config(None, [*overrides, "credit.options={a: [1, 1.5, true, null, é]}"])
    # Strings that plain YAML would read as something else.
    config.name, config.run_dir, config.env.kwargs = "1e-4", "yes", {"word": "null", "number": "0x1F", "f": 1e-5}
    dump_config(config, tmp_path / "deep" / "config.yaml")
    assert load_config(tmp_path / "deep" / "config.yaml") == config


def test_sha256_is_of_what_decides_the_result() -> None:
    config = RunConfig()
    same = load_config(None, ["name=other", "run_dir=elsewhere", "log.tensorboard=false"])
    assert config_sha256(same) == config_sha256(config)
    for override in ("seed=1", "prm.beta=0.051", "credit.options.alpha=1", "eval.episodes=255"):
        assert config_sha256(load_config(None, [override])) != config_sha256(config)
    assert len(config_sha256(config)) == 64


def test_held_out_seeds_may_not_be_training_seeds():
    with pytest.raises(ConfigError, match="held-out tasks would be training tasks"):
        load_config(None, ["seed=1", "eval.seed=1000100"])
    load_config(None, ["seed=1", "eval.seed=1000100", "env.eval_kwargs={split: test}"])


def test_a_prm_of_its_own_cannot_be_rebased_on_the_policy():
    with pytest.raises(ConfigError, match=r"leave prm\.init out"):
        load_config(None, ["prm.reference=rebase", "prm.init=models/other"])


def test_dotted_keys_of_nested_settings() -> None:
    nested = {"a": {"b": 1, "c": {}}, "d": [{"e": 2}, 3], "f": []}
    assert dotted(nested) == {"a.b": 1, "a.c": {}, "d": [{"e": 2}, 3], "f": []}
    assert dotted(nested, lists=True) == {"a.b": 1, "a.c": {}, "d.0.e": 2, "d.1": 3, "f": []}
