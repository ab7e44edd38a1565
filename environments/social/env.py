"""`SocialEnv`: two characters with private goals talk; a judge says how well each did. SOTOPIA's episode as a text
environment (arXiv 2310.11667)."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

from agentrl.envs import TextEnv
from agentrl.envs.core import Step
from agentrl.errors import ActionError, EnvironmentFailure, UserError
from agentrl.policy import ModelPolicy, Policy, PolicyRequest, load_policy
from agentrl.types import Message, text_of
from environments.social.actions import ActionType, SocialAction, parse
from environments.social.client import ChatClient, Usage
from environments.social.deals import TEST_ONE_IN, Split
from environments.social.judge import DIMENSIONS, evaluate
from environments.social.profiles import AgentProfile, Cast, Relationship, load_casts, shown_to

_INSTRUCTIONS = """You play a character in a conversation with another. Stay true to the character and reach their goal.
Answer with what they say now. Or with one of: [non-verbal] a gesture, [action] something they do, [none], [leave] to
end the conversation, which you should do once the goal is reached or out of reach."""


class SocialEnv(TextEnv):
    """A dialogue of two characters, each with a goal that the other does not know.

    The first observation holds the scene, the character and the goal; later ones what the partner did. The partner is
    any policy. The dialogue ends when somebody leaves or after `turns` turns, those of both counted, as in SOTOPIA; a
    judge then scores it. The reward is the goal score (0 to 10), at the end.

    A judge or partner that stays down, slow or senseless after its retries raises `EnvironmentFailure`: the episode is
    then no failure of the agent, and is not scored.

    ``partner="self"`` is self-chat: the same policy plays both characters in turn. The observation says who is to act,
    and is complete, since the conversation of one seat must not be seen from the other: use ``history: window(0)``.
    The reward is then the mean of both characters' scores.

    `info` holds `success` (a goal score strictly above `threshold`), `valid_action`, `seat` (0 or 1: whose turn it is)
    and `reward_parts`, the seven dimensions by name, at the end; beside them `scores` (both characters' dimensions)
    and `usage` (calls, attempts, tokens, seconds and cost of `judge` and `partner`). Text that is no action does not
    use up a turn of the dialogue, but `turns` invalid ones in a row are taken for leaving.

    ``reset(options={"cast": key})`` plays a given `Cast` (by its `key`) instead of a drawn one.

    Args:
        judge_url: OpenAI-compatible base address of the judge. There is no score without one.
        judge_model: its name there.
        judge_options: further settings of its `ChatClient` (key_env, timeout_s, retries, backoff_s, ...).
        partner: name of a policy without tokens (``agentrl policies``), base address of a served model, or ``self``.
        partner_model: name of the served model.
        partner_options: options of the policy, or further settings of the partner's `ChatClient`.
        scenarios: file or folder of profiles (`environments.social.profiles`); None: those that ship.
        difficulty: ``easy`` or ``hard``: scenarios with this tag.
        seat: which character the agent plays; None: drawn.
        turns: turns of a dialogue, those of both characters together (at least 2).
        max_turns: answers of the agent, invalid ones included, after which the dialogue is over as well; None: no such
            limit. `agentrl.make` and a run's `env.max_turns` set this, not Gymnasium's `TimeLimit`: an episode that
            is cut off from outside was never judged.
        threshold: goal score that a success exceeds.
        split: ``train`` and ``test`` never share a scenario.

    Raises:
        UserError: no judge, or a setting out of its range.
        DataError: a bad profile file.
    """

    reward_range = (0.0, 10.0)
    local_arguments = frozenset(
        {"judge_url", "judge_model", "judge_options", "partner", "partner_model", "partner_options", "scenarios"}
    )

    def __init__(
        self,
        *,
        judge_url: str | None = None,
        judge_model: str = "default",
        judge_options: Mapping[str, Any] | None = None,
        partner: str = "social-talker",
        partner_model: str = "default",
        partner_options: Mapping[str, Any] | None = None,
        scenarios: str | Path | None = None,
        difficulty: Literal["all", "easy", "hard"] = "all",
        seat: Literal[0, 1] | None = None,
        turns: int = 20,
        max_turns: int | None = None,
        threshold: float = 6.0,
        split: Split = "all",
        render_mode: Literal["ansi"] | None = None,
    ) -> None:
        super().__init__()
        if not judge_url:
            raise UserError(
                "judge_url: Social-v0 is scored by a model; give the OpenAI-compatible address of one "
                "(judge_url=http://localhost:8000/v1), or use Bargain-v0, which is scored by rule"
            )
        if turns < 2:
            raise UserError(f"turns={turns}: at least one for each character")
        if max_turns is not None and max_turns < 1:
            raise UserError(f"max_turns={max_turns}: at least one answer of the agent, or none for no limit")
        if not 0 <= threshold < 10:
            raise UserError(f"threshold={threshold}: from 0 to below 10, the best score")
        if seat not in (None, 0, 1):
            raise UserError(f"seat={seat!r}: 0, 1, or none to draw it")
        if split not in get_args(Split) or difficulty not in ("all", "easy", "hard"):
            raise UserError(f"split={split!r}, difficulty={difficulty!r}: all, train, test; all, easy, hard")
        self.judge = _client("judge", judge_url, judge_model, judge_options, temperature=0.0)
        self.self_chat = partner == "self"
        self.partner, self.partner_options = partner, dict(partner_options or {})
        self._client: ChatClient | None = None
        self._policy: Policy | None = None
        if partner.startswith(("http://", "https://")):
            more = {"temperature": 1.0, "max_tokens": 300}
            self._client = _client("partner", partner, partner_model, self.partner_options, **more)
        elif not self.self_chat:
            self._policy = self._load_partner()
        self.casts = {
            cast.key: cast
            for cast in load_casts(scenarios)
            if in_split(cast, split) and difficulty in ("all", cast.scenario.tag)
        }
        if not self.casts:
            raise UserError(f"no scenario of split={split!r} and difficulty={difficulty!r} in {scenarios or 'ours'}")
        self.seat, self.turns, self.threshold, self.render_mode = seat, turns, threshold, render_mode
        self.max_turns = max_turns
        self.instructions = _INSTRUCTIONS

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_policy": None}  # policies are often closures; it is loaded again when needed

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        names, drawn = list(self.casts), int(self.np_random.integers(2))
        key = options.get("cast", names[int(self.np_random.integers(len(names)))])
        if key not in self.casts:
            raise UserError(f"cast={key!r}: one of {len(names)}, for example {names[0]!r}")
        self._cast, self._invalid, self._answers = self.casts[key], 0, 0
        self._dialogue: list[str] = []
        self._usage = {"judge": Usage(), "partner": Usage()}
        self._partner_seed = int(self.np_random.integers(2**31))
        self._seat = 0 if self.self_chat else drawn if self.seat is None else self.seat
        self._over = False
        if self._seat == 1:
            self._let_partner_act()
        return self._view(self._seat), self._info()

    def parse_action(self, text: str) -> SocialAction:
        """See `environments.social.actions.parse`."""
        return parse(text)

    def play(self, action: SocialAction) -> Step:
        self._invalid = 0
        self._answers += 1
        self._add(self._seat, action)
        self._over = self._over or self._answers == self.max_turns
        if self.self_chat:
            self._seat = 1 - self._seat
        elif not self._over:
            before = len(self._dialogue)
            self._let_partner_act()
            if not self._over:
                return "\n".join([*self._dialogue[before:], self._prompt(self._seat)]), 0.0, False, self._info()
        return self._result() if self._over else (self._view(self._seat), 0.0, False, self._info())

    def on_invalid(self, error: ActionError) -> Step:
        self._invalid += 1
        self._answers += 1
        if self._invalid < self.turns and self._answers != self.max_turns:
            observation, *_ = super().on_invalid(error)
            return observation, 0.0, False, self._info()
        self._add(self._seat, SocialAction(ActionType.LEAVE))
        return self._result()

    def _add(self, seat: int, action: SocialAction) -> None:
        self._dialogue.append(action.told(self._cast.agents[seat].first_name))
        self._over = action.type is ActionType.LEAVE or len(self._dialogue) >= self.turns

    def _load_partner(self) -> Policy:
        try:
            policy = load_policy(self.partner, **self.partner_options)
        except TypeError as error:
            raise UserError(f"partner {self.partner!r} cannot be made with {self.partner_options}: {error}") from error
        if isinstance(policy, ModelPolicy):
            raise UserError(f"partner {self.partner!r} needs token contexts; serve the model and give partner its URL")
        return policy

    def _let_partner_act(self) -> None:
        """Adds the partner's turn to the dialogue.

        Raises:
            EnvironmentFailure: it gives no usable answer.
        """
        seat, usage = 1 - self._seat, self._usage["partner"]
        view, turn = self._view(seat), len(self._dialogue)
        messages = (Message(role="system", content=self.instructions), Message(role="user", content=view))
        if self._client is not None:
            plain = [{"role": message.role, "content": text_of(message.content)} for message in messages]
            self._add(seat, self._client.ask(plain, _readable, usage))
            return
        self._policy = self._policy or self._load_partner()
        seed = self._partner_seed + turn
        request = PolicyRequest(f"partner-{self._partner_seed}", turn, view, messages, self._info(seat), seed=seed)
        usage.calls, usage.attempts = usage.calls + 1, usage.attempts + 1
        text = _answer(self._policy, request)
        try:
            self._add(seat, parse(text))
        except ActionError as error:
            raise EnvironmentFailure(f"partner {self.partner!r} answered {text!r:.80}: {error}") from error

    def _result(self) -> Step:
        """Asks the judge.

        Raises:
            EnvironmentFailure: it gives no usable answer.
        """
        scores = evaluate(self.judge, self._told(None), self._usage["judge"])
        seats = (0, 1) if self.self_chat else (self._seat,)
        parts = {name: sum(float(getattr(scores[seat], name)) for seat in seats) / len(seats) for name in DIMENSIONS}
        info = {
            **self._info(),
            "success": parts["goal"] > self.threshold,
            "reward_parts": parts,
            "scores": [score.model_dump() for score in scores],
        }
        return "\n".join([*self._dialogue[-2:], "The conversation is over."]), parts["goal"], True, info

    def _info(self, seat: int | None = None) -> dict[str, Any]:
        return {
            "cast": self._cast.key,
            "seat": self._seat if seat is None else seat,
            "turns_left": self._left(self._seat if seat is None else seat),
            "usage": {name: usage.as_dict() for name, usage in self._usage.items()},
        }

    def _view(self, seat: int) -> str:
        return f"{self._told(seat)}\n\n{self._prompt(seat)}"

    def _prompt(self, seat: int) -> str:
        return f"You are {self._cast.agents[seat].first_name}. Turns left: {self._left(seat)}. What do you do?"

    def _left(self, seat: int) -> int:
        """Turns of the dialogue that are left before `seat` acts, by both limits."""
        left = self.turns - len(self._dialogue)
        if self.max_turns is None:
            return left
        answers = self.max_turns - self._answers
        # The agent has the last word: before its own turn the partner has one turn fewer ahead of it.
        both = answers if self.self_chat else 2 * answers - (seat == self._seat)
        return max(0, min(left, both))

    def _told(self, seat: int | None) -> str:
        """The scene, the characters and the dialogue, as one of them or (None) the judge may know them."""
        scenario, agents = self._cast.scenario, self._cast.agents
        lines = [f"Scenario: {shown_to(scenario.scenario, seat)}"]
        for number, agent in enumerate(agents):
            all_of_it = seat is None or seat == number
            title = f"Character {number + 1}" if seat is None else "You" if seat == number else "The other"
            lines.append(f"{title}: {describe(agent, None if all_of_it else scenario.relationship)}")
            if all_of_it:
                goal = shown_to(scenario.agent_goals[number], seat)
                lines.append(f"Goal of {agent.first_name}: {goal}")
        lines.append("Dialogue:" if self._dialogue else "Nobody has spoken yet.")
        return "\n".join([*lines, *self._dialogue])


def describe(agent: AgentProfile, relationship: Relationship | None = None) -> str:
    """Returns what one who stands in `relationship` to `agent` knows of them; None: all, the secret included.

    Strangers and those who know the name know the name; acquaintances the public side; friends, partners and family
    the personality too.
    """
    if relationship is not None and relationship < Relationship.ACQUAINTANCE:
        return f"{agent.full_name}."
    who = [str(agent.age) if agent.age else "", agent.gender, agent.occupation, agent.gender_pronoun]
    facts = [", ".join([agent.full_name, *filter(None, who)]), agent.public_info]
    if relationship is None or relationship > Relationship.ACQUAINTANCE:
        facts += [agent.big_five, agent.personality_and_values, agent.decision_making_style and _style(agent)]
        facts += [", ".join(values) for values in (agent.moral_values, agent.schwartz_personal_values)]
    if relationship is None and agent.secret:
        facts.append(f"Secret: {agent.secret}")
    return " ".join(fact if fact.endswith(".") else f"{fact}." for fact in facts if fact)


def in_split(cast: Cast, split: Split) -> bool:
    """Whether a cast belongs to `split`: one scenario in `TEST_ONE_IN` is for tests, by a hash of its text."""
    if split == "all":
        return True
    digest = hashlib.sha256(cast.scenario.scenario.encode()).digest()
    return (int.from_bytes(digest[:8], "big") % TEST_ONE_IN == 0) == (split == "test")


def _style(agent: AgentProfile) -> str:
    return f"Decides: {agent.decision_making_style}"


def _client(who: str, url: str, model: str, options: Mapping[str, Any] | None, **defaults: Any) -> ChatClient:
    try:
        return ChatClient(url, model, **{**defaults, **(options or {})})
    except TypeError as error:
        raise UserError(f"{who}_options={dict(options or {})}: {error}") from error


def _readable(text: str) -> SocialAction:
    try:
        return parse(text)
    except ActionError as error:
        raise ValueError(f"{text!r:.80} is no action: {error}") from error


def _answer(policy: Policy, request: PolicyRequest) -> str:
    """One answer of an asynchronous policy, whether or not a loop is running in this thread (a notebook has one)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(policy.act([request]))[0].text
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(policy.act([request]))[0].text).result()
