"""Named actors: messages and answers as JSON. The actor offers messages with `Accepts::accept_json`."""

from __future__ import annotations

import json
from typing import Any, Dict, Optional, Type

from ._errors import (
    ActorError,
    ActorNotFound,
    ActorUnavailable,
    CallRefused,
    CallTimeout,
    RequestRefused,
)
from ._http import Http, path, words

# What the dashboard adds to the deadline of a call before it answers, seconds.
_ANSWER_S = 5.0

_KINDS: Dict[str, Type[RequestRefused]] = {
    "no_such_actor": ActorNotFound,
    "refused": CallRefused,
    "deadline": CallTimeout,
    "handler": ActorError,
    "panicked": ActorError,
}


class Actor:
    """An actor by its name; it is followed from incarnation to incarnation."""

    def __init__(self, http: Http, name: str) -> None:
        self._http = http
        self.name = name

    def __repr__(self) -> str:
        return f"Actor({self.name!r})"

    def ask(self, message: str, value: Any = None, *, timeout: Optional[float] = None) -> Any:
        """Sends `value`, which must have JSON, as the message of that name, and returns the answer.

        `timeout` is the call's deadline in seconds, which travels to the actor; 30 without it. Nothing is sent twice.
        Raises ActorNotFound, CallRefused (no such message, or not its fields), ActorUnavailable, CallTimeout, ActorError
        (the handler says no, or panicked) or NoAnswer.
        """
        return self._send("ask", message, value, timeout)["answer"]

    def tell(self, message: str, value: Any = None) -> None:
        """The same without an answer: returns when the message is on its way."""
        self._send("tell", message, value, None)

    def _send(self, how: str, message: str, value: Any, timeout: Optional[float]) -> Any:
        parameters = [] if timeout is None else [("timeout_s", f"{timeout:.6f}")]
        return self._http.json(
            "POST",
            path("api", "actors", self.name, how, message),
            {"value": value},
            parameters=parameters,
            timeout_s=None if timeout is None else timeout + _ANSWER_S,
            refusal=_refused,
        )


def _refused(status: int, text: str) -> RequestRefused:
    try:
        error = json.loads(text)["error"]
        kind, may_have_run = error["kind"], bool(error["may_have_run"])
    except (ValueError, LookupError, TypeError):
        return RequestRefused(words(text) or f"HTTP status {status}", status)
    if kind in _KINDS:
        return _KINDS[kind](words(text), status)
    return ActorUnavailable(words(text), status, may_have_run)
