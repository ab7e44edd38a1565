"""One iteration of training reads from top to bottom in `Trainer.iterate`; each line is a call to a part.

    gather -> buffer -> batch -> judge (PRM, reference, critic) -> credit -> update -> sync -> log, evaluate, checkpoint

The trainer knows no credit method by name: it computes what the method declares it needs. It duplicates, drops and pads
nothing: episodes that infrastructure ended are counted and left out, everything else is trained on as it was sampled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from agentrl.batch import build_batch
from agentrl.batch.rows import Batch
from agentrl.buffer import TrajectoryBuffer, write_jsonl
from agentrl.buffer.pairs import pair_counts
from agentrl.config import RunConfig, dump_config
from agentrl.credit import Advantage, Signals, load_credit
from agentrl.errors import AgentRLError, InfrastructureError, NonFiniteError
from agentrl.evaluate import EvalResult, evaluate
from agentrl.models.load import load_model, load_tokenizer, save_model
from agentrl.models.lora import BASE_FILE, check_base, has_adapter, load_adapter, load_trainable, merged
from agentrl.models.memory import memory_told
from agentrl.policy import Sampling
from agentrl.rollout import Collector, run
from agentrl.train.checkpoint import broken, check_same_config, checkpoints, read_state, write_checkpoint
from agentrl.train.credit_log import write_credit
from agentrl.train.engine import check_canary, make_engine, sync_engine
from agentrl.train.gather import Dealer, Gathered, gather
from agentrl.train.judge import Judge
from agentrl.train.metrics import Clock, MetricsLog, peak_memory_mb, rollout_metrics
from agentrl.train.mismatch import corrects, measure
from agentrl.train.plan import batch_plan
from agentrl.train.policy_update import learning_rate, make_optimizer, update_policy
from agentrl.train.preflight import check_run, check_run_dir, needed_bytes
from agentrl.train.shaping import invalid_turns, trainable
from agentrl.train.stop import StopRequest
from agentrl.train.trackers import make_trackers
from agentrl.types import Trajectory
from agentrl.versions import write_versions

Metrics = dict[str, Any]

MISMATCH_LIMIT = 0.05
"""Nats: beyond this difference of the sampler's log-probs from the trainer's, in float32, a run stops."""


class Judged(NamedTuple):
    """What the last iteration found out about its turns, before the policy was updated."""

    batch: Batch
    signals: Signals
    advantage: Advantage


class Trainer:
    """A training run: models, optimisers, buffer, and the loop.

    Args:
        config: the whole run.
        resume: go on from the newest checkpoint in ``run_dir/checkpoints``.
        on_episode: called with every finished training episode.
        on_iteration: called with every iteration's metrics.

    Raises:
        UserError: anything that cannot work is refused here, before any episode is played.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        resume: bool = False,
        on_episode: Callable[[Trajectory], None] | None = None,
        on_iteration: Callable[[Metrics], None] | None = None,
    ) -> None:
        self.config = config
        self.on_iteration = on_iteration
        check_run(config)
        self.credit, self.credit_options = load_credit(config.credit.method, config.credit.options)
        if config.model.threads is not None and config.model.device == "cpu":
            torch.set_num_threads(config.model.threads)
        torch.manual_seed(config.seed)

        self.tokenizer = load_tokenizer(config.model.path)
        self.model = load_trainable(
            config.model.path, device=config.model.device, dtype=config.model.dtype, lora=config.lora
        )
        self.policy = policy = make_engine(config.model, self.model, self.tokenizer)
        self.optimizer = make_optimizer(self.model, config.policy_update)
        with memory_told("the models beside the policy", _less_memory(config)):
            self.judge = Judge(config, self.model, self.credit.needs_of(self.credit_options))
        found = checkpoints(Path(config.run_dir) / "checkpoints")
        self.run_dir = check_run_dir(config, resume=resume, need_bytes=self._needed_bytes(len(found)))
        self.collector = Collector(policy, config.env, config.rollout, config.outcome, on_episode=on_episode)
        self.buffer = TrajectoryBuffer(config.buffer.keep_iterations)
        self.dealer = Dealer(config)
        self.iteration = 0
        self.last: Judged | None = None
        self.started = time.perf_counter()
        if resume and found:
            self._restore(found[-1])
        else:
            check_canary(policy, self.model, config.model.dtype)
        trackers = make_trackers(config.log.trackers, self.run_dir, config.name, config.model_dump(mode="json"))
        self.log = MetricsLog(self.run_dir, config.log.tensorboard, trackers)
        # A run killed before its first checkpoint starts afresh: its evaluation of iteration 0 is written again.
        self.log.truncate_after(self.iteration if self.iteration else -1)
        dump_config(config, self.run_dir / "config.yaml")
        (self.run_dir / "plan.txt").write_text(batch_plan(config) + "\n")
        write_versions(self.run_dir)

    def run(self) -> Metrics:
        """Trains to the last iteration. Ctrl-C or SIGTERM finishes the iteration, saves and returns.

        Returns:
            the last iteration's metrics, with `interrupted` and `checkpoint`.
        """
        metrics: Metrics = {"iteration": self.iteration}
        saved = self.iteration
        with StopRequest() as stop:
            if self.iteration == 0 and self.config.eval.every:
                self._log({"iteration": 0, "eval": self.evaluate().model_dump(mode="json")})
            while self.iteration < self.config.iterations and not stop.requested:
                metrics = self.iterate()
                if self._due(self.config.eval.every):
                    metrics["eval"] = self.evaluate().model_dump(mode="json")
                self._log(metrics)
                if self._due(self.config.checkpoint.every):
                    self.save()
                    saved = self.iteration
            if saved < self.iteration:
                self.save()
            metrics["interrupted"] = stop.requested
        metrics["checkpoint"] = str(self.run_dir / "checkpoints")
        return metrics

    def iterate(self) -> Metrics:
        """One iteration, from rollout to synced weights. Returns its metrics."""
        clock = Clock()
        gathered = self._gather()
        self.policy.rest()
        clock.split(gathered.played.seconds)
        trajectories = gathered.trajectories
        self.buffer.append(trajectories, self.iteration)
        batch = build_batch(trajectories, device=self.config.model.device)
        clock.lap("other")
        try:
            replay = [t for t in self.buffer.latest(self.config.prm.replay_iterations) if t.iteration != self.iteration]
            signals, judge_metrics = self.judge.judge(batch, self.model, replay, self.iteration)
            clock.lap("prm")
            advantage = self.credit(signals, self.credit_options)
            self.last = Judged(batch, signals, advantage)
            if self.config.buffer.write_trajectories:
                write_credit(self.run_dir, self.iteration, batch, signals, advantage)
            clock.lap("other")
            policy_metrics = self._update(batch, signals, advantage)
            clock.lap("policy")
        except NonFiniteError as error:
            raise NonFiniteError(f"iteration {self.iteration}: {error}; {self._keep_evidence(trajectories)}") from error
        self.iteration += 1
        self._sync()
        clock.lap("other")
        return {
            "iteration": self.iteration,
            **rollout_metrics(gathered.played),
            **gathered.dropped,
            **judge_metrics,
            **{f"credit_{name}": value for name, value in advantage.metrics.items()},
            "advantage_std": float(advantage.token.std()) if batch.index.K > 1 else 0.0,
            **policy_metrics,
            "groups": pair_counts([*gathered.played.trajectories, *gathered.played.failed]),
            "seconds": clock.seconds,
            "elapsed": time.perf_counter() - self.started,
            "peak_memory_mb": peak_memory_mb(self.config.model.device),
            "tokens": batch.tokens,
            "action_tokens": batch.index.K,
        }

    def evaluate(self, *, temperature: float | None = None) -> EvalResult:
        """Plays the held-out tasks with the current weights."""
        config = self.config
        if temperature is None:
            temperature = config.rollout.temperature if config.eval.temperature is None else config.eval.temperature
        return evaluate(
            self.policy,
            config.env,
            episodes=config.eval.episodes,
            seed=config.eval.seed,
            rollout=config.rollout,
            sampling=Sampling(temperature=temperature, max_new_tokens=config.rollout.max_new_tokens),
            outcome=config.outcome,
        )

    def save(self) -> Path:
        """Writes a checkpoint of everything the run needs to go on."""
        models = {"policy": self.model, **self.judge.models()}
        state: dict[str, Any] = {
            "iteration": self.iteration,
            "drawn": self.dealer.drawn,
            "version": self.policy.version,
            "optimizer": self.optimizer.state_dict(),
            "judge": self.judge.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "elapsed": time.perf_counter() - self.started,
            "config": self.config.model_dump(mode="json"),
        }
        # The model first: a kill in between leaves an older checkpoint to go on from, which will write it again.
        save_model(merged(self.model), self.tokenizer, self.run_dir / "model")
        return write_checkpoint(
            self.run_dir / "checkpoints",
            self.iteration,
            {name: (model, self.tokenizer) for name, model in models.items()},
            state,
            self.buffer,
            self.config.checkpoint.keep,
        )

    def close(self) -> None:
        """Ends environments, engine and log."""
        self.collector.close()
        run(self.policy.aclose())
        self.log.close()

    def _gather(self) -> Gathered:
        """Plays this iteration's episodes and stores them.

        Raises:
            InfrastructureError: not one of them can be scored.
            NonFiniteError: the policy's log-probs are not finite.
        """
        try:
            gathered = gather(self.collector, self.dealer, self.config, self.iteration)
        except (InfrastructureError, NonFiniteError) as error:
            raise type(error)(f"iteration {self.iteration}: {error}; {self._last_good()}") from error
        played = gathered.played
        if self.config.buffer.write_trajectories:
            path = self.run_dir / "trajectories" / f"iteration-{self.iteration:06d}.jsonl"
            write_jsonl(path, [*played.trajectories, *played.failed])
        if not played.trajectories:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in played.counts.items())
            raise InfrastructureError(
                f"iteration {self.iteration}: no episode could be scored ({reasons}); the first: "
                f"{played.failed[0].error}; {self._last_good()}"
            )
        return gathered

    def _update(self, batch: Batch, signals: Signals, advantage: Advantage) -> Metrics:
        """The updates of policy and critic, with the reference log-probs of a KL term where one is wanted."""
        metrics: Metrics = {}
        config, temperature = self.config.policy_update, self.config.rollout.temperature
        seed = self.config.seed * 1_000_003 + self.iteration
        if self.judge.critic is not None:
            assert advantage.value_target is not None
            assert signals.value is not None
            metrics = self.judge.critic.update(batch, advantage.value_target, signals.value, seed=seed)
            if self.iteration < self.config.critic.warmup_iterations:
                metrics |= measure(self.model, batch, config, temperature)
                if not corrects(config):
                    self._check_mismatch(metrics)
                return metrics
        rate = learning_rate(config, self.iteration, self.config.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        token = advantage.token
        if config.unit_advantage and batch.index.K > 1:
            token = token / (token.std() or 1.0)
        penalty = config.invalid_action_penalty * invalid_turns(batch.trajectories)
        trained = trainable(batch.trajectories, config.overlong_filter)
        metrics |= update_policy(
            self.model,
            self.optimizer,
            batch,
            token - penalty[batch.index.turn_of_token].float(),
            config,
            temperature=temperature,
            reference=signals.reference_logprob,
            seed=seed,
            trajectories=trained,
        )
        if config.overlong_filter != "none":
            metrics["overlong_filtered"] = float(batch.index.N - len(trained))
        if not metrics.get("mismatch_corrected"):
            self._check_mismatch(metrics)
        return metrics | {"lr": rate}

    def _check_mismatch(self, metrics: Metrics) -> None:
        """Raises AgentRLError where a mismatch that nothing corrected is beyond the limit, in float32."""
        found = metrics.get("logprob_mismatch", 0.0)
        if self.config.model.dtype != "float32" or found <= MISMATCH_LIMIT:
            return
        way = "(policy_update.tis and policy_update.reject correct what is known and small)"
        if corrects(self.config.policy_update):
            way = (
                "and none was seen in the trajectories that were looked at before the update; "
                "policy_update.mismatch_sample=1 looks at all of them, so that tis and reject see it"
            )
        raise AgentRLError(
            f"log-probs recorded while sampling differ from the trainer's by {found:.3g} nats (limit "
            f"{MISMATCH_LIMIT}): the engine samples from other weights or another distribution {way}"
        )

    def _sync(self) -> None:
        """Gives the engine the new weights and checks that it has them."""
        sync_engine(self.policy, self.model, self.iteration, self.config.model.dtype)

    def _needed_bytes(self, present: int) -> int:
        """Disk space that this run's checkpoints and model will take, with `present` checkpoints there already."""
        prm = self.judge.prm
        trained = [self.model, *(part.model for part in (prm, self.judge.critic) if part is not None)]
        stored = [model for name, model in self.judge.models().items() if name == "prm_reference"]
        return needed_bytes(trained, stored, self.config.checkpoint.keep, present)

    def _restore(self, path: Path) -> None:
        """Puts everything back as it was after the checkpoint's iteration."""
        state = read_state(path)
        check_same_config(path, state.get("config") or {}, self.config, self.run_dir / "config.yaml")
        for name, model in {"policy": self.model, **self.judge.models()}.items():
            if has_adapter(model) and (path / name / BASE_FILE).is_file():
                check_base(model, path / name)
        try:
            self._load_state(path, state)
        except (AgentRLError, KeyError, RuntimeError, ValueError) as error:
            raise broken(path, error) from error

    def _load_state(self, path: Path, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.started -= state["elapsed"]
        self._load_into(self.model, path / "policy")
        self.optimizer.load_state_dict(state["optimizer"])
        for name, model in self.judge.models().items():
            self._load_into(model, path / name)
        self.judge.load_state_dict(state["judge"])
        self.dealer.drawn = state["drawn"]
        self.buffer = TrajectoryBuffer.load(path / "buffer", self.config.buffer.keep_iterations)
        torch.set_rng_state(state["torch_rng"])
        sync_engine(self.policy, self.model, state["version"], self.config.model.dtype)

    def _load_into(self, model: Any, path: Path) -> None:
        if has_adapter(model):
            load_adapter(model, path)
            return
        saved = load_model(path, device=self.config.model.device)
        model.load_state_dict(saved.state_dict())

    def _keep_evidence(self, trajectories: list[Trajectory]) -> str:
        path = self.run_dir / "failed" / f"iteration-{self.iteration:06d}.jsonl"
        write_jsonl(path, trajectories)
        return f"its trajectories are in {path}; {self._last_good()}"

    def _last_good(self) -> str:
        good = checkpoints(self.run_dir / "checkpoints")
        return f"last good checkpoint: {good[-1] if good else 'none yet'}"

    def _log(self, metrics: Metrics) -> None:
        rest = {key: value for key, value in metrics.items() if key != "iteration"}
        self.log.write(metrics["iteration"], rest)
        if self.on_iteration is not None:
            self.on_iteration(metrics)

    def _due(self, every: int) -> bool:
        """Whether what happens after every `every` iterations (0: never) happens now; always after the last."""
        return every > 0 and (self.iteration % every == 0 or self.iteration == self.config.iterations)


def _less_memory(config: RunConfig) -> str:
    """How the models beside the policy are made to fit."""
    one = (
        "with lora.rank=16 all of them stand over one frozen copy of the weights; else " if not config.lora.rank else ""
    )
    half = "model.dtype=bfloat16 halves frozen weights; " if config.model.dtype == "float32" else ""
    return (
        f"{one}{half}take a smaller model. policy_update.tokens_per_microbatch and rollout.groups lower what updates "
        "take on top (agentrl explain shows each part)"
    )


def train(config: RunConfig, *, resume: bool = False, **callbacks: Any) -> Metrics:
    """Runs `config` and returns the last iteration's metrics.

    Args:
        config: the run.
        resume: go on from the newest checkpoint.
        **callbacks: `on_episode` and `on_iteration` of `Trainer`; without any, progress is printed.

    Raises:
        UserError: anything that cannot work, before any episode is played.
        NonFiniteError: a loss, gradient, advantage or log-prob became NaN or infinite.
        InfrastructureError: no episode of an iteration could be scored.
    """
    from agentrl.train.console import Console

    if config.log.progress and not callbacks:
        with Console(config) as console:
            return _train(config, resume, {"on_episode": console.episode, "on_iteration": console.iteration})
    return _train(config, resume, callbacks)


def _train(config: RunConfig, resume: bool, callbacks: dict[str, Any]) -> Metrics:
    trainer = Trainer(config, resume=resume, **callbacks)
    try:
        return trainer.run()
    finally:
        trainer.close()
