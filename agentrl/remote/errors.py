"""What a server's errors are on the client's side: typed, with the server's message.

What the user must mend is a `Refused` (a `UserError`); what ends an episode through no fault of the agent is a `Failed`
(an `EnvironmentFailure`, so that the collector plays the episode again) or, past a deadline, a `TooLate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from agentrl.errors import AgentRLError, DeadlineExceeded, EnvironmentFailure, UserError
from agentrl.remote.protocol import STATUS, Code, ErrorAnswer, ErrorBody


class RemoteError(AgentRLError):
    """Base of what can go wrong with a served environment."""

    code: Code | None = None
    """None where the server did not say: no connection, no answer, an answer of something else on its port."""

    def __init__(
        self, message: str, *, status: int | None = None, field: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status, where there was an answer."""
        self.field = field
        """The field that is wrong (`InvalidRequest`)."""
        self.retry_after_s = retry_after_s
        """Seconds after which the server asks to be tried again."""
        self.retry_at = 0.0
        """`time.monotonic` of the next attempt, if there is one: the same for all that failed together."""

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed a little later, at the same server."""
        return False

    @property
    def elsewhere(self) -> bool:
        """Whether a new session may succeed now or later, at this server or another."""
        return self.passing

    def again(self, note: str = "") -> RemoteError:
        """Returns a copy to raise once more, with a note behind its message."""
        copy = type(self)(f"{self}{note}", status=self.status, field=self.field, retry_after_s=self.retry_after_s)
        copy.retry_at = self.retry_at
        return copy


class Refused(RemoteError, UserError):
    """The server refuses, and will go on refusing until somebody changes something."""


class Unauthorized(Refused):
    """The token is missing or wrong (401)."""

    code = Code.UNAUTHORIZED


class Forbidden(Refused):
    """An argument or a wrapper that clients may not choose (403)."""

    code = Code.FORBIDDEN


class UnknownEnvironment(Refused):
    """The server does not serve that environment (404)."""

    code = Code.UNKNOWN_ENV


class NotAServer(Refused):
    """Something answers there, and it is no environment server (404 and others)."""

    code = Code.NOT_FOUND


class TooLarge(Refused):
    """More than the server takes in one request (413)."""

    code = Code.TOO_LARGE


class InvalidRequest(Refused):
    """A malformed request, or arguments that the environment refuses (422); `field` says which."""

    code = Code.INVALID


class Finished(Refused):
    """A step after the episode's end (409)."""

    code = Code.FINISHED


class Failed(RemoteError, EnvironmentFailure):
    """The episode cannot go on."""


class SessionLost(Failed):
    """The server does not know the session (404): it was restarted, or reaped the session."""

    code = Code.UNKNOWN_SESSION


class WrongStep(Failed):
    """A step that is neither the next nor the last one (409): somebody else plays this session."""

    code = Code.WRONG_STEP


class EnvironmentCrashed(Failed):
    """The environment raised (500)."""

    code = Code.ENVIRONMENT


class _Passing(Failed):
    @property
    def passing(self) -> bool:
        return True


class Busy(_Passing):
    """The session is being worked on (409)."""

    code = Code.BUSY


class ServerFull(_Passing):
    """The server has as many sessions as it takes (429)."""

    code = Code.CAPACITY


class RateLimited(_Passing):
    """More requests a second than the server allows one client (429)."""

    code = Code.RATE


class Unreachable(_Passing):
    """No connection, no answer, or one that is not the environment server's (a proxy's 502)."""


class NoAnswer(Unreachable):
    """No answer for now, on a connection that stands: the request is asked again, with more patience."""


class Stopping(Failed):
    """The server is going down and takes no new sessions (503)."""

    code = Code.STOPPING

    @property
    def elsewhere(self) -> bool:
        return True


class TooLate(RemoteError, DeadlineExceeded):
    """The environment did not answer within the server's deadline (504) or the client's."""

    code = Code.DEADLINE


TYPES: dict[Code, type[RemoteError]] = {
    kind.code: kind
    for kind in (
        *(Unauthorized, Forbidden, UnknownEnvironment, NotAServer, TooLarge, InvalidRequest, Finished),
        *(SessionLost, WrongStep, EnvironmentCrashed, Busy, ServerFull, RateLimited, Stopping, TooLate),
    )
    if kind.code is not None
}
TYPES[Code.METHOD] = NotAServer
_BY_STATUS = {401: Unauthorized, 403: Forbidden, 413: TooLarge}
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that are tried again where the answer is not the environment server's own."""


def error_of(url: str, error: ErrorBody) -> RemoteError:
    """Returns the exception of an error that the server at `url` answered with."""
    field = f" (field {error.field})" if error.field and error.field not in error.message else ""
    return TYPES[error.code](
        f"{url}: {error.message}{field}",
        status=STATUS[error.code],
        field=error.field,
        retry_after_s=error.retry_after_s,
    )


def error_of_answer(url: str, status: int, headers: Mapping[str, str], body: Any) -> RemoteError:
    """Returns the exception of an HTTP answer with a status other than 200.

    Args:
        url: of the server.
        status: HTTP status.
        headers: of the answer.
        body: decoded JSON, or None where it is none.
    """
    try:
        error = ErrorAnswer.model_validate(body).error
    except ValidationError:
        kind = Unreachable if status in _RETRIED else _BY_STATUS.get(status, NotAServer)
        told = "" if kind is Unreachable else "; is this the URL of an agentrl environment server?"
        message = f"{url}: answered with status {status} and no error of an environment server{told}"
        return kind(message, status=status, retry_after_s=_seconds(headers.get("retry-after")))
    if error.retry_after_s is None:
        error = error.model_copy(update={"retry_after_s": _seconds(headers.get("retry-after"))})
    return error_of(url, error)


def _seconds(header: str | None) -> float | None:
    """Returns the seconds of a ``Retry-After``; None for none and for a date."""
    return float(header) if header is not None and header.strip().isdecimal() else None
