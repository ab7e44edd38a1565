"""Any causal LM directory that `transformers` loads, with a batched sampler that keeps its KV cache across turns."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policies.transformers.policy import TransformersPolicy as TransformersPolicy

__all__ = ["TransformersPolicy"]


def __getattr__(name: str) -> Any:
    if name == "TransformersPolicy":
        from policies.transformers.policy import TransformersPolicy

        return TransformersPolicy
    raise AttributeError(name)
