"""`RunConfig`: every setting of a training run, with its unit, default and source.

Unknown keys are refused. Options of a credit method live with the method (`agentrl.credit`) and are given as a mapping
under ``credit.options``, so that a third party's method needs no change here.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """Base of all sections: unknown keys refused, values checked on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class EnvConfig(Section):
    """Which environment, and how it is run."""

    id: str = "Sokoban-v0"
    """Id (``agentrl envs`` lists all), ``module:Id-v0`` to import `module` first, or the URL of a served environment
    (``http://host:8000/Sokoban-v0``; with several, separated by commas, episodes are spread over the servers)."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the environment while training."""
    eval_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Overrides of `kwargs` for held-out evaluation (for instance ``split: test``)."""
    max_turns: int | None = Field(default=None, ge=1)
    """Turn limit; None keeps the registered one."""
    wrappers: list[dict[str, Any]] = Field(default_factory=list)
    """Wrappers around the environment, the first innermost: ``{name: truncate_observation, limit: 2000}``, or
    ``name: module:Class`` for one of your own (see `agentrl.envs.wrappers`)."""
    instructions: str | None = None
    """System prompt instead of the environment's own; a model that was warm-started on the task may need none ("")."""


class ModelConfig(Section):
    """The causal language model that is trained."""

    engine: str = "transformers"
    """Policy plugin that samples from it (``agentrl policies`` lists all)."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the engine (``agentrl policies NAME`` shows them), e.g. ``{mode: local, kv_cache_gib: 1}``."""
    path: str = ""
    """Directory that `AutoModelForCausalLM` loads (or a hub name where a hub can be reached)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward and backward passes. Master weights stay float32."""
    device: str = "cpu"
    """Torch device, e.g. ``cuda`` or ``cuda:1``."""
    threads: int | None = Field(default=None, ge=1)
    """Torch threads on a CPU; None leaves torch's own choice."""


class LoRAConfig(Section):
    """Training of small adapters over a frozen model (LoRA, arXiv 2106.09685) in place of all weights. Policy, PRM and
    critic have an adapter each over one base; the reference is the base itself."""

    rank: int = Field(default=0, ge=0)
    """Rank of every adapter; 0 trains all weights. Adapters want a learning rate ten times as high, or more."""
    alpha: int = Field(default=32, ge=1)
    """An adapter's output is scaled by this over the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """0 only: with dropout the trainer's log-probs would differ from those that were sampled from."""
    targets: str | list[str] = "all-linear"
    """Layers with an adapter: the ends of their names (``[q_proj, v_proj]``), a regular expression of whole names, or
    ``all-linear``: all but the LM head."""

    @model_validator(mode="after")
    def _no_dropout(self) -> LoRAConfig:
        if self.dropout:
            raise ValueError(
                f"lora.dropout={self.dropout}: the trainer's log-probs would differ from those that were sampled from, "
                "and every importance ratio with them; leave it at 0"
            )
        return self


class RolloutConfig(Section):
    """How episodes are played."""

    groups: int = Field(default=16, ge=1)
    """Task instances per iteration (G)."""
    group_size: int = Field(default=8, ge=1)
    """Trajectories of each task instance."""
    tasks: int = Field(default=0, ge=0)
    """Size of the pool of training tasks that iterations draw from; 0 = a fresh task every time."""
    history: str = "full"
    """What the model sees of the past: ``full``, or ``window(k)``: the last k turns before the current observation."""
    past_turns: Literal["sampled", "template"] = "sampled"
    """How it sees them: as they were ``sampled``, in one growing row; or, with a ``template`` that shows them otherwise
    (Qwen3's drops their thinking), as that does, in a new row each turn. What is trained on stays as sampled."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the sampling, and of every log-prob that training compares with it."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Kept probability mass. A training run takes 1 only."""
    top_k: int = Field(default=0, ge=0)
    """Kept tokens, 0 = all. A training run takes 0 only."""
    max_new_tokens: int = Field(default=16, ge=1)
    """Token limit of one turn."""
    max_context_tokens: int = Field(default=2048, ge=8)
    """Token limit of one context; an episode that would pass it stops with ``token_limit``."""
    max_episode_tokens: int | None = Field(default=None, ge=1)
    """Token limit of one episode: what is sampled in all its turns. A turn may sample what is left, at most
    `max_new_tokens`; an episode that has nothing left stops with ``token_limit``. Policies without token ids are not
    counted. None = no limit."""
    concurrency: int = Field(default=256, ge=1)
    """Episodes alive at once."""
    executor: Literal["auto", "inline", "thread", "process", "async"] = "auto"
    """Where environment steps run; ``auto``: inline where the environment declares itself fast, awaited (``async``)
    where it is served over HTTP, else threads."""
    workers: int = Field(default=16, ge=1)
    """Threads or processes for environment steps; served environments need none."""
    step_deadline_s: float = Field(default=60.0, gt=0)
    """Seconds for one `reset` or `step` of the environment."""
    policy_deadline_s: float = Field(default=600.0, gt=0)
    """Seconds for one call of the policy, which answers a whole batch."""
    episode_deadline_s: float = Field(default=3600.0, gt=0)
    """Seconds for a whole episode."""
    retries: int = Field(default=2, ge=0)
    """How often an episode that an infrastructure failure ended is played again."""
    dynamic_sampling: bool = False
    """Leave groups whose outcomes are all equal out of training and play further tasks in their place (DAPO)."""
    max_refills: int = Field(default=3, ge=0)
    """``dynamic_sampling``: collections of one iteration beyond the first; then it trains on what it has."""

    @field_validator("history")
    @classmethod
    def _history(cls, value: str) -> str:
        parse_history(value)
        return value


