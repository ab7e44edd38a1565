"""`VLLMPolicy`: vLLM acts, token in, token out."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch

from agentrl.errors import PolicyFailure, UserError
from agentrl.models.chat import ChatCodec
from agentrl.models.load import check_model_dir, distinct, files_fingerprint, load_tokenizer, save_model
from agentrl.models.lora import has_adapter, merged, reference_of, write_adapter
from agentrl.policy import ModelPolicy, PolicyAction, PolicyRequest
from policies.vllm.engine import INSTALL, MODEL_NAME, Settings, check_installed, check_python, sampling_params
from policies.vllm.local import LocalEngine
from policies.vllm.remote import RemoteEngine
from policies.vllm.server import ServerProcess
from policies.vllm.transfer import Exchange

_RECHECK = {"float32": 1e-3, "bfloat16": 0.5}
"""Nats, by precision: how far the log-probs of a server that was started again may be off those of the one before."""
_KEY = "VLLM_API_KEY"
"""What vLLM itself calls the variable with a server's key."""
_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


class VLLMPolicy(ModelPolicy):
    """A causal LM sampled by vLLM.

    Args:
        model: a model directory or hub name, or a loaded model (then `tokenizer` too), whose weights go to vLLM.
        tokenizer: for a loaded model.
        mode: ``server``: started and watched here, in a process group of its own. ``local``: in this process.
        url: of a server that runs already, instead: ``http://HOST:PORT``.
        served_model: the name of the model at `url`, where it is neither that of `model` nor of its directory.
        key_env: environment variable with the key of the server at `url`; unset: none is sent. It is read for each
            request and never stored.
        dtype: of the engine's weights and passes; None: of the loaded model, or float32.
        python: interpreter of the environment that vLLM is installed in; None: this one. Server only.
        threads: threads of the engine on a CPU; None: vLLM's choice.
        kv_cache_gib: memory for keys and values, GiB; None: 1 on a CPU, vLLM's choice on a GPU.
        gpu_memory_utilization: share of a GPU's memory that vLLM may take in all.
        max_model_len: longest context with its answer, in tokens; None: the model's own.
        max_num_seqs: requests side by side.
        lora_rank: largest rank of adapters that `load_lora` will bring; 0: none.
        eager: no compilation; None: on a CPU.
        transfer: how weights reach a server: ``file`` (shared memory); experimental, not run on a GPU yet: ``ipc``
            (same GPU), ``nccl`` (another GPU).
        exchange: folder that this process and a server at `url` can both read, by the same path: weights and adapters
            reach it there. None: they do not.
        startup_s: seconds for a server to become ready.
        answer_s: seconds for one request; a server that takes longer is ended, and another one started.
        restarts: servers that may be started after the first.
        log_file: where the server's output goes; None: kept until the end, and shown where it fails.
        engine_args: further arguments of vLLM's engine, by their Python names.

    Raises:
        UserError: no model, vLLM missing or of another version, not enough memory, nobody at `url`, another model or
            no key there, or options that exclude each other.
        ModelError: the directory lacks something.
    """

    name = "vllm"
    batched = False
    """Each request for itself: vLLM puts them together, step by step."""

    def __init__(
        self,
        model: Any = None,
        *,
        tokenizer: Any = None,
        mode: Literal["server", "local"] = "server",
        url: str | None = None,
        served_model: str | None = None,
        key_env: str = _KEY,
        dtype: Literal["float32", "bfloat16"] | None = None,
        python: str | None = None,
        threads: int | None = None,
        kv_cache_gib: float | None = None,
        gpu_memory_utilization: float | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 128,
        lora_rank: int = 0,
        eager: bool | None = None,
        transfer: Literal["file", "ipc", "nccl"] = "file",
        exchange: str | None = None,
        startup_s: float = 600.0,
        answer_s: float = 300.0,
        restarts: int = 3,
        log_file: str | None = None,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        if model is None or model == "":
            raise UserError("the vllm policy needs a model: give a directory (--model DIR, or model.path=DIR)")
        if mode not in ("server", "local") or transfer not in ("file", "ipc", "nccl"):
            raise UserError(f"mode={mode!r}, transfer={transfer!r}: server or local; file, ipc or nccl")
        if mode == "local" and (url is not None or python is not None):
            raise UserError("mode=local runs vLLM in this process: url and python have no meaning there")
        if served_model is not None and url is None:
            raise UserError(f"served_model={served_model!r} is the model's name at a url, and none is given")
        if transfer != "file":
            _check_sender(transfer, mode)
        self._folder = tempfile.TemporaryDirectory(prefix="agentrl-vllm-")
        self._adapters: list[Path] = []
        """Folders of ours with adapters in them; the last is loaded."""
        self._adapters_in: Path | None = Path(self._folder.name)
        """None: there is no place that the server can read."""
        self._live: dict[str, set[asyncio.Future[PolicyAction]]] = {}
        on_cpu = not torch.cuda.is_available()
        self.lora_rank, self.version = lora_rank, 0
        try:
            directory, tokenizer, found = self._prepare(model, tokenizer)
            self.chat = ChatCodec(tokenizer)
            if on_cpu and url is None:
                _check_heads(directory)
            self.settings = Settings(
                model=directory,
                dtype=dtype or found,
                threads=threads,
                kv_cache_gib=1.0 if kv_cache_gib is None and on_cpu else kv_cache_gib,
                gpu_memory_utilization=gpu_memory_utilization,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                lora_rank=lora_rank,
                eager=on_cpu if eager is None else eager,
                whole_prompts=on_cpu,
                transfer=transfer,
                extra=engine_args or {},
            )
            if mode == "local":
                self.engine: LocalEngine | RemoteEngine = LocalEngine(self.settings)
            elif url is not None:
                shared = Exchange(0, Path(exchange)) if exchange is not None else None
                self._adapters_in = None if shared is None else shared.folder
                self.engine = RemoteEngine(
                    url=url,
                    model=_name_of(model),
                    served_model=served_model,
                    key_env=key_env,
                    exchange=shared,
                    transfer=transfer,
                    answer_s=answer_s,
                )
            else:
                self.engine = self._make_server(python, log_file, startup_s, answer_s, restarts, transfer)
            if has_adapter(model) and lora_rank:
                self.load_lora(model, 0)
        except BaseException:
            self._drop_adapters()
            self._folder.cleanup()
            raise

    def _prepare(self, model: Any, tokenizer: Any) -> tuple[str, Any, str]:
        """Returns the directory that vLLM reads, the tokenizer, and the model's precision."""
        if isinstance(model, str) or hasattr(model, "__fspath__"):
            self.name = str(model)
            check_model_dir(model)
            path = Path(model).expanduser()
            self._bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            return str(path) if path.is_dir() else str(model), load_tokenizer(model), "float32"
        plain = reference_of(model) if has_adapter(model) and self.lora_rank else merged(model)
        self._bytes = sum(tensor.numel() * tensor.element_size() for tensor in distinct(plain).values())
        save_model(plain, tokenizer, Path(self._folder.name) / "model")
        found = getattr(model, "compute_dtype", None) or next(plain.parameters()).dtype
        return str(Path(self._folder.name) / "model"), tokenizer, str(found).removeprefix("torch.")

    def _make_server(
        self, python: str | None, log_file: str | None, startup_s: float, answer_s: float, restarts: int, transfer: str
    ) -> RemoteEngine:
        python = python or sys.executable
        environment = self._environment()
        check_python(python, environment) if python != sys.executable else check_installed()
        exchange = Exchange(self._bytes)
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--served-model-name", MODEL_NAME]
        command += ["--enable-scale-out", "--disable-uvicorn-access-log", *self.settings.flags()]
        number = count()
        log = Path(log_file) if log_file is not None else Path(self._folder.name) / "server.log"

        def start() -> ServerProcess:
            folders = (exchange.folder, Path(self._folder.name))
            # Each its own: what is meant for one that is gone does not reach the next, which may not be ready.
            socket = exchange.folder / f"socket-{next(number)}"
            server = ServerProcess([*command, "--uds", str(socket)], environment, socket, log, folders)
            try:
                server.wait_ready(startup_s)
            except BaseException:
                server.kill()
                raise
            return server

        try:
            return RemoteEngine(
                start=start,
                exchange=exchange,
                transfer=transfer,
                answer_s=answer_s,
                restarts=restarts,
                recheck=_RECHECK[self.settings.dtype],
            )
        except BaseException:
            exchange.close()
            raise

    def _environment(self) -> dict[str, str]:
        """Of a server: ours, with what vLLM reads, and with this project where its workers find it."""
        found = os.environ | self.settings.environment() | {"VLLM_SERVER_DEV_MODE": "1", "PYTHONUNBUFFERED": "1"}
        found.pop(_KEY, None)  # somebody else's: ours would ask for it, and only we can reach its socket
        if self.lora_rank:
            found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if self.settings.transfer == "ipc":
            found["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles are pickled; the socket is ours alone
        roots = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        return found | {"PYTHONPATH": os.pathsep.join(filter(None, roots))}

    async def act(self, requests: Sequence[PolicyRequest]) -> list[PolicyAction]:
        """Returns one action per request. All run side by side, and end in the engine where the call is cancelled.

        Raises:
            PolicyFailure: the engine failed; a server that is gone has a successor by the next request.
            WeightsError: that successor has not the weights it should, or does not compute with them.
            UserError: a context or a setting that the engine cannot take.
        """
        tasks = [asyncio.ensure_future(self._one(request)) for request in requests]
        for request, task in zip(requests, tasks, strict=True):
            self._live.setdefault(request.episode, set()).add(task)
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for request, task in zip(requests, tasks, strict=True):
                task.cancel()
                self._live[request.episode].discard(task)
                if not self._live[request.episode]:
                    del self._live[request.episode]

    async def _one(self, request: PolicyRequest) -> PolicyAction:
        ids, sampling = request.context_ids, request.sampling
        if not ids:
            raise PolicyFailure(f"episode {request.episode}: the vllm policy got no context ids")
        if request.context_images:
            raise UserError("the vllm policy reads text only; take model.engine=transformers for pictures")
        if len(ids) + sampling.max_new_tokens > (limit := self.engine.max_model_len):
            raise UserError(
                f"a context of {len(ids)} tokens with max_new_tokens={sampling.max_new_tokens} is more than the "
                f"engine's max_model_len={limit}: raise that (model.engine_options.max_model_len), or set "
                f"rollout.max_context_tokens to {limit} or less"
            )
        params = sampling_params(sampling, request.seed, self.chat.stop_ids)
        before = self.version
        answer = await self.engine.generate(ids, params)
        if not answer.ids or len(answer.ids) != len(answer.logprobs):
            raise PolicyFailure(f"vLLM answered {len(answer.ids)} ids with {len(answer.logprobs)} log-probs")
        logprobs = [0.0] * len(answer.ids) if sampling.temperature == 0 else answer.logprobs
        versions = answer.versions or ((before, len(answer.ids)),)
        return PolicyAction(
            text=self.chat.decode(answer.ids),
            ids=answer.ids,
            logprobs=logprobs,
            version=versions[0][0],
            versions=versions if len(versions) > 1 else (),
            finish="stop" if answer.ids[-1] in self.chat.stop_ids else "length",
        )

    def release(self, episode: str) -> None:
        """Ends what the engine still does for the episode."""
        for task in list(self._live.get(episode, ())):
            task.get_loop().call_soon_threadsafe(task.cancel)

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        self.engine.load_weights(weights, version)
        self.version = version

    def load_lora(self, adapter: Any, version: int) -> None:
        """Puts a LoRA adapter in the place of the last one; every action after this call carries `version`.

        Args:
            adapter: a folder as peft writes it, which the engine must be able to read, or a model with one
                (`agentrl.models.lora`).
            version: of the weights.

        Raises:
            UserError: the engine was started without `lora_rank`, or a server at `url` without `exchange`.
        """
        if not self.lora_rank:
            raise UserError("this engine takes no adapters: start it with lora_rank=R, the largest rank there will be")
        folder = Path(adapter) if not has_adapter(adapter) else self._write_adapter(adapter, version)
        self.engine.load_adapter(str(folder), version)
        self.version = version
        self._drop_adapters(keep=folder)

    def _write_adapter(self, model: Any, version: int) -> Path:
        """Writes the model's adapter to where the engine can read it; returns the folder."""
        if self._adapters_in is None:
            raise UserError(
                "the server at url can read no adapter from here: give exchange=DIR, the folder that both can read"
            )
        # A new place each time: vLLM tells cached prefixes of adapters apart by it. Not `mkdtemp`, which lets nobody
        # else in: in an exchange the folder is as open as the umask has it.
        folder = self._adapters_in / f"adapter-{version}-{uuid.uuid4().hex[:12]}"
        self._adapters.append(folder)
        write_adapter(model, folder)
        return folder

    def _drop_adapters(self, keep: Path | None = None) -> None:
        for folder in (one for one in self._adapters if one != keep):
            shutil.rmtree(folder, ignore_errors=True)
        self._adapters = [one for one in self._adapters if one == keep]

    def fingerprint(self) -> str:
        return self.engine.fingerprint() or files_fingerprint(self.settings.model)

    def canary(self, ids: Sequence[int]) -> list[float]:
        return self.engine.score(ids)

    async def aclose(self) -> None:
        if isinstance(self.engine, RemoteEngine):
            await self.engine.aclose()
        await asyncio.to_thread(self.engine.close)
        self._drop_adapters()
        self._folder.cleanup()


def _check_heads(directory: str) -> None:
    """Checks the size of the attention heads: vLLM has no kernel on a CPU for most.

    Raises:
        UserError: none for this model.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory).get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size not in _CPU_HEADS:
        raise UserError(
            f"the attention heads of {directory!r} have {size} dimensions; on a CPU vLLM has kernels for "
            f"{', '.join(map(str, _CPU_HEADS))} (agentrl init-model --preset small makes a model with 32); or take "
            "model.engine=transformers"
        )


def _check_sender(transfer: str, mode: str) -> None:
    """Checks that this process can send weights from GPU to GPU.

    Raises:
        UserError: no vLLM here, or nobody to send to.
    """
    if mode == "local":
        raise UserError(f"mode=local hands weights over in this process: transfer={transfer!r} has no meaning there")
    if find_spec("vllm") is None:
        raise UserError(
            f"transfer={transfer!r} sends from this process with vLLM's own code, which is not installed in this "
            f"environment ({INSTALL}); or take transfer=file"
        )


def _name_of(model: Any) -> str:
    """What the model is called where it is served: its directory, or hub name; empty for one made here."""
    name = str(model if isinstance(model, str) or hasattr(model, "__fspath__") else getattr(model, "name_or_path", ""))
    path = Path(name).expanduser()
    return str(path.resolve()) if name and path.is_dir() else name
