"""What can go wrong, as exceptions. Every message says what was asked and what would help."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from ._serve import ApplicationState


class HeliostatError(Exception):
    """Base of all errors of this package."""


class NoAnswer(HeliostatError):
    """Nobody answers there, or the connection broke before the answer. What was asked may have happened."""


class RequestRefused(HeliostatError):
    """The cluster says no. `status` is the HTTP status of its answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class WaitTimeout(HeliostatError, TimeoutError):
    """What was waited for has not happened in time. Nothing was changed."""


class DeployFailed(HeliostatError):
    """What was deployed does not run. `application` is its state, if there is one."""

    def __init__(self, message: str, application: Optional[ApplicationState]) -> None:
        super().__init__(message)
        self.application = application


class JobNotFound(RequestRefused):
    """There is no such job."""


class ActorNotFound(RequestRefused):
    """There is no actor of that name."""


class ActorUnavailable(RequestRefused):
    """The actor is not ready, is full, or was lost. `may_have_run` tells whether the message may have been handled."""

    def __init__(self, message: str, status: int, may_have_run: bool) -> None:
        super().__init__(message, status)
        self.may_have_run = may_have_run


class CallRefused(RequestRefused):
    """The actor takes no such message, or the message is not what it takes. It has not run."""


class CallTimeout(RequestRefused, TimeoutError):
    """The deadline of the call has passed. The message may have been handled."""


class ActorError(RequestRefused):
    """The actor handled the message and failed, or panicked."""
