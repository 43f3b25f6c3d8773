"""Reads what clients were given of streams that broke off: off the event loop, and one at a time."""

import asyncio
from dataclasses import dataclass

from pdcoord.resume.continuation import (
    Continuation,
    Finished,
    Unresumable,
    continue_stream,
    count_request,
)
from pdcoord.resume.tape import Tape

READERS_MAX = 1
"""A pod that dies breaks all its streams at one moment, and each takes some ms of the interpreter to read.
More threads are done no sooner, and the event loop gets its turns later."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the engine that a stream would go to.

    Attributes:
        context_tokens_max: of its model.
        appends_itself: as of `continue_stream`.
    """

    context_tokens_max: int | None = None
    appends_itself: bool = False


NOTHING_KNOWN = Known()


@dataclass(frozen=True, slots=True)
class Reading:
    """What can be done about one stream.

    Attributes:
        found: what would have it go on elsewhere.
        count_body: what to ask an engine's /tokenize, for the sake of `counted_tokens`; None if nothing. A
            continuation that has a proof asks that in its place.
        passed_bytes: how much had been passed on when it was read.
        known: what it was read for.
    """

    found: Continuation | Finished | Unresumable
    count_body: bytes | None = None
    passed_bytes: int = 0
    known: Known = NOTHING_KNOWN


class Readers:
    """Those of a process."""

    def __init__(self) -> None:
        self._room = asyncio.Semaphore(READERS_MAX)

    async def read(
        self, path: str, tape: Tape, *, counted_tokens: int | None = None, known: Known = NOTHING_KNOWN
    ) -> Reading:
        """Read what passed of a stream that is whole.

        Args:
            path: of the call.
            counted_tokens: an engine's answer to `count_body`.
            known: of the engine that the stream would go to.
        """
        async with self._room:
            return await asyncio.to_thread(_read, path, tape.body, tape.passed, counted_tokens, known)


def _read(path: str, body: bytes, passed: bytes, counted_tokens: int | None, known: Known) -> Reading:
    found = continue_stream(
        path,
        body,
        passed,
        counted_tokens=counted_tokens,
        context_tokens_max=known.context_tokens_max,
        appends_itself=known.appends_itself,
    )
    count_body = None
    # A call that is sent again as it was has nothing to count.
    if isinstance(found, Continuation) and found.prompt_tokens_more and counted_tokens is None:
        count_body = count_request(path, body, passed)
    return Reading(found, count_body, len(passed), known)
