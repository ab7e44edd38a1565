"""A PRM behind HTTP that scores turns in [0, 1]: a verifier, a judge model, a discriminative PRM.

One request carries some trajectories, without their outcomes, and the answer one score per turn, in the same order:

    POST url   {"version": 1, "trajectories": [{"id", "instructions", "turns": [{"observation", "action"}]}]}
    200        {"scores": [[0.1, 0.9], [0.5]]}

What may heal (no connection, no answer in time, 429, 5xx) is tried again after a random, growing pause; what will not
(another 4xx, a wrong answer) is an error at once. Text parts of observations are sent, pictures are not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from agentrl.errors import DataError, InfrastructureError, UserError
from agentrl.http import bearer_headers, bearer_key, heals, pause
from agentrl.types import Trajectory, text_of


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True)

    scores: list[list[float]]


class ServedPRM:
    """A client of one PRM server; safe to use from several threads.

    Args:
        url: where to POST.
        timeout_s: seconds to connect, and seconds that the server may stay silent.
        retries: further attempts of a request.
        concurrency: requests in flight at once.
        token_env: environment variable with a bearer token; none is sent where it is unset or empty.
        chunk: trajectories of one request.
        backoff_s: the pause after failed attempt n = 0, 1... is drawn from 0.5..1 times `backoff_s` 2^n seconds; a
            longer ``Retry-After`` is respected.

    Raises:
        UserError: `url` or the token cannot be sent.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 60.0,
        retries: int = 3,
        concurrency: int = 8,
        token_env: str = "AGENTRL_PRM_TOKEN",
        chunk: int = 16,
        backoff_s: float = 0.5,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"the URL of a served PRM starts with http:// or https://, not {url!r}")
        self.url, self.timeout_s, self.retries = url, timeout_s, retries
        self.concurrency, self.chunk, self.backoff_s, self.token_env = concurrency, chunk, backoff_s, token_env
        headers = bearer_headers(bearer_key(token_env))
        limits = httpx.Limits(max_connections=concurrency)
        self._client = httpx.Client(timeout=timeout_s, headers=headers, limits=limits)

    def score(self, trajectories: Sequence[Trajectory]) -> torch.Tensor:
        """Returns (M,) float64 scores in [0, 1] of all turns of `trajectories`, in order.

        Raises:
            InfrastructureError: the server cannot be reached, is too slow or fails, after all attempts.
            DataError: its answer has another shape, or a score is outside [0, 1]; names trajectory and turn.
            UserError: it refuses the request.
        """
        chunks = [trajectories[start : start + self.chunk] for start in range(0, len(trajectories), self.chunk)]
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="agentrl-prm") as pool:
            scores = [score for answer in pool.map(self._score, chunks) for turns in answer for score in turns]
        return torch.tensor(scores, dtype=torch.float64)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _score(self, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        answer = self._post({"version": 1, "trajectories": [_payload(t) for t in trajectories]})
        try:
            scores = _Answer.model_validate_json(answer.content).scores
        except ValidationError as error:
            fault = error.errors()[0]
            raise DataError(f"the PRM at {self.url}: {_place(fault['loc'], trajectories)}{fault['msg']}") from None
        if len(scores) != len(trajectories):
            which = f"{len(trajectories)} ({trajectories[0].id!r} to {trajectories[-1].id!r})"
            raise DataError(f"the PRM at {self.url}: scores of {len(scores)} trajectories for {which}")
        for trajectory, row in zip(trajectories, scores, strict=True):
            if len(row) != len(trajectory.turns):
                turns = len(trajectory.turns)
                odd = f"turn {len(row)} has none" if len(row) < turns else f"there is no turn {turns}"
                raise DataError(
                    f"the PRM at {self.url}: trajectory {trajectory.id!r}: {len(row)} scores for {turns} turns: {odd}"
                )
            for number, score in enumerate(row):
                if not 0 <= score <= 1:
                    raise DataError(
                        f"the PRM at {self.url}: trajectory {trajectory.id!r}, turn {number}: score {score} is outside "
                        "[0, 1]; squash it on the server (a sigmoid turns logits into probabilities)"
                    )
        return scores

    def _post(self, body: dict[str, object]) -> httpx.Response:
        """Returns the first good answer."""
        answer: httpx.Response | None = None
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(pause(attempt, self.backoff_s, answer))
            answer = None
            try:
                answer = self._client.post(self.url, json=body)
            except httpx.TimeoutException:
                reason = f"no answer within {self.timeout_s:g} s (prm.served_timeout_s)"
                continue
            except httpx.RequestError as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            if answer.is_success:
                return answer
            reason = f"HTTP {answer.status_code} {answer.reason_phrase}: {answer.text[:200]}"
            if not heals(answer.status_code):
                raise UserError(f"the PRM at {self.url} refuses: {reason}; check the URL and ${self.token_env}")
        raise InfrastructureError(f"the PRM at {self.url} failed {self.retries + 1} times, the last: {reason}")


def _payload(trajectory: Trajectory) -> dict[str, object]:
    turns = [{"observation": text_of(turn.observation), "action": turn.action} for turn in trajectory.turns]
    return {"id": trajectory.id, "instructions": trajectory.instructions, "turns": turns}


def _place(loc: tuple[int | str, ...], trajectories: Sequence[Trajectory]) -> str:
    """Says in words where in ``scores[i][t]`` a mistake is."""
    match loc:
        case ("scores", int(i), *rest) if i < len(trajectories):
            return f"trajectory {trajectories[i].id!r}, " + (f"turn {rest[0]}: " if rest else "")
    return f"{'.'.join(map(str, loc))}: " if loc else ""
