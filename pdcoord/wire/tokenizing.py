"""Asks an engine how it makes tokens of what a stream that broke off has said."""

import asyncio
from dataclasses import dataclass

from pdcoord.protocol.headers import REASON, HostPort
from pdcoord.resume.continuation import Continuation
from pdcoord.resume.proof import Proof, read_tokenized
from pdcoord.wire.client import Client
from pdcoord.wire.errors import WireError
from pdcoord.wire.heads import Headers

TOKENIZE_PATH = "/tokenize"
_ANSWER_BYTES_MAX = 16 << 20


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """An engine, as it is asked.

    Attributes:
        headers: of each question, without a plan: sidecars would tell every coordinator of it as of a request
            that is served.
        timeout_s: for each question.
    """

    client: Client
    address: HostPort
    headers: Headers
    timeout_s: float

    async def count(self, body: bytes) -> int | None:
        """Tokens of a text; None if the engine does not say."""
        try:
            raw, status, _ = await self._ask(body)
        except WireError:
            return None
        answer = read_tokenized(raw) if status == 200 else None
        return None if answer is None else answer.count

    async def prove(self, goes_on: Continuation) -> "Proved":
        """Whether a continuation's proof holds, and how many tokens its text is.

        Raises:
            WireError: if the engine cannot be asked.
        """
        if goes_on.proof is None:
            return Proved(is_proved=True)
        answers = []
        for body in goes_on.proof.questions():
            raw, status, reason = await self._ask(body)
            if status != 200:
                return Proved(is_proved=False, status=status, reason=reason)
            answers.append(raw)
        # Each may have as many tokens as the context: not for the event loop.
        return await asyncio.to_thread(_judged, goes_on.proof, answers)

    async def _ask(self, body: bytes) -> tuple[bytes, int, bytes | None]:
        response = await self.client.request(
            "POST",
            self.address,
            TOKENIZE_PATH,
            headers=self.headers,
            body=body,
            head_timeout_s=self.timeout_s,
        )
        async with response:
            raw = await response.read_all(timeout_s=self.timeout_s, bytes_max=_ANSWER_BYTES_MAX)
        return raw, response.status, response.header(REASON)


@dataclass(frozen=True, slots=True)
class Proved:
    """What came of it.

    Attributes:
        status: of the answer that said nothing, which may mean that nobody serves there now.
        reason: that a sidecar gave for it.
    """

    is_proved: bool
    counted_tokens: int | None = None
    status: int = 200
    reason: bytes | None = None


def _judged(proof: Proof, raws: list[bytes]) -> Proved:
    alone, begun, continued = map(read_tokenized, raws)
    if alone is None or begun is None or continued is None:
        return Proved(is_proved=False)
    return Proved(is_proved=proof.holds(alone, begun, continued), counted_tokens=alone.count)
