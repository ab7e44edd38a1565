"""Multi-hop questions over a synthetic encyclopedia, answered with search and open, and scripted agents."""

from agentrl.envs import register

register(
    "SearchQA-v0",
    "environments.search_qa.env:SearchQAEnv",
    max_turns=12,
    summary="answer multi-hop questions by searching and reading a small encyclopedia",
    agents={"random": "search-qa-random", "naive": "search-qa-naive", "expert": "search-qa-expert"},
)
