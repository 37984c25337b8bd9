"""Errors that a client or an operator sees, and their one map to a status.

    SluicegateError
    ├── BadRequest            400  the request is not one that we can read
    │   ├── Unscannable       400  it holds something that no guard here reads
    │   ├── ContentFiltered   400  it was blocked, and the policy or the route answers so
    │   └── UnknownModel      404  it names a model that is not here
    ├── InvalidApiKey         401  no key, or none that holds
    ├── Forbidden             403  the key may not do this, or the page may not ask it
    ├── NotFound              404  no such route, or nothing of that name
    ├── MethodNotAllowed      405  the route is there, the method is not
    ├── BodyTimeout           408  its body did not come in time
    ├── Conflict              409  somebody else was there before
    ├── StoreFull             409  no more of these are kept
    ├── TooLarge              413  it is over a stated limit
    ├── Overloaded            429  too much is waiting; come back later
    ├── RateLimited           429  the key has sent as much as it may for now
    ├── GuardUnavailable      503  no verdict could be had
    ├── NoUpstream            503  no upstream is configured
    ├── StateUnavailable      503  Redis cannot be reached, or refuses the command
    ├── RecordNotKept         503  an exchange could leave its record nowhere
    └── UpstreamError         502  the upstream failed
        ├── UpstreamUnreachable  502  no connection
        ├── UpstreamMalformed    502  an answer that we cannot read, and so cannot judge
        ├── UpstreamUnavailable  503  it failed again and again, and is left alone for a while
        └── UpstreamTimeout      504  no answer in time

    ConfigurationError             never on the wire: the command prints it and exits with 2

Messages say what was wrong, where, and what to do. They never hold a client's text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar


class ConfigurationError(Exception):
    """A setting, a policy or a file that cannot be used; found at start."""


class SluicegateError(Exception):
    """An error with a status, in OpenAI's wire shape.

    ``code`` is a stable word that programs may compare; ``param`` is the key at fault.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Headers that go with the status."""
        return {}


class BadRequest(SluicegateError):
    """The request is not one that we can read."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class Unscannable(BadRequest):
    """The request holds something that no guard here reads."""

    code = "unscannable"


class ContentFiltered(BadRequest):
    """The prompt was blocked. ``results`` is Azure's account of why, which clients parse."""

    code = "content_filter"

    def __init__(self, message: str, results: Mapping[str, Any]) -> None:
        super().__init__(message, param="prompt")
        self.results = results

    def body(self) -> dict[str, Any]:
        """See ``SluicegateError.body``."""
        inner = {
            "code": "ResponsibleAIPolicyViolation",
            "content_filter_result": dict(self.results),
        }
        shown = super().body()
        shown["error"] |= {"status": self.status, "innererror": inner}
        return shown


class UnknownModel(BadRequest):
    """The request names a model that is not here."""

    status = 404
    code = "model_not_found"


class InvalidApiKey(SluicegateError):
    """No API key was sent, or none that holds."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        """Says how to send one (RFC 9110, section 15.5.2)."""
        return {"www-authenticate": "Bearer"}


class Forbidden(SluicegateError):
    """The key may not do this, or the page that asks for it may not; ``code`` says which."""

    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class NotFound(SluicegateError):
    """There is no such route, or nothing of that name."""

    status = 404
    type = "invalid_request_error"
    code = "unknown_route"


class MethodNotAllowed(SluicegateError):
    """The route is there, but not for this method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class BodyTimeout(SluicegateError):
    """The request's body did not come in time."""

    status = 408
    type = "invalid_request_error"
    code = "body_timeout"


class Conflict(SluicegateError):
    """Somebody else was there before; ``code`` says with what."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class StoreFull(SluicegateError):
    """No more of these are kept."""

    status = 409
    type = "invalid_request_error"
    code = "store_full"


class TooLarge(SluicegateError):
    """The request is over a stated limit; ``code`` says which."""

    status = 413
    type = "invalid_request_error"
    code = "too_large"


class Overloaded(SluicegateError):
    """Too much is waiting already."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"
    retry_after_seconds: ClassVar[int] = 1

    def headers(self) -> dict[str, str]:
        """Says when to come back."""
        return {"retry-after": str(self.retry_after_seconds)}


class RateLimited(SluicegateError):
    """The key has sent as much as it may for now. ``limits`` are headers that say how much."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_seconds: float, limits: Mapping[str, str]) -> None:
        super().__init__(message)
        self._retry_after = max(1, math.ceil(retry_after_seconds))
        self._limits = limits

    def headers(self) -> dict[str, str]:
        """Says when to come back."""
        return {"retry-after": str(self._retry_after), **self._limits}


class GuardUnavailable(SluicegateError):
    """No verdict could be had, and so nothing is let through."""

    status = 503
    code = "guard_unavailable"


class NoUpstream(SluicegateError):
    """No upstream is configured, so there is nothing to guard."""

    status = 503
    code = "no_upstream"


class StateUnavailable(SluicegateError):
    """Redis cannot be reached, or refuses the command."""

    status = 503
    code = "state_unavailable"


class RecordNotKept(SluicegateError):
    """A record could be put neither into Redis nor onto the disk."""

    status = 503
    code = "record_not_kept"


class UpstreamError(SluicegateError):
    """The upstream failed."""

    status = 502
    type = "upstream_error"
    code = "upstream_error"


class UpstreamUnreachable(UpstreamError):
    """No connection to the upstream."""

    code = "upstream_unreachable"


class UpstreamUnavailable(UpstreamError):
    """The upstream failed again and again, and is left alone for a while."""

    status = 503
    code = "upstream_unavailable"

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self._retry_after = max(1, math.ceil(retry_after_seconds))

    def headers(self) -> dict[str, str]:
        """Says when to come back."""
        return {"retry-after": str(self._retry_after)}


class UpstreamMalformed(UpstreamError):
    """The upstream's answer cannot be read, and so cannot be judged."""

    code = "upstream_malformed"


class UpstreamTimeout(UpstreamError):
    """The upstream did not answer in time."""

    status = 504
    code = "upstream_timeout"
