"""First-party policies: plugins of `agentrl.policy`, one folder each, found through entry points.

Policies import `agentrl.policy`, `agentrl.types` and `agentrl.errors`, and what they drive (torch, transformers, ...).
"""
