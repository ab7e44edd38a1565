"""vLLM as the engine: in this process, as a server started and watched here, or one that runs already."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policies.vllm.policy import VLLMPolicy as VLLMPolicy

__all__ = ["VLLMPolicy"]


def __getattr__(name: str) -> Any:
    if name == "VLLMPolicy":
        from policies.vllm.policy import VLLMPolicy

        return VLLMPolicy
    raise AttributeError(name)
