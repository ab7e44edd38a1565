"""Two agents with goals of their own: SOTOPIA's social dialogues, and bargaining that is scored by rule."""

from agentrl.envs import register

register(
    "Bargain-v0",
    "environments.social.bargain:BargainEnv",
    max_turns=50,
    summary="agree on several issues with a partner whose values are private; the deal is scored by rule",
    agents={"random": "random", "naive": "bargain-agreeable", "expert": "bargain-expert"},
)
register(
    "Social-v0",
    "environments.social.env:SocialEnv",
    summary="talk towards a private goal, as in SOTOPIA; scored by an LLM judge (needs judge_url)",
    agents={"random": "social-random", "naive": "social-talker"},
    ends_itself=True,
)
