"""The sidecar's front: reads a request, decides what kind it is, has it served and accounts for it."""

import asyncio
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec
import structlog

from pdcoord.protocol.errors import RETRY_AFTER_S, Refusal, RefusedError, RefuseReason
from pdcoord.protocol.headers import REQUEST_ID, HostPort
from pdcoord.protocol.openai import APIS
from pdcoord.protocol.plans import PlanHeader, PrefillTarget
from pdcoord.wire.asgi import (
    BodyTimeoutError,
    ClientGoneError,
    NoRoomError,
    Receive,
    Scope,
    Send,
    read_body,
    send_json,
)
from pdcoord.wire.errors import BodyTooLargeError
from pdcoord.wire.room import ByteRoom
from sidecar import dialects
from sidecar.exchange import Exchange
from sidecar.guard import Asked, Guard, Headers, for_engine
from sidecar.health import Health
from sidecar.observe import CONTENT_TYPE, MODE_UNREAD, Metrics, log_fields
from sidecar.tools import Call, Tools
from sidecar.tracing import trace_id_of
from sidecar.vocabulary import Order, Outcome, Resume

BODY_S_MAX = 60.0

_METHOD = re.compile(r"[A-Z]+")
_TARGET = re.compile(rb"/[\x21-\x7e]*")
_PAGES = frozenset({"/v1/models", "/metrics"})
"""What load balancers ask for with HEAD too, of which engines know GET alone."""
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_BODY_UNREAD = frozenset({RefuseReason.BODY_TOO_LARGE, RefuseReason.BODY_TOO_SLOW, RefuseReason.SATURATED})

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Limits:
    """The waits and sizes that do not come with a request; seconds and bytes.

    Attributes:
        body_bytes_max: of one request.
        bodies_bytes_max: of all requests being read or served together.
        live_max: requests being read or served.
    """

    answer_s: float
    stream_idle_s: float
    body_bytes_max: int
    bodies_bytes_max: int
    live_max: int


class Proxy:
    """The ASGI app in front of the engine.

    Attributes:
        in_flight: requests being served.
    """

    def __init__(self, tools: Tools, guard: Guard, health: Health, limits: Limits) -> None:
        self.in_flight = 0
        self._tools = tools
        self._guard = guard
        self._health = health
        self._limits = limits
        self._bodies = ByteRoom(limits.bodies_bytes_max)
        self._live: set[Exchange] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] in {"/health", "/livez", "/readyz"} and scope["method"] in {"GET", "HEAD"}:
            await answer_probe(scope["path"], self._health, send)
            return
        if self.in_flight >= self._limits.live_max:
            refusal = _saturated("serves as many requests as it may")
            await self._refuse(refusal, scope, self._guard.request_id(scope["headers"]), send)
            return
        self.in_flight += 1
        self._idle.clear()
        self._tools.metrics.set("in_flight", self.in_flight)
        self._tools.metrics.set("resume_bytes", float(self._tools.shelf.bytes_held))
        try:
            with ExitStack() as held:
                await self._serve(scope, receive, send, held)
        finally:
            self.in_flight -= 1
            self._tools.metrics.set("in_flight", self.in_flight)
            self._tools.metrics.set("resume_bytes", float(self._tools.shelf.bytes_held))
            if self.in_flight == 0:
                self._idle.set()

    def begin_drain(self) -> None:
        """From now on the pod is not ready and new requests are refused."""
        self._health.is_draining = True
        self._tools.metrics.set("draining", 1.0)

    def end_grace(self, *, is_over: bool) -> None:
        """The drain runs out, or has: hand over what others can go on with, and refuse what has not begun.

        Args:
            is_over: break off the rest too.
        """
        for exchange in list(self._live):
            exchange.end_grace(is_over=is_over)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request is in flight; False if that took too long."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _serve(self, scope: Scope, receive: Receive, send: Send, held: ExitStack) -> None:
        request_id = self._guard.request_id(scope["headers"])
        try:
            call, asked = await self._read(scope, receive, request_id, held)
        except RefusedError as error:
            await self._refuse(error.refusal, scope, request_id, send)
            return
        except BodyTimeoutError:
            message = f"The body had not come whole after {BODY_S_MAX:g} s; send it without pausing."
            await self._refuse(Refusal(RefuseReason.BODY_TOO_SLOW, message), scope, request_id, send)
            return
        except ClientGoneError:
            # Left before the request was whole: nothing was sent to an engine.
            _log.info("request.abandoned", id=request_id.decode("ascii"), path=scope["path"])
            return
        order = self._order(call, asked)
        exchange = Exchange(self._tools, call, order, scope=scope, send=send, receive=receive)
        reporter = self._tools.reporter
        if reporter is not None and asked.is_counted:
            exchange.report = reporter.begin(order, asked.plan.load)
        self._live.add(exchange)
        try:
            await self._exchange(exchange, call, asked, scope, send)
        finally:
            self._live.discard(exchange)

    async def _read(
        self, scope: Scope, receive: Receive, request_id: bytes, held: ExitStack
    ) -> tuple[Call, Asked]:
        """The request, fit to be sent to an engine, and what its headers ask for.

        Args:
            held: gives back the room that the body takes.

        Raises:
            RefusedError, ClientGoneError, BodyTimeoutError
        """
        method: str = scope["method"]
        headers: Headers = list(scope["headers"])
        target = _target(scope)
        if _METHOD.fullmatch(method) is None:
            raise RefusedError(
                Refusal(RefuseReason.METHOD_NOT_ALLOWED, f"Method {method} is not served here.")
            )
        # A router that scrapes /metrics here must not take a pod that goes away for a ready one.
        if self._health.is_draining and (method not in _SAFE_METHODS or scope["path"] == "/metrics"):
            message = "This pod is going away; send the request to another."
            raise RefusedError(Refusal(RefuseReason.DRAINING, message, retry_after_s=RETRY_AFTER_S))
        self._guard.check_signature(method, target, headers)
        api = APIS.get(scope["path"]) if method == "POST" else None
        is_generative = api is not None and api.is_generative
        asked = self._guard.read(headers) if is_generative else Asked(PlanHeader())
        if api is not None and not is_generative:
            load = self._guard.read_load(method, target, headers)
            asked = Asked(PlanHeader(load=load), is_counted=True)
        raw = await self._read_body(headers, receive, held)
        body = None
        if api is not None and is_generative:
            body = dialects.read_body(api, raw, is_prefill_leg=asked.is_prefill_leg)
            raw = body.raw
        else:
            raw = dialects.scrub(raw, _content_type(headers))
        if method == "HEAD" and scope["path"] in _PAGES:
            method = "GET"  # The server leaves the body out.
        call = Call(method, target, for_engine(headers, request_id), raw, request_id, body, asked.plan.load)
        return call, asked

    async def _read_body(self, headers: Headers, receive: Receive, held: ExitStack) -> bytes:
        bytes_max = self._limits.body_bytes_max
        message = f"The body is longer than {bytes_max} bytes; send a shorter one."
        too_large = RefusedError(Refusal(RefuseReason.BODY_TOO_LARGE, message))
        announced = next((value for name, value in headers if name == b"content-length"), b"0")
        if int(announced) > bytes_max:  # The server has checked that it is a number.
            raise too_large
        try:
            raw = await read_body(receive, bytes_max=bytes_max, timeout_s=BODY_S_MAX, room=self._bodies)
        except BodyTooLargeError as error:
            raise too_large from error
        except NoRoomError as error:
            raise RefusedError(_saturated("holds as many bytes of bodies as it may")) from error
        held.callback(self._bodies.give, len(raw))
        return raw

    def _order(self, call: Call, asked: Asked) -> Order:
        plan, body = asked.plan, call.body
        prefills: Sequence[PrefillTarget] = plan.prefills
        if prefills and (body is None or not body.splittable_in(plan.dialect)):
            self._tools.metrics.count("unsplit", (body and body.unsplittable) or "api")
            prefills = ()
        is_stream = body is not None and body.is_stream
        return Order(
            dialect=plan.dialect,
            engine=self._tools.engine,
            prefills=tuple(prefills),
            refused=asked.refused,
            shut=self._shut(prefills),
            is_colocated_allowed=plan.is_colocated_allowed,
            is_stream=is_stream,
            prefill_deadline_s=plan.prefill_deadline_ms / 1e3,
            transfer_deadline_s=plan.transfer_deadline_ms / 1e3,
            answer_deadline_s=self._limits.answer_s,
            idle_deadline_s=self._limits.stream_idle_s,
            resume=_resume(asked) if is_stream else None,
            is_resumed_above=is_stream and plan.is_resumed_above,
            is_ended_above=is_stream and plan.is_ended_above,
        )

    def _shut(self, prefills: Sequence[PrefillTarget]) -> frozenset[HostPort]:
        """Fallbacks that every coordinator would pass over by now; the first target was chosen just now."""
        reporter = self._tools.reporter
        if reporter is None or len(prefills) < 2:
            return frozenset()
        return frozenset(each.address for each in prefills[1:] if reporter.targets.is_shut(each.address))

    async def _exchange(self, exchange: Exchange, call: Call, asked: Asked, scope: Scope, send: Send) -> None:
        now_s = self._tools.now_s
        began_s = now_s()
        unknown = str(Outcome.BROKEN_OFF)  # Cancelled from outside: the drain has run out.
        try:
            await exchange.run()
        except asyncio.CancelledError:
            # The drain has run out. Whoever asked is still there and is told so.
            if exchange.status is None:
                message = "This pod is going away and could not wait for the answer; send the request again."
                refusal = Refusal(RefuseReason.DRAINING, message, retry_after_s=RETRY_AFTER_S)
                await self._refuse(refusal, scope, call.request_id, send)
            raise
        except Exception:  # noqa: BLE001  # the edge: whatever it was, the client gets an answer
            # A bug of ours. The client gets no detail; the log gets the stack, which holds no body.
            unknown = "error"
            _log.exception("request.failed", id=call.request_id.decode("ascii"))
            if exchange.status is None:
                await self._refuse(_internal(), scope, call.request_id, send)
        finally:
            outcome = str(exchange.handoff.outcome or unknown)
            self._account(exchange, call, asked, outcome=outcome, seconds=now_s() - began_s)

    def _account(self, exchange: Exchange, call: Call, asked: Asked, *, outcome: str, seconds: float) -> None:
        legs = exchange.handoff
        if self._tools.reporter is not None and exchange.report is not None:
            self._tools.reporter.end(exchange.report, legs, outcome)
        served = legs.served()
        mode = MODE_UNREAD
        if call.body is not None:
            mode = "prefill-leg" if asked.is_prefill_leg else str(served.mode)
        if exchange.trace is not None:
            exchange.trace.end(legs, mode=mode, outcome=outcome, status=exchange.status)
        self._tools.metrics.record(
            legs, mode=mode, outcome=outcome, seconds=seconds, now_s=self._tools.now_s()
        )
        write = _log.debug if mode == MODE_UNREAD and call.method in _SAFE_METHODS else _log.info
        write(
            "request.done",
            id=call.request_id.decode("ascii"),
            trace_id=trace_id_of(exchange.trace, call.headers),
            path=call.target.partition("?")[0],
            mode=mode,
            outcome=outcome,
            status=exchange.status,
            is_stream=legs.order.is_stream,
            total_ms=round(seconds * 1e3, 3),
            **log_fields(served, legs),
        )

    async def _refuse(self, refusal: Refusal, scope: Scope, request_id: bytes, send: Send) -> None:
        self._tools.metrics.count("refusals", refusal.reason)
        headers = [*refusal.headers(), (REQUEST_ID, request_id)]
        if refusal.reason in _BODY_UNREAD:
            headers.append((b"connection", b"close"))  # What is left of the body is not read.
        await send_json(send, refusal.status, refusal.body(scope["path"]), headers)
        _log.info(
            "request.refused",
            id=request_id.decode("ascii"),
            path=scope["path"],
            reason=str(refusal.reason),
            status=refusal.status,
        )


def _resume(asked: Asked) -> Resume | None:
    """How a stream may be continued here; None where it may not, or is above."""
    plan = asked.plan
    if plan.is_resumed_above or plan.resume_tries_max == 0:
        return None
    return Resume(
        targets=plan.resumes,
        refused=asked.refused_resumes,
        tries_max=plan.resume_tries_max,
        age_s_max=plan.resume_age_ms_max / 1e3,
        stall_s=plan.resume_stall_ms / 1e3,
    )


def _target(scope: Scope) -> str:
    path: bytes = scope.get("raw_path") or scope["path"].encode("utf-8")
    query: bytes = scope["query_string"]
    target = path + b"?" + query if query else path
    if _TARGET.fullmatch(target) is None:
        message = "The request target has characters that no URL has; percent-encode them."
        raise RefusedError(Refusal(RefuseReason.INVALID_FIELD, message))
    return target.decode("ascii")


def _content_type(headers: Headers) -> bytes:
    return next((value for name, value in headers if name == b"content-type"), b"")


def _saturated(why: str) -> Refusal:
    message = f"The sidecar {why}; retry after the time in Retry-After."
    return Refusal(RefuseReason.SATURATED, message, retry_after_s=RETRY_AFTER_S)


def _internal() -> Refusal:
    return Refusal(RefuseReason.INTERNAL, "The sidecar failed to serve this request; try again.")


async def answer_probe(path: str, health: Health, send: Send) -> None:
    """/livez: the process runs. /readyz and /health: the engine answers and no drain has begun."""
    why_not = "" if path == "/livez" else await health.why_not()
    if not why_not:
        await send_json(send, 200, b'{"status":"ok"}')
        return
    body = msgspec.json.encode({"status": "not ready", "reason": why_not})
    await send_json(send, 503, body, [(b"retry-after", b"%d" % RETRY_AFTER_S)])


class Backstage:
    """The ASGI app of the metrics listener: /metrics, /paths, /livez, /readyz.

    Args:
        paths: the body of /paths; None where nothing is probed.
    """

    def __init__(self, metrics: Metrics, health: Health, paths: Callable[[], bytes] | None = None) -> None:
        self._metrics = metrics
        self._health = health
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # ASGI's
        if scope["type"] != "http":
            return
        path = scope["path"]
        if scope["method"] not in {"GET", "HEAD"}:
            refusal = Refusal(RefuseReason.METHOD_NOT_ALLOWED, "Only GET is served here.")
        elif path == "/metrics":
            await send_json(send, 200, self._metrics.exposition(), [(b"content-type", CONTENT_TYPE)])
            return
        elif path in {"/livez", "/readyz"}:
            await answer_probe(path, self._health, send)
            return
        elif path == "/paths" and self._paths is not None:
            await send_json(send, 200, self._paths())
            return
        elif path == "/paths":
            message = "No path is known here: this sidecar runs without --kv-agent and --control."
            refusal = Refusal(RefuseReason.PATH_UNKNOWN, message)
        else:
            message = "This path is not served here; there are /metrics, /paths, /livez and /readyz."
            refusal = Refusal(RefuseReason.PATH_UNKNOWN, message)
        await send_json(send, refusal.status, refusal.body(), refusal.headers())
