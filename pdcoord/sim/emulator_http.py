"""The API of an emulated engine over HTTP: routes of vLLM 0.32 and SGLang 0.5.23, and the admin calls."""

import secrets
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from pdcoord.core.fleet import EngineKind
from pdcoord.protocol.headers import REQUEST_ID
from pdcoord.protocol.openai import APIS, Call
from pdcoord.protocol.trace import read_trace
from pdcoord.sim.emulator_call import CallError, Generation, read_call, read_generation
from pdcoord.sim.emulator_edge import SILENCE_S_MAX, close_idle_as_vllm_does, run_while_connected, stall
from pdcoord.sim.emulator_generate import SERVED_BY, Mishaps, Run, refusal
from pdcoord.sim.emulator_host import Answer, EngineHost, Mailbox
from pdcoord.sim.emulator_metrics import CONTENT_TYPE
from pdcoord.sim.emulator_pooling import (
    detokenize,
    pooling_answer,
    pooling_prompts,
    rendered,
    tokenize,
)
from pdcoord.sim.emulator_shapes import Answering, ChatShape, CompletionShape, Shape, error_body
from pdcoord.sim.emulator_shapes_other import MessagesShape, ResponsesShape
from pdcoord.sim.emulator_state import TRACES_MAX, TracedCall, state_of
from pdcoord.sim.faults import BREAKS, FaultKind, FaultsBody, FaultsBodyError, FaultSet, parse_faults
from pdcoord.sim.messages import CacheCleared, EngineRequest
from pdcoord.wire.asgi import (
    ClientGoneError,
    Receive,
    Scope,
    Send,
    read_body,
    send_json,
)
from pdcoord.wire.errors import BodyTooLargeError

BODY_BYTES_MAX = 64 << 20
_BODY_S_MAX = 60.0
_ID_LENGTH_MAX = 256
VERSIONS = {EngineKind.VLLM: "0.32.0", EngineKind.SGLANG: "0.5.23"}
FAULTS_PATH = "/emulator/faults"
STATE_PATH = "/emulator/state"
RENDER_SUFFIX = "/render"
"""Behind a generating call's path: what vLLM serves with --enable-scale-out."""


class Engine(Protocol):
    """What the API asks of the emulated engine behind it."""

    faults: FaultSet

    @property
    def host(self) -> EngineHost:
        """The host that lives now."""

    def set_faults(self, body: FaultsBody) -> None:
        """Put these failures in place of all there were, at once."""


_SHAPES: dict[str, Callable[[Answering], Shape]] = {
    "/v1/chat/completions": ChatShape,
    "/v1/completions": CompletionShape,
    "/v1/responses": ResponsesShape,
    "/v1/messages": MessagesShape,
}


class Api:
    """An ASGI app over whichever host lives."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._in_flight = 0
        self._traced: deque[TracedCall] = deque(maxlen=TRACES_MAX)
        self._gets: dict[str, Callable[[], bytes]] = {
            "/health": lambda: b"",
            "/ping": lambda: b"",
            "/v1/models": self._models,
            "/version": lambda: msgspec.json.encode({"version": VERSIONS[self._kind]}),
            "/load": lambda: msgspec.json.encode({"server_load": self._in_flight}),
            FAULTS_PATH: self._faults,
            STATE_PATH: lambda: state_of(engine.host, self._traced),
        }
        self._posts: dict[str, Callable[[bytes], bytes]] = {
            "/ping": lambda _: b"",
            "/reset_prefix_cache": self._reset_cache,
            FAULTS_PATH: self._set_faults,
        }
        if self._kind is EngineKind.SGLANG:
            self._gets |= {"/health_generate": lambda: b"", "/server_info": self._server_info}
            self._posts["/flush_cache"] = self._reset_cache

    @property
    def _kind(self) -> EngineKind:
        return self._engine.host.model.settings.engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        close_idle_as_vllm_does(receive)
        path, method = scope["path"], scope["method"]
        try:
            if path in APIS and method == "POST":
                self._in_flight += 1
                try:
                    await self._call(path, scope["headers"], receive, send)
                finally:
                    self._in_flight -= 1
            elif method == "POST" and path.removesuffix(RENDER_SUFFIX) in _SHAPES:
                await self._render(path.removesuffix(RENDER_SUFFIX), scope["headers"], receive, send)
            else:
                await self._plain(path, method, receive, send)
        except ClientGoneError:
            return
        except BodyTooLargeError as error:
            await self._send_error(send, CallError(413, "BadRequestError", str(error)))
        except CallError as error:
            await self._send_error(send, error)

    async def _plain(self, path: str, method: str, receive: Receive, send: Send) -> None:
        if path == "/metrics" and method == "GET":
            body = self._engine.host.metrics.render()
            await send_json(send, 200, body, [(b"content-type", CONTENT_TYPE)])
        elif method == "GET" and path in self._gets:
            await send_json(send, 200, self._gets[path]())
        elif method == "POST" and path in self._posts:
            raw = await read_body(receive, bytes_max=BODY_BYTES_MAX, timeout_s=_BODY_S_MAX)
            await send_json(send, 200, self._posts[path](raw))
        elif path in APIS or path in self._gets or path in self._posts or path == "/metrics":
            raise CallError(405, "MethodNotAllowedError", "Method Not Allowed")
        else:
            raise CallError(404, "NotFoundError", "Not Found")

    # Calls.

    async def _call(
        self, path: str, headers: list[tuple[bytes, bytes]], receive: Receive, send: Send
    ) -> None:
        raw = await read_body(receive, bytes_max=BODY_BYTES_MAX, timeout_s=_BODY_S_MAX)
        host = self._engine.host
        settings = host.model.settings
        if path in {"/detokenize", "/tokenize"}:
            call = read_call(path, raw, settings)
            body = detokenize(call) if path == "/detokenize" else tokenize(call, settings)
            await send_json(send, 200, msgspec.json.encode(body), self._served_by())
            return
        if await self._strike(receive):
            return
        call = read_call(path, raw, settings)
        request_id = _request_id(headers)
        if not call.api.is_generative:
            await run_while_connected(
                receive, self._pool(host, call, request_id, pooling_prompts(call), send)
            )
            return
        generation = read_generation(call, headers, settings)
        self._note_trace(headers, generation, request_id)
        shape = _SHAPES[path](self._answering(host, generation, request_id))
        run = Run(host, generation, shape, _engine_id(path, request_id), self._mishaps(generation))
        try:
            run.begin()
            answer = run.answer_stream if call.is_stream else run.answer_whole
            await run_while_connected(receive, answer(receive, send))
        finally:
            run.close()

    def _note_trace(
        self, headers: list[tuple[bytes, bytes]], generation: Generation, request_id: str
    ) -> None:
        """A real engine would begin a span of its own here, as a child of the one that is named."""
        trace = read_trace(headers)
        if trace is not None:
            is_split = generation.ticket is not None or generation.kv is not None
            leg = "prefill" if generation.is_prefill_leg else "decode" if is_split else "whole"
            self._traced.append(TracedCall(request_id, trace.trace_id, trace.span_id, leg))

    async def _render(
        self, path: str, headers: list[tuple[bytes, bytes]], receive: Receive, send: Send
    ) -> None:
        raw = await read_body(receive, bytes_max=BODY_BYTES_MAX, timeout_s=_BODY_S_MAX)
        settings = self._engine.host.model.settings
        generation = read_generation(read_call(path, raw, settings), headers, settings)
        body = rendered(path, [prompt.ids for prompt in generation.prompts], _request_id(headers))
        await send_json(send, 200, msgspec.json.encode(body), self._served_by())

    async def _strike(self, receive: Receive) -> bool:
        """Let a failure befall the call before anything is computed; whether one did."""
        faults, now_s = self._engine.faults, self._engine.host.now_s
        stalled = faults.active(FaultKind.STALL, now_s)
        if stalled is not None and stalled.is_before_answer and faults.strike(FaultKind.STALL, now_s):
            await stall(receive)
            return True
        error = faults.strike(FaultKind.ERROR, now_s)
        if error is not None:
            raise CallError(error.status, "InternalServerError", "A failure that was switched on.")
        return False

    def _mishaps(self, generation: Generation) -> Mishaps:
        faults, now_s = self._engine.faults, self._engine.host.now_s
        on = [spec for kind in BREAKS if (spec := faults.active(kind, now_s)) and not spec.is_before_answer]
        broken = next((spec for spec in on if faults.strike(spec.kind, now_s)), None)
        is_leg = generation.is_prefill_leg
        return Mishaps(
            break_kind=None if broken is None else broken.kind,
            break_tokens=1 if broken is None or broken.after_tokens is None else broken.after_tokens,
            loses_ticket=is_leg and faults.strike(FaultKind.LOST_TICKET, now_s) is not None,
            expires_lease=is_leg and faults.strike(FaultKind.EXPIRED_LEASE, now_s) is not None,
        )

    def _answering(self, host: EngineHost, generation: Generation, request_id: str) -> Answering:
        ids = tuple(prompt.ids for prompt in generation.prompts) if generation.wants_ids else None
        return Answering(
            id=request_id,
            model=generation.call.model,
            created=int(host.wall_s(host.now_s)),
            prompt_ids=ids,
            choices_each=generation.choices_each,
        )

    async def _pool(
        self, host: EngineHost, call: Call, request_id: str, prompts: list[tuple[int, ...]], send: Send
    ) -> None:
        mailbox: Mailbox[Answer] = Mailbox()
        open_ids = {f"pool-{request_id}-{i}-{secrets.token_hex(4)}": ids for i, ids in enumerate(prompts)}
        try:
            for engine_id, ids in open_ids.items():
                refused = host.submit(EngineRequest(engine_id, ids, is_pooling=True), mailbox)
                if refused is not None:
                    await self._send_error(send, refusal(refused))
                    return
            for _ in prompts:
                await mailbox.get(timeout_s=SILENCE_S_MAX)
            body = pooling_answer(call, prompts, request_id, int(host.wall_s(host.now_s)))
            await send_json(send, 200, msgspec.json.encode(body), self._served_by())
        finally:
            for engine_id in open_ids:
                host.abort(engine_id)

    # Everything else.

    def _models(self) -> bytes:
        settings = self._engine.host.model.settings
        card: dict[str, Any] = {
            "id": settings.model,
            "object": "model",
            "created": int(self._engine.host.wall_s(self._engine.host.now_s)),
            "owned_by": settings.engine.value,
            "root": settings.model,
            "parent": None,
            "max_model_len": settings.context_tokens_max,
        }
        return msgspec.json.encode({"object": "list", "data": [card]})

    def _server_info(self) -> bytes:
        settings = self._engine.host.model.settings
        info = {
            "model_path": settings.model,
            "page_size": settings.layout.block_tokens,
            "disaggregation_mode": "null" if not settings.is_room_worker else settings.role.value,
            "version": VERSIONS[settings.engine],
        }
        return msgspec.json.encode(info)

    def _reset_cache(self, _raw: bytes) -> bytes:
        self._engine.host.post(CacheCleared())
        return b""

    def _faults(self) -> bytes:
        return msgspec.json.encode({"faults": self._engine.faults.state(self._engine.host.now_s)})

    def _set_faults(self, raw: bytes) -> bytes:
        try:
            body = parse_faults(raw)
        except FaultsBodyError as error:
            raise CallError(400, "BadRequestError", str(error)) from error
        self._engine.set_faults(body)
        return self._faults()

    def _served_by(self) -> list[tuple[bytes, bytes]]:
        return [(SERVED_BY, self._engine.host.model.settings.name.encode())]

    async def _send_error(self, send: Send, error: CallError) -> None:
        is_sglang = self._kind is EngineKind.SGLANG
        body = error_body(error.status, error.kind, str(error), error.param, is_sglang=is_sglang)
        await send_json(send, error.status, body, self._served_by())


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's id, or a new one."""
    for name, value in headers:
        if name == REQUEST_ID and 0 < len(value) <= _ID_LENGTH_MAX:
            return value.decode("ascii", "replace")
    return secrets.token_hex(16)


_ENGINE_PREFIXES = {"/v1/chat/completions": "chatcmpl-", "/v1/completions": "cmpl-"}


def _engine_id(path: str, request_id: str) -> str:
    """What the engine itself calls a request, less the suffix that makes it unique."""
    return _ENGINE_PREFIXES.get(path, "") + request_id
