"""Closed lists of reasons, and the error bodies that carry them to a client in the form of its API."""

from dataclasses import dataclass
from enum import StrEnum

import msgspec


class RefuseReason(StrEnum):
    """Why a request was answered with an error by pdcoord itself; the value of x-pdcoord-reason."""

    MALFORMED_HTTP = "malformed-http"
    HEAD_TOO_LARGE = "head-too-large"
    MALFORMED_JSON = "malformed-json"
    INVALID_FIELD = "invalid-field"
    BODY_TOO_LARGE = "body-too-large"
    BODY_TOO_SLOW = "body-too-slow"
    CONTEXT_TOO_LONG = "context-too-long"
    MODEL_UNKNOWN = "model-unknown"
    PATH_UNKNOWN = "path-unknown"
    NOT_SERVED = "not-served"
    METHOD_NOT_ALLOWED = "method-not-allowed"
    TARGET_NOT_ALLOWED = "target-not-allowed"
    NO_ENDPOINTS = "no-endpoints"
    SATURATED = "saturated"
    QUEUE_FULL = "queue-full"
    WAITED_TOO_LONG = "waited-too-long"
    DEADLINE = "deadline"
    SHED = "shed"
    DRAINING = "draining"
    LADDER_EXHAUSTED = "ladder-exhausted"
    UPSTREAM_TIMEOUT = "upstream-timeout"
    UPSTREAM_FAILED = "upstream-failed"
    STREAM_LOST = "stream-lost"
    """A stream broke off and could not be continued faithfully; the message says why."""
    UNAUTHORIZED = "unauthorized"
    MODEL_FORBIDDEN = "model-forbidden"
    RATE_LIMITED = "rate-limited"
    PLAN_UNSIGNED = "plan-unsigned"
    INTERNAL = "internal"


class RungReason(StrEnum):
    """Why a leg was given up and the next rung of the fallback ladder taken."""

    PREFILL_UNREACHABLE = "prefill-unreachable"
    PREFILL_TIMEOUT = "prefill-timeout"
    PREFILL_ERROR = "prefill-error"
    PREFILL_OVERLOADED = "prefill-overloaded"
    PREFILL_NO_TICKET = "prefill-no-ticket"
    TRANSFER_FAILED = "transfer-failed"
    TRANSFER_TIMEOUT = "transfer-timeout"
    DECODE_UNREACHABLE = "decode-unreachable"
    DECODE_TIMEOUT = "decode-timeout"
    DECODE_ERROR = "decode-error"
    DECODE_OVERLOADED = "decode-overloaded"
    DECODE_STALLED = "decode-stalled"
    """A stream made no progress though the engine accepts and answers probes."""
    DECODE_DIVERGED = "decode-diverged"
    """What should have continued a stream did not go where that had gone, as drawn tokens may not."""
    DECODE_DRAINING = "decode-draining"
    TARGET_NOT_ALLOWED = "target-not-allowed"
    PLAN_REFUSED = "plan-refused"
    """The sidecar does not believe the plan's signature; the engine behind it was not asked."""
    PATH_SHUT = "path-shut"
    """Nothing was sent: every coordinator called the path open or impossible by then."""


RETRY_AFTER_S = 1
"""What whoever cannot serve now tells callers: one scrape period and one prefill are over by then."""


@dataclass(frozen=True, slots=True)
class _Kind:
    status: int
    type: str


