"""First-party environments: plugins of `agentrl.envs`, one folder each, found through entry points.

A folder holds the environment, its scripted agents and a README with a transcript. Environments import `agentrl.envs`,
`agentrl.policy`, `agentrl.types` and `agentrl.errors`, and nothing above.
"""
