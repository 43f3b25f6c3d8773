"""What the client of one call gets: an engine's answer, an error that was held, or a refusal of ours."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from pdcoord.core.events import Outcome
from pdcoord.front import upstream as wires
from pdcoord.front.answers import outcome_of
from pdcoord.front.ports import CallRecord
from pdcoord.gateway.held import Held
from pdcoord.gateway.streams import Answer
from pdcoord.protocol import headers as names
from pdcoord.protocol.errors import Refusal
from pdcoord.resume.tape import Tape
from pdcoord.resume.unresumable import Unresumable
from pdcoord.wire.asgi import Scope, Send, send_json
from pdcoord.wire.response import Response

_BREAK_OFF_S = 10.0
"""Longest time that a client is given to take the error that ends its answer."""


class Reply:
    """The one answer to a call, and what the record says of it.

    Args:
        record: its path is the API's whose form errors have.
        shown_id: the request id that the client is told.
        clock: monotonic seconds.

    Attributes:
        has_begun: its head has been sent, so nothing can be taken back.
    """

    def __init__(
        self, scope: Scope, send: Send, record: CallRecord, shown_id: str, *, clock: Callable[[], float]
    ) -> None:
        self.has_begun = False
        self._scope = scope
        self._send = send
        self._record = record
        self._id_header = (names.REQUEST_ID, shown_id.encode())
        self._clock = clock
        self._answer: Answer | None = None

    async def begin(
        self, response: Response, decision: bytes, *, tape: Tape | None, why_not_kept: Unresumable
    ) -> Answer:
        """Begin to pass an engine's answer on; its head has been sent when this returns.

        Args:
            decision: how the call was served, and why so.
            tape, why_not_kept: as of `Answer`.
        """
        self.has_begun = True
        self._record.status = response.status
        self._record.first_byte_s = self._clock()
        headers = wires.headers_to_client(response.headers)
        headers += [self._id_header, (names.DECISION, decision)]
        answer = Answer(self._scope, self._send, response, tape=tape, why_not_kept=why_not_kept)
        self._answer = answer
        await answer.begin(headers)
        return answer

    async def give(self, held: Held, *headers: tuple[bytes, bytes]) -> None:
        """Send an engine's error, with these headers beside its own."""
        self.has_begun = True
        self._record.status = held.status
        self._record.outcome = Outcome.UPSTREAM_ERROR if held.status >= 500 else Outcome.CLIENT_ERROR
        await send_json(self._send, held.status, held.body, [*held.headers, *headers, self._id_header])

    async def refuse(self, refusal: Refusal) -> None:
        """Send a refusal; the answer has not begun."""
        self.has_begun = True
        self._record.status = refusal.status
        self._record.reason = refusal.reason
        self._record.outcome = outcome_of(refusal)
        headers = [*refusal.headers(), self._id_header]
        await send_json(self._send, refusal.status, refusal.body(self._record.path), headers)

    async def stop(self, refusal: Refusal) -> None:
        """Refuse the call or break its answer off, for a reason of ours that is none of its endpoint's."""
        if not self.has_begun:
            await self.refuse(refusal)
            return
        self._record.outcome, self._record.reason = Outcome.REFUSED, refusal.reason
        if self._answer is not None:
            with suppress(Exception):  # What the client cannot be told any more it need not be.
                async with asyncio.timeout(_BREAK_OFF_S):
                    await self._answer.break_off(refusal)

    def close(self) -> None:
        """It is over: count what was passed on, and let go of what was kept."""
        if self._answer is not None:
            self._record.output_tokens = self._answer.output_tokens()
            self._answer.close()
