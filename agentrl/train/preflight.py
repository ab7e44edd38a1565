"""What can be refused before any work is refused here: names, options, models, folders, disk space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym

from agentrl.config import RunConfig
from agentrl.credit import load_credit
from agentrl.envs import environment_ids, make
from agentrl.errors import UnknownNameError, UserError
from agentrl.files import check_writable
from agentrl.models.load import check_model_dir
from agentrl.models.lora import check_peft, stored_parameters
from agentrl.policy import policy_names
from agentrl.train.checkpoint import checkpoints
from agentrl.train.trackers import check_trackers


def check_task(config: RunConfig) -> None:
    """Checks the credit method with its options, and that the environment can be made, to train and to evaluate.

    Raises:
        UserError: an unknown name, or arguments that are refused.
    """
    method, options = load_credit(config.credit.method, config.credit.options)
    if config.rollout.group_size == 1 and method.group_relative:
        raise UserError(
            f"rollout.group_size=1 with credit.method={method.name}: a group of one has no baseline: no "
            "outcome could be told good or bad; set rollout.group_size to 2 or more"
        )
    if method.check is not None:
        method.check(config)
    needs = method.needs_of(options)
    if "turn_scores" in needs and config.prm.served_url is None:
        raise UserError(f"credit.method={method.name} wants scores of a served PRM: set prm.served_url")
    env = config.env
    for kwargs in (env.kwargs, {**env.kwargs, **env.eval_kwargs}):
        made = make(env.id, max_turns=env.max_turns, wrappers=env.wrappers, **kwargs)
        try:
            if kwargs is env.kwargs:
                check_provides(made, needs, f"credit.method={method.name}")
        finally:
            made.close()


def check_provides(env: gym.Env[Any, Any], needs: frozenset[str], who: str) -> None:
    """Checks that an environment provides the state keys or turn rewards that `who` needs.

    Environments that declare nothing (any Gymnasium one) are taken to reward turns, and to have no state keys.

    Raises:
        UserError: names what is missing, the arguments that would bring it, and the environments that provide it.
    """
    inner = env.unwrapped
    declared = getattr(inner, "provides", {"turn_rewards": {}})
    for need in sorted(needs & {"state_keys", "turn_rewards"}):
        name = env.spec.id if env.spec is not None else type(inner).__name__
        if (wanted := declared.get(need)) is None:
            raise UserError(f"{who} needs {need!r}, which environment {name!r} does not provide; {_providers(need)}")
        missing = {key: value for key, value in wanted.items() if getattr(inner, key, None) != value}
        if missing:
            raise UserError(
                f"{who} needs {need!r}, which environment {name!r} provides with "
                + ", ".join(f"env.kwargs.{key}={value}" for key, value in missing.items())
            )


def _providers(need: str) -> str:
    """Which registered environments provide `need`, as the end of an error message."""
    found = []
    for env_id in environment_ids():
        entry = gym.spec(env_id).entry_point
        made = gym.envs.registration.load_env_creator(entry) if isinstance(entry, str) else entry
        if (wanted := getattr(made, "provides", {}).get(need)) is not None:
            found.append(env_id + "".join(f" with {key}={value}" for key, value in wanted.items()))
    return f"these do: {', '.join(found)}" if found else "no registered environment does"


def check_run(config: RunConfig) -> None:
    """Checks all that is known before a weight is read or a file is written.

    Raises:
        UserError: what cannot work, and the way out.
    """
    check_task(config)
    if config.model.engine not in policy_names():
        raise UnknownNameError("policy", config.model.engine, policy_names(), "agentrl policies lists all")
    if not config.model.path:
        raise UserError("model.path is empty: give a model directory (agentrl init-model makes a small one)")
    check_model_dir(config.model.path)
    for start in (config.prm.init, config.critic.init):
        if start is not None:
            check_model_dir(start)
    check_trackers(config.log.trackers)
    if config.lora.rank:
        check_peft()


def check_run_dir(config: RunConfig, *, resume: bool, need_bytes: int = 0) -> Path:
    """Makes the run's folder and checks that this run may and can write there.

    Args:
        config: the run.
        resume: an earlier run may lie there.
        need_bytes: free space that the run will need.

    Raises:
        UserError: another run lies there (its newest checkpoint would outlive every new one), the run would overwrite
            the model it starts from, the folder is not writable, or the disk has not enough room.
    """
    folder = Path(config.run_dir)
    if not resume and checkpoints(folder / "checkpoints"):
        raise UserError(f"{str(folder)!r} already holds a run; resume it, remove it, or choose another run_dir")
    for start in (config.model.path, config.prm.init, config.critic.init):
        for written in (folder / "model", folder / "checkpoints"):
            if start and Path(start).resolve().is_relative_to(written.resolve()):
                raise UserError(f"this run would overwrite {start!r}, which it starts from; choose another run_dir")
    return check_writable(folder, need_bytes)


def needed_bytes(trained: Sequence[Any], stored: Sequence[Any], keep: int, present: int) -> int:
    """Returns the disk space that checkpoints and the final model will take, in bytes; trajectories come on top.

    Adapters are stored without their base; the final model is merged.

    One more checkpoint than `keep` lies on the disk while it is being written, and one more final model. A model that
    is trained is stored with the two moments of AdamW, each as large as its weights.

    Args:
        trained: models that are trained, the policy first.
        stored: models that are stored as they are.
        keep: checkpoints that are kept.
        present: checkpoints that lie there already.
    """
    checkpoint = 3 * sum(map(_stored_bytes, trained)) + sum(map(_stored_bytes, stored))
    return (keep + 1 - min(present, keep)) * checkpoint + 2 * _weight_bytes(trained[0])


def _weight_bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _stored_bytes(model: Any) -> int:
    """What a checkpoint holds of a model: all its weights, or its adapter."""
    return sum(p.numel() * p.element_size() for p in stored_parameters(model))
