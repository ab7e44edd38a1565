"""vLLM in this process: no copy of weights on disk, no second process, start-up in seconds.

Everything of vLLM's runs in one thread of ours: between two steps of the engine it takes new requests, ends those
nobody waits for, and loads weights, in the middle of requests too.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import queue
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch

from agentrl.errors import PolicyFailure, UserError
from agentrl.models.load import distinct
from policies.vllm.engine import ADAPTER_NAME, SCORING, Generated, Settings, check_installed, how_to_mend

log = logging.getLogger("agentrl.vllm")
T = TypeVar("T")
_ONLY = threading.Lock()
"""vLLM keeps its distributed groups in globals: one engine in a process at a time."""
_Job = tuple[Callable[[], Any], "Future[Any]"]


class LocalEngine:
    """An `Engine` in this process.

    Args:
        settings: how it is started.

    Raises:
        UserError: vLLM is missing, of another version, or cannot start so; the message says how to mend it.
    """

    def __init__(self, settings: Settings) -> None:
        check_installed()
        if not _ONLY.acquire(blocking=False):
            raise UserError("there is a vLLM engine in this process already, and one is all it takes: use mode=server")
        self.settings = settings
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._waiting: dict[str, Future[Any]] = {}
        self._number = count()
        self._adapter: Any = None
        self._closed = False
        self._gate = threading.Lock()
        """Held where a job is posted and where the end of all jobs is declared: none falls between."""
        self._why = "it was closed"
        self._llm: Any = None
        self.max_model_len = 0
        started: Future[None] = Future()
        threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._serve, args=(started,), name="agentrl-vllm", daemon=True)
        self._thread.start()
        try:
            started.result()
        finally:
            torch.set_num_threads(threads)  # threads that are yet to come take the number that was set last

    async def generate(self, ids: Sequence[int], params: Mapping[str, Any]) -> Generated:
        name = f"request-{next(self._number)}"
        answer: Future[Any] = Future()
        self._post(lambda: self._add(name, ids, params, answer), answer)
        try:
            output = (await asyncio.wrap_future(answer)).outputs[0]
        except asyncio.CancelledError:
            self._post(lambda: self._abort(name), Future())
            raise
        logprobs = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
        spans = tuple((int(span.version), span.end - span.start) for span in output.weight_versions)
        return Generated(list(output.token_ids), logprobs, spans)

    def score(self, ids: Sequence[int]) -> list[float]:
        answer: Future[Any] = Future()
        self._post(lambda: self._add(f"score-{next(self._number)}", ids, SCORING, answer), answer)
        steps = answer.result().prompt_logprobs
        return [step[token].logprob for step, token in zip(steps[1:], ids[1:], strict=True)]

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        kept = list(distinct(weights).items())
        self._call(lambda: self._load(kept, version))

    def load_adapter(self, folder: str, version: int) -> None:
        self._call(lambda: self._swap(folder, version))

    def fingerprint(self) -> str:
        return str(self._call(lambda: self._llm.collective_rpc("agentrl_fingerprint"))[0])

    def close(self) -> None:
        with self._gate:
            self._closed = True
            self._jobs.put((lambda: None, Future()))  # wakes it up
        self._thread.join(timeout=30.0)

    def _post(self, job: Callable[[], Any], answer: Future[Any]) -> None:
        """Has the engine's thread run `job`; its error goes to `answer`."""
        with self._gate:
            if not self._closed:
                self._jobs.put((job, answer))
                return
        answer.set_exception(PolicyFailure(f"vLLM takes no more requests: {self._why}"))

    def _call(self, job: Callable[[], T]) -> T:
        """Runs `job` in the engine's thread, between two steps, and returns its result."""
        done: Future[T] = Future()
        self._post(lambda: done.set_result(job()), done)
        return done.result()

    def _serve(self, started: Future[None]) -> None:
        """Body of the thread."""
        with torch._dynamo.config.patch(disable=True) if self.settings.eager else contextlib.nullcontext():
            self._serve_all(started)

    def _serve_all(self, started: Future[None]) -> None:
        try:
            if self.settings.threads is not None:
                torch.set_num_threads(self.settings.threads)  # of this thread: the trainer keeps its own number
            with _kept_state():
                self._llm = _start(self.settings)
            self._llm.set_weight_version("0")
            self.max_model_len = int(self._llm.model_config.max_model_len)
        except BaseException as error:
            self._closed = True
            self._end()
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            while not self._closed:
                self._take_jobs(wait=not self._llm.has_unfinished_requests())
                if self._llm.has_unfinished_requests():
                    for output in self._llm.step():
                        if output.finished and (answer := self._waiting.pop(output.request_id, None)) is not None:
                            _settle(answer, output)
        except BaseException as error:
            log.exception("vLLM failed")
            self._why = f"it failed with {type(error).__name__}: {error}"
        with self._gate:
            self._closed = True
        self._end()

    def _take_jobs(self, wait: bool) -> None:
        """Runs what was posted; with `wait` at least one."""
        while True:
            try:
                job, answer = self._jobs.get(block=wait)
            except queue.Empty:
                return
            wait = False
            try:
                job()
            except Exception as error:
                _settle(answer, PolicyFailure(f"vLLM: {type(error).__name__}: {error}"))

    def _add(self, name: str, ids: Sequence[int], params: Mapping[str, Any], answer: Future[Any]) -> None:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        if answer.cancelled():
            return
        sampling = SamplingParams(**params, output_kind=RequestOutputKind.FINAL_ONLY)
        self._waiting[name] = answer
        try:
            self._llm.add_request(name, tokens_input(list(ids)), sampling, lora_request=self._adapter)
        except BaseException:
            del self._waiting[name]
            raise

    def _abort(self, name: str) -> None:
        if self._waiting.pop(name, None) is not None:
            self._llm.abort_request([name])

    def _load(self, weights: list[tuple[str, torch.Tensor]], version: int) -> None:
        self._llm.collective_rpc("agentrl_load", args=(weights,))
        self._adapter = None  # it stood over the old ones
        self._new_version(version)

    def _swap(self, folder: str, version: int) -> None:
        from vllm.lora.request import LoRARequest

        self._llm.add_lora(LoRARequest(ADAPTER_NAME, 1, folder, load_inplace=True))
        self._adapter = LoRARequest(ADAPTER_NAME, 1, folder)
        self._new_version(version)

    def _new_version(self, version: int) -> None:
        # Keys and values of the old weights are good for nothing; requests under way read their context again.
        self._llm.reset_prefix_cache(reset_running_requests=True)
        self._llm.set_weight_version(str(version))

    def _end(self) -> None:
        """Frees what vLLM holds; whoever still waits is told."""
        for answer in self._waiting.values():
            _settle(answer, PolicyFailure(f"vLLM ended while it was sampling: {self._why}"))
        self._waiting.clear()
        while not self._jobs.empty():
            _settle(self._jobs.get()[1], PolicyFailure(f"vLLM takes no more requests: {self._why}"))
        with contextlib.suppress(Exception):
            self._llm.engine_core.shutdown()
        self._llm = self._adapter = None
        gc.collect()
        with contextlib.suppress(Exception):
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        _ONLY.release()


def _start(settings: Settings) -> Any:
    """Makes vLLM's engine."""
    for name, value in settings.environment().items():
        if name.startswith("VLLM"):  # the rest would be the trainer's too
            os.environ[name] = value
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        return LLMEngine.from_engine_args(
            EngineArgs(**settings.engine_args(), disable_log_stats=True, use_tqdm_on_load=False)
        )
    except (Exception, SystemExit) as error:
        message = f"{type(error).__name__}: {error}"
        raise UserError(f"vLLM cannot start with {settings.model!r}: {message}{how_to_mend(message)}") from error


@contextlib.contextmanager
def _kept_state() -> Iterator[None]:
    """Leaves to the trainer what is the process's own, and what vLLM sets to its liking when it starts.

    That is: the random streams, which it seeds, the number of threads, and `torch.set_num_threads`, in whose place it
    puts a warning.
    """
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    streams = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(streams[0])
        np.random.set_state(streams[1])
        torch.set_rng_state(streams[2])
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _settle(answer: Future[Any], value: Any) -> None:
    """Gives the waiting side its answer or error; it may be gone."""
    with contextlib.suppress(Exception):
        if isinstance(value, BaseException):
            answer.set_exception(value)
        else:
            answer.set_result(value)
