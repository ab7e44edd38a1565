"""One `RunConfig` for a run: YAML file, dotted overrides, unknown keys refused."""

from agentrl.config.load import config_sha256, dotted, dump_config, load_config
from agentrl.config.schema import (
    BufferConfig,
    CheckpointConfig,
    CreditConfig,
    EnvConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OutcomeConfig,
    PairConfig,
    PolicyUpdateConfig,
    PRMConfig,
    RolloutConfig,
    RunConfig,
)

__all__ = [
    "BufferConfig",
    "CheckpointConfig",
    "CreditConfig",
    "EnvConfig",
    "EvalConfig",
    "LogConfig",
    "ModelConfig",
    "OutcomeConfig",
    "PRMConfig",
    "PairConfig",
    "PolicyUpdateConfig",
    "RolloutConfig",
    "RunConfig",
    "config_sha256",
    "dotted",
    "dump_config",
    "load_config",
]