def parse_history(value: str) -> int | None:
    """Returns None for ``full``, k for ``window(k)``; raises ValueError otherwise."""
    if value == "full":
        return None
    match = re.fullmatch(r"window\((\d+)\)", value.strip())
    if not match:
        raise ValueError(f"history is 'full' or 'window(k)' with k >= 0, not {value!r}")
    return int(match.group(1))


class OutcomeConfig(Section):
    """One scalar per episode, and what counts as success."""

    rule: Literal["success", "return"] = "success"
    """``success``: 1 if the environment says solved, else 0. ``return``: the sum of the environment's rewards."""
    success_above: float | None = None
    """With ``return``: outcomes strictly above this are successes; None takes the environment's own ``success``."""
    truncated: Literal["scored", "failure", "excluded"] = "scored"
    """Episodes that a limit cut off. ``scored``: by the rule. ``failure``: no success, and an outcome of at most 0.
    ``excluded``: counted and stored, but not trained on (evaluation scores them by the rule)."""


class ShapingConfig(Section):
    """What credit sees beside the raw outcome (algorithms.md 7.4). Success, pairs and evaluation stay raw."""

    overlong_tokens: int | None = Field(default=None, ge=1)
    """Action tokens of an episode at which the penalty is whole (L_max of DAPO's soft overlong punishment, Eq. 13);
    None: no penalty."""
    overlong_cache: int = Field(default=0, ge=0)
    """Action tokens below `overlong_tokens` over which the penalty grows from 0 (L_cache)."""
    overlong_penalty: float = Field(default=1.0, ge=0)
    """The whole penalty, in outcome units."""
    overlong_unbounded: bool = False
    """The penalty goes on growing beyond `overlong_tokens` (verl's form) instead of staying whole (DAPO's Eq. 13)."""
    invalid_action_penalty: float = Field(default=0.0, ge=0)
    """Subtracted from the outcome for every turn whose text was no action, and from that turn's reward (OPRL: 0.1 where
    success pays 10). ``policy_update.invalid_action_penalty`` is the form that hits only the turn."""

    @model_validator(mode="after")
    def _cache_fits(self) -> ShapingConfig:
        if self.overlong_tokens is None and self.overlong_cache:
            raise ValueError("shaping.overlong_cache has no effect without shaping.overlong_tokens")
        if self.overlong_unbounded and not self.overlong_cache:
            raise ValueError("shaping.overlong_unbounded has no slope without shaping.overlong_cache")
        if self.overlong_tokens is not None and self.overlong_cache > self.overlong_tokens:
            raise ValueError(
                f"shaping.overlong_cache={self.overlong_cache} is more than "
                f"shaping.overlong_tokens={self.overlong_tokens}, below which it lies"
            )
        return self


class BufferConfig(Section):
    """What the trajectory buffer keeps."""

    keep_iterations: int = Field(default=1, ge=1)
    """Iterations kept in memory and in checkpoints, for `prm.replay_iterations`."""
    write_trajectories: bool = True
    """Write every iteration's trajectories to ``trajectories/``, to re-score or re-train from them offline, and the
    credit of their turns to ``credit/``."""