# The only table from reason to status. Types are OpenAI's own vocabulary where it has a word.
_KINDS: dict[RefuseReason, _Kind] = {
    RefuseReason.MALFORMED_HTTP: _Kind(400, "invalid_request_error"),
    RefuseReason.HEAD_TOO_LARGE: _Kind(431, "invalid_request_error"),
    RefuseReason.MALFORMED_JSON: _Kind(400, "invalid_request_error"),
    RefuseReason.INVALID_FIELD: _Kind(400, "invalid_request_error"),
    RefuseReason.BODY_TOO_LARGE: _Kind(413, "invalid_request_error"),
    RefuseReason.BODY_TOO_SLOW: _Kind(408, "invalid_request_error"),
    RefuseReason.CONTEXT_TOO_LONG: _Kind(400, "invalid_request_error"),
    RefuseReason.MODEL_UNKNOWN: _Kind(404, "invalid_request_error"),
    RefuseReason.PATH_UNKNOWN: _Kind(404, "invalid_request_error"),
    RefuseReason.NOT_SERVED: _Kind(404, "invalid_request_error"),
    RefuseReason.METHOD_NOT_ALLOWED: _Kind(405, "invalid_request_error"),
    RefuseReason.TARGET_NOT_ALLOWED: _Kind(403, "invalid_request_error"),
    RefuseReason.NO_ENDPOINTS: _Kind(503, "service_unavailable"),
    RefuseReason.SATURATED: _Kind(429, "rate_limit_error"),
    RefuseReason.QUEUE_FULL: _Kind(429, "rate_limit_error"),
    RefuseReason.WAITED_TOO_LONG: _Kind(429, "rate_limit_error"),
    RefuseReason.DEADLINE: _Kind(429, "rate_limit_error"),
    RefuseReason.SHED: _Kind(429, "rate_limit_error"),
    RefuseReason.DRAINING: _Kind(503, "service_unavailable"),
    RefuseReason.LADDER_EXHAUSTED: _Kind(503, "service_unavailable"),
    RefuseReason.UPSTREAM_TIMEOUT: _Kind(504, "upstream_error"),
    RefuseReason.UPSTREAM_FAILED: _Kind(502, "upstream_error"),
    RefuseReason.STREAM_LOST: _Kind(502, "upstream_error"),
    RefuseReason.UNAUTHORIZED: _Kind(401, "authentication_error"),
    RefuseReason.MODEL_FORBIDDEN: _Kind(403, "permission_error"),
    RefuseReason.RATE_LIMITED: _Kind(429, "rate_limit_error"),
    RefuseReason.PLAN_UNSIGNED: _Kind(403, "permission_error"),
    RefuseReason.INTERNAL: _Kind(500, "internal_error"),
}


class _Error(msgspec.Struct, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error


class _MessagesErrorBody(msgspec.Struct, tag="error"):
    error: _Error


class _ResponsesErrorEvent(msgspec.Struct, tag="error", kw_only=True):
    code: str
    message: str
    param: str | None
    sequence_number: int
    error: _Error


_MESSAGES = "/v1/messages"
_RESPONSES = "/v1/responses"
# Anthropic's words (Messages API, 2023-06-01) for statuses; of any other it depends on whose fault it is.
_MESSAGES_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that pdcoord gives itself instead of an engine's.

    Attributes:
        message: for the client; names the field, the value and the remedy, never internals.
        param: the request field at fault, if one is.
        retry_after_s: seconds after which a retry may help; sent as Retry-After.
    """

    reason: RefuseReason
    message: str
    param: str | None = None
    retry_after_s: int | None = None

    @property
    def status(self) -> int:
        return _KINDS[self.reason].status

    @property
    def is_servers_fault(self) -> bool:
        return self.status >= 500

    def body(self, path: str = "") -> bytes:
        """JSON `{"error": {"message", "type", "param", "code"}}`, as OpenAI's API answers.

        Args:
            path: of the API that is answered. Under /v1/messages it is `{"type": "error", "error": {...}}`
                with Anthropic's types.
        """
        if _is_messages(path):
            return msgspec.json.encode(_MessagesErrorBody(self._error(self._messages_type())))
        return msgspec.json.encode(_ErrorBody(self._error(_KINDS[self.reason].type)))

    def event(self, path: str = "", *, sequence_number: int = 0) -> bytes:
        """The same as a server-sent event, for a stream that has already begun.

        On /v1/responses it is OpenAI's ResponseErrorEvent (openai-python 3.54) with an `error` besides: its
        clients raise that, and would take an event without it for one like any other.

        Args:
            path: likewise.
            sequence_number: of the event, where the API counts them.
        """
        if _is_messages(path):
            return b"event: error\ndata: " + self.body(path) + b"\n\n"
        if path != _RESPONSES:
            return b"data: " + self.body() + b"\n\n"
        error = self._error(_KINDS[self.reason].type)
        event = _ResponsesErrorEvent(
            code=self.reason.value,
            message=self.message,
            param=self.param,
            sequence_number=sequence_number,
            error=error,
        )
        return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"

    def _error(self, kind: str) -> _Error:
        return _Error(message=self.message, type=kind, param=self.param, code=self.reason.value)

    def _messages_type(self) -> str:
        return _MESSAGES_TYPES.get(
            self.status, "api_error" if self.is_servers_fault else "invalid_request_error"
        )

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers of the answer, without content-length."""
        headers = [
            (b"content-type", b"application/json"),
            (b"x-pdcoord-reason", self.reason.value.encode()),
        ]
        if self.reason is RefuseReason.UNAUTHORIZED:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(self.retry_after_s).encode()))
        return headers


def _is_messages(path: str) -> bool:
    return path == _MESSAGES or path.startswith(f"{_MESSAGES}/")


class RefusedError(Exception):
    """Carries a refusal from where it is found to the edge that answers."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal
