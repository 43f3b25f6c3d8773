"""What the gateway's and the admin listener's FastAPI apps share: JSON answers, refusals, error handlers."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from pdcoord.front.answers import internal_error
from pdcoord.protocol.errors import Refusal, RefuseReason
from pdcoord.protocol.headers import REQUEST_ID
from pdcoord.wire.asgi import Message, Receive, Scope, Send

_SHOWN_MAX = 128
_VALUE_SHOWN_MAX = 32


class PagesApp(FastAPI):
    """Answers HEAD, which load balancers ask with, wherever it answers GET."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        await super().__call__(scope, receive, send)


def json_response(answer: object) -> Response:
    """A whole answer; `answer` is anything that msgspec can write."""
    return Response(msgspec.json.encode(answer), media_type="application/json")


def refusal_response(refusal: Refusal, headers: dict[str, str] | None = None, path: str = "") -> Response:
    own = {name.decode(): value.decode() for name, value in refusal.headers()}
    return Response(refusal.body(path), status_code=refusal.status, headers=(headers or {}) | own)


def add_error_handlers(app: FastAPI, refused: Callable[[RefuseReason], None]) -> None:
    """Make OpenAI error bodies of all that FastAPI answers itself; `refused` hears of each."""

    def refuse(refusal: Refusal, headers: dict[str, str] | None = None, path: str = "") -> Response:
        refused(refusal.reason)
        return refusal_response(refusal, headers, path)

    async def on_http(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        path = request.scope["path"]
        return refuse(_refusal_of(error.status_code, request.method, path), dict(error.headers or {}), path)

    async def on_invalid(_request: Request, error: Exception) -> Response:
        if not isinstance(error, RequestValidationError):
            raise error
        faults = sorted({_fault_of(fault) for fault in error.errors()})
        return refuse(Refusal(RefuseReason.INVALID_FIELD, f"{'; '.join(faults)}."))

    async def on_defect(_request: Request, _error: Exception) -> Response:
        return refuse(internal_error())

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(Exception, on_defect)


def _fault_of(fault: Mapping[str, Any]) -> str:
    """What of a query cannot be used: its name, its value, and what may stand there."""
    given = str(fault["input"])[:_VALUE_SHOWN_MAX]
    expected = str(fault["msg"]).removeprefix("Input should be ")
    return f"{fault['loc'][-1]} is {given!r}; give one that is {expected}"


def _without_body(send: Send) -> Send:
    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message["body"] = b""
        await send(message)

    return send_head


def with_request_id(send: Send, request_id: str) -> Send:
    """`send` for an answer that carries a request id."""

    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (REQUEST_ID, request_id.encode())]
        await send(message)

    return send_with_id


def _refusal_of(status: int, method: str, path: str) -> Refusal:
    shown = path[:_SHOWN_MAX]
    match status:
        case 404:
            message = f"There is no {shown}; GET /openapi.json lists what there is."
            return Refusal(RefuseReason.PATH_UNKNOWN, message)
        case 405:
            message = f"{shown} does not take {method[:16]}; the Allow header says what it takes."
            return Refusal(RefuseReason.METHOD_NOT_ALLOWED, message)
        case _ if status < 500:
            return Refusal(RefuseReason.INVALID_FIELD, "The request cannot be read; see GET /openapi.json.")
        case _:
            return internal_error()