class PairConfig(Section):
    """Preference pairs inside a group (algorithms.md 1.3)."""

    mode: Literal["all", "best_worst", "one_to_one", "margin"] = "all"
    """``all``: every winner with every loser. ``best_worst``: one pair per group, the widest gap. ``one_to_one``: a
    random matching. ``margin``: as ``all``, where outcomes differ by more than `margin`."""
    margin: float = Field(default=0.0, ge=0)
    """``margin``: outcomes must differ by more than this."""
    graded: bool = False
    """False: successes against failures. True: any two different outcomes."""
    match_length: int | None = Field(default=None, ge=0)
    """Only pairs whose numbers of turns differ by at most this (remedy 1 of 1.12); None = any."""
    per_group_mean: bool = False
    """True: each group weighs the same however many pairs it has."""

    @model_validator(mode="after")
    def _margin_has_an_effect(self) -> PairConfig:
        if self.margin and self.mode != "margin":
            raise ValueError(
                f"pairs.margin={self.margin} has no effect with pairs.mode={self.mode}; set pairs.mode=margin"
            )
        return self


class PRMConfig(Section):
    """The implicit process reward model and its online training (algorithms.md 1.1-1.9, 1.12)."""

    init: str | None = None
    """Model directory to start from; None starts from the policy's weights."""
    beta: float = Field(default=0.05, gt=0)
    """Scale of the implicit reward, in reward per nat."""
    lr: float = Field(default=1e-6, gt=0)
    """Learning rate (AdamW, constant)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """As ``policy_update.adam_eps``."""
    grad_clip: float = Field(default=10.0, gt=0)
    """Largest gradient norm."""
    loss: Literal["dpo", "ipo", "ce"] = "dpo"
    """``dpo``: -log sigmoid of the score gap (paper Eq. 2). ``ipo``: squared distance of the gap to the outcome gap.
    ``ce``: cross-entropy of each trajectory's success (PRIME); needs no pairs, learns from uniform groups too."""
    score: Literal["sum", "mean"] = "sum"
    """Trajectory score: sum of turn rewards (paper), or their mean (free of length)."""
    centred: bool = False
    """Subtract each token reward's expectation under the behaviour policy (remedy 1 of 1.12)."""
    min_probability: float = Field(default=0.0, ge=0, lt=1)
    """Tokens to which the behaviour policy gave less than this carry no process reward: nothing was learned about them,
    and a contrastive loss moves probability to just such tokens. 0 = all carry it (paper)."""
    reference: Literal["behaviour", "frozen", "rebase"] = "behaviour"
    """``behaviour``: the policy that played the batch (paper). ``frozen``: the initial policy. ``rebase``: frozen, but
    moved (with the PRM) to the current policy every `rebase_every` iterations."""
    rebase_every: int = Field(default=10, ge=1)
    """Iterations from one ``rebase`` to the next."""
    order: Literal["update_then_score", "score_then_update"] = "update_then_score"
    """Whether the PRM rewards a batch after or before it has learned from it (algorithms.md 1.4)."""
    updates: int = Field(default=1, ge=1)
    """PRM optimiser steps per iteration."""
    groups_per_update: int | None = Field(default=None, ge=1)
    """Groups drawn for each PRM step; None takes all (new and replayed)."""
    replay_iterations: int = Field(default=1, ge=1)
    """Trajectories of the last k iterations enter each update, with the log-probs of their own behaviour policy."""
    holdout: float = Field(default=0.0, ge=0, lt=1)
    """Share of groups kept out of the update; further updates stop once their loss rises."""
    served_url: str | None = Field(default=None, pattern=r"^https?://[^/]")
    """URL of a PRM that scores turns (credit methods that need ``turn_scores``); its bearer token is taken from the
    environment variable ``AGENTRL_PRM_TOKEN``."""
    served_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds that the served PRM may stay silent before a request counts as failed."""

    @model_validator(mode="after")
    def _holdout_needs_updates(self) -> PRMConfig:
        if self.holdout > 0 and self.updates == 1:
            raise ValueError("prm.holdout stops further updates early: set prm.updates > 1, or prm.holdout=0")
        if self.reference == "rebase" and self.init is not None:
            raise ValueError(
                f"prm.reference=rebase gives the PRM the policy's weights, but prm.init={self.init!r} may be another "
                "network; leave prm.init out, or set prm.reference=frozen"
            )
        if self.centred and self.reference == "behaviour" and self.replay_iterations > 1:
            raise ValueError(
                "prm.centred with prm.reference=behaviour needs the whole distribution of the policy that played each "
                "trajectory, which is gone for replayed ones; set prm.replay_iterations=1 or prm.reference=frozen"
            )
        return self


class CreditConfig(Section):
    """The credit method, by name, and its own options (``agentrl.credit``)."""

    method: str = "oprl"
    """Name of a method (``agentrl credit`` lists all, those of installed packages too)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the method; unknown ones are refused."""


class CriticConfig(Section):
    """The value model of credit methods that need one (``ppo``)."""

    init: str | None = None
    """Model directory to start from; None starts from the policy's weights. The value head starts at zero."""
    lr: float = Field(default=1e-5, gt=0)
    """Learning rate (AdamW, constant)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """As ``policy_update.adam_eps``."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    clip: float | None = Field(default=0.2, gt=0)
    """A value may move this far from what it was when the batch was judged, in outcome units; None = no limit."""
    epochs: int = Field(default=1, ge=1)
    """Passes over each iteration's batch."""
    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps per epoch."""
    warmup_iterations: int = Field(default=0, ge=0)
    """Iterations in which only the critic learns and the policy stands still."""


class PolicyUpdateConfig(Section):
    """The clipped policy update (algorithms.md 7)."""

    lr: float = Field(default=1e-6, gt=0)
    """Largest learning rate (AdamW)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up; ``linear`` and ``cosine`` fall to a tenth of `lr` at the end of the run."""
    warmup_iterations: int = Field(default=0, ge=0)
    """Iterations in which the learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Floor of Adam's denominator. Rows of the LM head for tokens that are never sampled get tiny gradients, all of one
    sign; without a floor above these, Adam moves them at full speed and probability leaks to garbage. For networks far
    below a million parameters 1e-5 is right; large ones have smaller gradients and need a smaller floor."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    epochs: int = Field(default=1, ge=1)
    """Passes over each iteration's batch."""
    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps per epoch; whole trajectories are dealt out to them."""
    ratio: Literal["token", "turn", "turn_mean"] = "token"
    """Importance ratio per token (verl), product over the turn (OPRL Eq. 6), or its geometric mean (GSPO-like)."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """The importance ratio is clipped at 1 - this ..."""
    clip_high: float = Field(default=0.2, gt=0)
    """... and at 1 + this."""
    dual_clip: float | None = Field(default=3.0, gt=1)
    """Where an advantage A is negative, a token's loss is at most -A times this; None = no such limit."""
    aggregation: Literal[
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "turn-mean"
    ] = "token-mean"
    """How token losses become one loss (algorithms.md 7.2)."""
    aggregation_length: int = Field(default=1024, ge=1)
    """Constant of ``seq-mean-token-sum-norm``, in tokens."""
    unit_advantage: bool = False
    """Divide advantages by their standard deviation over the batch's action tokens, so that `kl_coef` and penalties
    weigh the same whatever the credit method."""
    invalid_action_penalty: float = Field(default=0.0, ge=0)
    """Subtracted from the advantage of turns whose text was no action (``info["valid_action"]`` is False)."""
    overlong_filter: Literal["none", "token_limit", "any_limit"] = "none"
    """Episodes that were cut off by the token limit, or by any limit, carry no policy loss; they stay in their group's
    statistics (DAPO's overlong filtering)."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL to the initial policy in the loss; 0 needs no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """With x = lp_new - lp_initial: x, x^2 / 2, or exp(-x) + x - 1 (algorithms.md 7.3)."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus in the loss."""
    tis: Literal["none", "token", "turn"] = "none"
    """Truncated importance sampling of the engine's distribution towards the trainer's own (algorithms.md 7.6): a
    token's loss times min(r, `tis_cap`), with r its own ratio or the product over its turn."""
    tis_cap: float = Field(default=2.0, gt=1)
    """Largest weight; also the bound c of the logged share of tokens with r outside [1/c, c]."""
    reject: Literal["none", "token", "turn", "turn_mean"] = "none"
    """Tokens carry no loss where r leaves [`reject_low`, `reject_high`]: their own, the product over the turn, or its
    geometric mean."""
    reject_low: float = Field(default=0.5, ge=0, lt=1)
    """Smallest r that is kept."""
    reject_high: float = Field(default=5.0, gt=1)
    """Largest r that is kept."""
    mismatch_tolerance: float = Field(default=1e-3, ge=0)
    """Nats: where no log-prob of the sample differs by more, `tis` and `reject` stay off and cost nothing further."""
    mismatch_sample: float = Field(default=0.1, gt=0, le=1)
    """Share of trajectories (at least one) that decides about it in each iteration; with several `minibatches` all do.
    A float32 run stops where one that was not looked at is more than 0.05 nats off."""
    tokens_per_microbatch: int = Field(default=16384, ge=16)
    """Token budget of one forward-backward pass: memory, never the result."""


class EvalConfig(Section):
    """Held-out evaluation."""

    every: int = Field(default=10, ge=0)
    """Iterations between evaluations, the untrained and the final policy included; 0 = none."""
    episodes: int = Field(default=256, ge=1)
    """Held-out tasks, one episode each."""
    seed: int = 10**12
    """Of the first held-out task; the next has seed + 1."""
    temperature: float | None = Field(default=None, ge=0)
    """None: the rollout's temperature; 0 = greedy."""


class CheckpointConfig(Section):
    """States that a run can be resumed from."""

    every: int = Field(default=10, ge=1)
    """Iterations between checkpoints. The last iteration always writes one."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""


class LogConfig(Section):
    """What is shown and written beside ``metrics.jsonl``."""

    tensorboard: bool = True
    """Scalars to ``tensorboard/`` in the run's folder, where TensorBoard is installed."""
    trackers: list[Literal["wandb", "mlflow"]] = Field(default_factory=list)
    """The same scalars to Weights & Biases or MLflow (``pip install 'agentrl[wandb]'``, ``'agentrl[mlflow]'``)."""
    progress: bool = True
    """A progress bar and a line per iteration on standard error."""


class RunConfig(Section):
    """A training run."""

    name: str = "run"
    """For titles."""
    run_dir: str = "runs/run"
    """Folder of the run: settings, metrics, trajectories, checkpoints, model."""
    seed: int = 0
    """Of tasks, actions, mini-batches and pair matching. Held-out tasks have `eval.seed`."""
    iterations: int = Field(default=100, ge=1)
    """Times to collect, judge and update."""
    env: EnvConfig = Field(default_factory=EnvConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    lora: LoRAConfig = Field(default_factory=LoRAConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    outcome: OutcomeConfig = Field(default_factory=OutcomeConfig)
    shaping: ShapingConfig = Field(default_factory=ShapingConfig)
    buffer: BufferConfig = Field(default_factory=BufferConfig)
    pairs: PairConfig = Field(default_factory=PairConfig)
    prm: PRMConfig = Field(default_factory=PRMConfig)
    credit: CreditConfig = Field(default_factory=CreditConfig)
    critic: CriticConfig = Field(default_factory=CriticConfig)
    policy_update: PolicyUpdateConfig = Field(default_factory=PolicyUpdateConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    @model_validator(mode="after")
    def _combinations(self) -> RunConfig:
        if self.rollout.top_p < 1 or self.rollout.top_k > 0:
            raise ValueError(
                f"rollout.top_p={self.rollout.top_p} / rollout.top_k={self.rollout.top_k} while training: the "
                "log-probs sampled from are renormalised over the kept tokens, the trainer's are not (no engine tells "
                "which tokens those were), and every importance ratio would be wrong; train with top_p=1, top_k=0 "
                "(evaluation may truncate)"
            )
        first, last = self.training_seeds()
        evaluated = range(self.eval.seed, self.eval.seed + self.eval.episodes)
        if not self.env.eval_kwargs and first < evaluated.stop and evaluated.start <= last:
            raise ValueError(
                f"eval.seed={self.eval.seed}: held-out tasks would be training tasks (seeds {first} to {last} with "
                f"seed={self.seed}); set another eval.seed, or env.eval_kwargs that make them differ"
            )
        if self.prm.replay_iterations > self.buffer.keep_iterations:
            raise ValueError(
                f"prm.replay_iterations={self.prm.replay_iterations} but the buffer keeps only "
                f"buffer.keep_iterations={self.buffer.keep_iterations}; raise the latter"
            )
        return self

    def training_seeds(self) -> tuple[int, int]:
        """First and last task seed that training can draw."""
        first = self.seed * 1_000_003
        collections = 1 + (self.rollout.max_refills if self.rollout.dynamic_sampling else 0)
        return first, first + (self.rollout.tasks or self.iterations * self.rollout.groups * collections) - 1
