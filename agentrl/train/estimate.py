"""What a run will take, before it runs: tokens and floating-point operations, and what looks wrong.

The network's shape comes from its `config.json`; no weight is read. Episode lengths come from episodes of the random
agent where the environment lists its actions, and from the limits of the configuration otherwise: then all figures are
upper bounds. `agentrl.train.footprint` makes its memory of these.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from agentrl.config import RunConfig
from agentrl.config.schema import EnvConfig, parse_history
from agentrl.credit import load_credit


@dataclass(frozen=True)
class Shape:
    """What of a network decides its memory and its work."""

    parameters: int
    layers: int
    hidden: int
    heads_width: int
    """Query heads x head size."""
    kv_width: int
    """Key-value heads x head size."""
    mlp: int
    vocab: int
    head_norms: bool = False
    """Queries and keys are normed (Qwen3)."""

    @property
    def body(self) -> int:
        """Parameters of the layers: those that multiply every token."""
        attention = 2 * self.hidden * (self.heads_width + self.kv_width)
        return self.layers * (attention + 3 * self.hidden * self.mlp)


@dataclass(frozen=True)
class Lengths:
    """Typical episodes."""

    turns: float
    prompt: float
    """New context tokens of a turn: the observation and the template's marks."""
    start: float
    """Further tokens of the first context: the instructions."""
    action: float
    """Sampled tokens of a turn."""
    measured: bool
    """From played episodes; False: the limits of the configuration."""
    longest: float = 0.0
    """Turns of the longest episode; 0: not more than the typical one's."""
    tokenizer: bool = True
    """False: tokens were not counted but taken as 3 characters each, for want of the model."""


@dataclass(frozen=True)
class Item:
    """A line of the estimate."""

    name: str
    value: float
    how: str


