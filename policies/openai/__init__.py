"""Any server that speaks OpenAI's protocol: chat or completions, for evaluation, collecting, partners and judges."""

from policies.openai.policy import OpenAIPolicy

__all__ = ["OpenAIPolicy"]
