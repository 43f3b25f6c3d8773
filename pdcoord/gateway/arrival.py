"""A call as it arrives: its body within the bounds of one and of all calls, whose it is, and what it asks."""

from dataclasses import dataclass, field

from pdcoord.core.model import PrefixMode
from pdcoord.core.request import Request
from pdcoord.front.answers import bodies_full, body_too_large, body_too_slow
from pdcoord.front.asked import asked_of
from pdcoord.front.gate import Gate, Visa
from pdcoord.front.intake import build_request, check_reserved, model_unknown
from pdcoord.front.ports import CallRecord, Limits, Relaying, Tokens
from pdcoord.protocol.errors import RefusedError
from pdcoord.protocol.openai import Api, parse_call
from pdcoord.protocol.plans import RungKind
from pdcoord.resume.call import CHAT, COMPLETIONS
from pdcoord.resume.unresumable import Unresumable
from pdcoord.wire.asgi import BodyTimeoutError, NoRoomError, Receive, Scope, read_body
from pdcoord.wire.errors import BodyTooLargeError
from pdcoord.wire.heads import Headers
from pdcoord.wire.room import ByteRoom

CONTINUED_PATHS = frozenset({CHAT, COMPLETIONS})
"""APIs whose streams can go on elsewhere."""


@dataclass(slots=True)
class Body:
    """What goes upstream of a call.

    Attributes:
        room: that all bodies share.
        raw: what goes upstream: as it came, until somebody changes it.
    """

    room: ByteRoom
    raw: bytes = b""
    _bytes_held: int = 0

    async def read(self, headers: Headers, receive: Receive, limits: Limits) -> None:
        """Read it whole.

        Raises:
            RefusedError: if it is too long, too slow, or there is no room for it.
            ClientGoneError: if the client left.
        """
        too_large = body_too_large(limits.body_bytes_max)
        for name, value in headers:
            # Answered before the body is sent where the client says how long it will be.
            if name == b"content-length" and value.isdigit() and int(value) > limits.body_bytes_max:
                raise RefusedError(too_large)
        try:
            self.raw = await read_body(
                receive, bytes_max=limits.body_bytes_max, timeout_s=limits.body_timeout_s, room=self.room
            )
        except BodyTooLargeError as error:
            raise RefusedError(too_large) from error
        except BodyTimeoutError as error:
            raise RefusedError(body_too_slow(limits.body_timeout_s)) from error
        except NoRoomError as error:
            raise RefusedError(bodies_full()) from error
        self._bytes_held = len(self.raw)

    def let_go(self) -> None:
        """Give its room back; idempotent."""
        self.raw = b""
        self.room.give(self._bytes_held)
        self._bytes_held = 0


@dataclass(slots=True)
class Door:
    """What every call comes in by.

    Attributes:
        gate: lets them in by their keys.
        tokens: asked where a model's prefixes are precise; without it they are approximate.
        bodies: the room that their bodies share.
    """

    coordination: Relaying
    gate: Gate
    limits: Limits
    tokens: Tokens | None = None
    bodies: ByteRoom = field(init=False)

    def __post_init__(self) -> None:
        self.bodies = ByteRoom(self.limits.bodies_bytes_max)


class Arrival:
    """One call, from its head to what is sent on of it.

    Args:
        record: told what is found out.

    Attributes:
        body: what goes upstream; let go of once an answer has begun.
        target: path and query.
        visa: what the call's key allows; None before it was looked at.
        is_continued: the policy has the call's stream go on elsewhere if it breaks off.
        why_not_kept: why that cannot be done whatever is in the stream; None if it can.
    """

    def __init__(self, door: Door, api: Api, scope: Scope, record: CallRecord) -> None:
        query = scope.get("query_string", b"")
        self.api = api
        self.body = Body(door.bodies)
        self.target = f"{api.path}?{query.decode('latin-1')}" if query else api.path
        self.visa: Visa | None = None
        self.is_stream = False
        self.is_continued = False
        self.why_not_kept: Unresumable | None = None
        self._door = door
        self._scope = scope
        self._record = record

    @property
    def headers(self) -> Headers:
        """The client's; without its key once that was looked at."""
        headers: Headers = self._scope["headers"]
        return headers

    @property
    def is_kept(self) -> bool:
        """Whether its stream is kept while it passes, to be continued from here."""
        return self.is_continued and self.why_not_kept is None

    async def read(self, receive: Receive) -> Request:
        """Read and check it; the parsed body is gone when this returns.

        Raises:
            RefusedError: for what is wrong with it.
            ClientGoneError: if the client left.
        """
        door, record = self._door, self._record
        visa = self.visa = door.gate.identify(self.headers)
        record.key_name = visa.key_name
        visa.take_request()
        # From here on the key is nowhere: not in what goes upstream, nor in what is traced.
        self._scope["headers"] = visa.headers(self.headers)
        await self.body.read(self.headers, receive, door.limits)
        raw = self.body.raw
        call = visa.salted(parse_call(self.api, raw))
        check_reserved(call)
        model = door.coordination.model(call.model)
        if model is None:
            raise RefusedError(model_unknown(call.model))
        visa.check_model(model, call.model)
        asked = visa.granted(asked_of(self.headers), model)
        record.model = model.name
        record.has_unknown_objective = asked.has_unknown_objective(model)
        self.is_stream = call.is_stream
        self.body.raw = visa.body(raw, call, model)
        token_ids = None
        if door.tokens is not None and self.api.is_generative and model.prefix_mode is PrefixMode.PRECISE:
            token_ids = await door.tokens.tokens(call, model)
        request = build_request(record.id, call, model, token_ids, asked)
        visa.take_prompt(request)
        self.is_continued = self.is_stream and RungKind.RESUME in model.fallback.rungs
        if self.api.path not in CONTINUED_PATHS:
            self.why_not_kept = Unresumable.API
        elif request.choice_count > 1:
            self.why_not_kept = Unresumable.MANY_CHOICES
        record.note_request(call, request, model)
        return request

    def settle(self) -> None:
        """It is over: its key pays for what it took."""
        if self.visa is not None:
            self.visa.settle(self._record)