def read_shape(path: str) -> Shape:
    """Returns the shape of the model in the directory `path`.

    Raises:
        ModelError: no such model, or a network whose sizes it does not tell.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from agentrl.errors import ModelError
    from agentrl.models.load import check_model_dir, load_network_config

    check_model_dir(path)
    config = load_network_config(path)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return Shape(
            parameters=sum(p.numel() for p in model.parameters()),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads_width=heads * width,
            kv_width=(getattr(config, "num_key_value_heads", None) or heads) * width,
            mlp=config.intermediate_size,
            vocab=config.vocab_size,
            head_norms=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        )
    except (AttributeError, ValueError, OSError) as error:
        raise ModelError(f"model {path!r}: its sizes cannot be read ({error}); no estimate") from error


def measure_lengths(config: RunConfig, episodes: int = 16) -> Lengths:
    """Returns typical lengths: the random agent's, read by the model's tokenizer, or else the limits.

    Args:
        config: the run.
        episodes: episodes that are played; 0 takes the limits.
    """
    limits = _limits(config)
    if not episodes:
        return limits
    from agentrl.errors import AgentRLError, UserError
    from agentrl.evaluate import evaluate
    from agentrl.models.load import load_tokenizer
    from agentrl.policy import load_policy
    from agentrl.types import Trajectory, text_of

    played: list[Trajectory] = []
    env = EnvConfig(**{**config.env.model_dump(), "eval_kwargs": {}})
    try:
        evaluate(
            load_policy("random"), env, episodes=episodes, seed=config.training_seeds()[0], on_episode=played.append
        )
    except AgentRLError:  # no listed actions, no server: the limits are all that is known
        return limits
    tokenizer: Any = None
    with suppress(UserError):
        tokenizer = load_tokenizer(config.model.path)

    def count(text: str) -> float:
        if tokenizer is None:
            return len(text) / 3
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    scored = [one for one in played if one.scorable and one.turns]
    turns = [turn for one in scored for turn in one.turns]
    marks = 8.0  # the template's own ids around an observation and an action
    return Lengths(
        turns=fmean(len(one.turns) for one in scored),
        prompt=fmean(count(text_of(turn.observation)) for turn in turns) + marks,
        start=float(count(scored[0].instructions if env.instructions is None else env.instructions)),
        action=min(fmean(count(turn.action) for turn in turns) + 1, config.rollout.max_new_tokens),
        measured=True,
        longest=float(max(len(one.turns) for one in scored)),
        tokenizer=tokenizer is not None,
    )


def _limits(config: RunConfig) -> Lengths:
    import gymnasium as gym

    spec = gym.registry.get(config.env.id)
    turns = config.env.max_turns or (spec.max_episode_steps if spec is not None else None) or 20
    action = config.rollout.max_new_tokens
    room = config.rollout.max_context_tokens
    full = parse_history(config.rollout.history) is None
    prompt = max(1.0, room / turns - action) if full else float(room - action)
    return Lengths(float(turns), prompt, 0.0, float(action), measured=False)


@dataclass(frozen=True)
class Work:
    """Tokens of one iteration. ``row`` is the mean length of a row that a model reads."""

    episodes: int
    sampled: float
    rows: float
    """Tokens of all rows."""
    read: float
    """Those that one scoring pass reads: on a CPU what rows begin with alike is read once, as far as it is known here
    (instructions, and a group's first observation)."""
    row: float
    context: float
    """Longest context of an episode."""


def work_of(config: RunConfig, lengths: Lengths) -> Work:
    """Returns the tokens of one iteration. With full history a row is an episode, else each turn is one."""
    episodes = config.rollout.groups * config.rollout.group_size
    sampled = min(lengths.turns * lengths.action, config.rollout.max_episode_tokens or math.inf)
    window = parse_history(config.rollout.history)
    turn = lengths.prompt + lengths.action
    whole = lengths.start + lengths.turns * turn
    if window is None:
        row, rows = whole, 1.0
        longest = lengths.start + max(lengths.longest, lengths.turns) * turn
    else:
        row, rows = lengths.start + min(window + 1, lengths.turns) * turn, max(1.0, lengths.turns - window)
        longest = row
    limit = float(config.rollout.max_context_tokens)
    row = min(row, limit)
    total = episodes * rows * row
    alike = (episodes * rows - 1) * lengths.start
    if window is None:
        alike += (episodes - config.rollout.groups) * lengths.prompt
    read = max(total - alike, row) if config.model.device == "cpu" else total
    return Work(episodes, episodes * sampled, total, read, row, min(longest, limit))


def models_of(config: RunConfig) -> dict[str, bool]:
    """Returns the models that a run holds beside the policy: name -> whether it is trained."""
    method, options = load_credit(config.credit.method, config.credit.options)
    needs = method.needs_of(options)
    found = {}
    if "prm" in needs:
        found["prm"] = True
        if config.prm.reference == "rebase":
            found["prm reference"] = False
    frozen = "prm" in needs and config.prm.reference == "frozen"
    if "reference" in needs or config.policy_update.kl_coef > 0 or frozen:
        found["reference"] = False
    if "values" in needs:
        found["critic"] = True
    return found


def cost(config: RunConfig, shape: Shape, work: Work) -> list[Item]:
    """Returns the floating-point operations of one iteration by phase.

    A token that is read costs 2 B (B: parameters of the layers) and 4 x layers x Q x context / 2 for attention; one
    that is sampled or scored costs the LM head's 2 H V as well. A backward pass costs twice the forward. Sampling reads
    each token of a growing row once (KV cache), each row of a window anew.
    """
    per_read = 2 * shape.body + 2 * shape.layers * shape.heads_width * work.row
    forward = work.read * per_read + work.sampled * 2 * shape.hidden * shape.vocab
    others = models_of(config)
    update = config.policy_update
    found = [Item("sampling", forward, f"{work.sampled:,.0f} tokens sampled, {work.read:,.0f} read")]
    passes = sum(1 for name, trained in others.items() if not trained)
    if passes:
        found.append(Item("reference", forward * passes, f"{passes} pass{'es' if passes > 1 else ''} without gradient"))
    if "prm" in others:
        found.append(
            Item(
                "prm",
                forward * (2 + 4 * config.prm.updates),
                f"2 scoring passes, {config.prm.updates} two-pass updates",
            )
        )
    if "critic" in others:
        epochs = config.critic.epochs
        found.append(Item("critic", forward * (1 + 3 * epochs), f"1 scoring pass, {epochs} epochs of updates"))
    own = int(update.minibatches > 1)
    how = f"{update.epochs} epochs: {work.read:,.0f} tokens trained" + ", 1 scoring pass" * own
    found.append(Item("policy", forward * (3 * update.epochs + own), how))
    return found


def warnings_of(config: RunConfig) -> list[str]:
    """Returns what runs, or would be refused when it starts, and is probably not meant; each with the way out.

    What `agentrl.train.preflight.check_task` refuses is in it too, in its words.
    """
    from agentrl.errors import UserError
    from agentrl.train.preflight import check_task

    found = []
    try:
        check_task(config)
    except UserError as error:
        found.append(f"refused at the start: {error}")
    method, options = load_credit(config.credit.method, config.credit.options)
    needs = method.needs_of(options)
    rollout, update, prm = config.rollout, config.policy_update, config.prm
    window = parse_history(rollout.history)
    if window is not None and ("prm" in needs or "turn_scores" in needs):
        seen = f"the last {window} turns and the current observation" if window else "the current observation alone"
        reads = "the whole episode" if "turn_scores" in needs else "no more than the policy"
        found.append(
            f"rollout.history={rollout.history} with a PRM: the policy sees {seen}, the PRM reads {reads}; where a "
            "turn's worth lies further back take rollout.history=full"
        )
    if "prm" in needs and prm.reference == "behaviour" and config.iterations > 20:
        found.append(
            "prm.reference=behaviour over many iterations: what policy and PRM have both learned cancels out of the "
            "step reward; prm.reference=frozen keeps it"
        )
    if "prm" in needs and rollout.group_size < 4:
        found.append(
            f"rollout.group_size={rollout.group_size} with a PRM: most groups will be all successes or all failures "
            "and give no preference pair; 8 is usual"
        )
    if update.epochs * update.minibatches > 16:
        found.append(
            f"{update.epochs} epochs x {update.minibatches} mini-batches: the policy moves far from the one that "
            "played, and the clip then cuts most of the gradient; take fewer"
        )
    if not config.eval.every:
        found.append("eval.every=0: no held-out evaluation, so that nothing tells learning from memorising")
    if config.eval.every and config.eval.episodes < 100:
        found.append(
            f"eval.episodes={config.eval.episodes}: the 95 % interval of a success rate near 1/2 is "
            f"+-{100 * 0.98 / config.eval.episodes**0.5:.0f} points wide"
        )
    if rollout.tasks and rollout.tasks < rollout.groups:
        found.append(
            f"rollout.tasks={rollout.tasks} < rollout.groups={rollout.groups}: a task occurs several times in one "
            "iteration; raise the pool or lower the groups"
        )
    if rollout.temperature != 1.0:
        found.append(
            f"rollout.temperature={rollout.temperature:g}: log-probs and ratios are taken at this temperature; "
            "evaluate at the same (eval.temperature is unset then) or say so"
        )
    return found
