"""Probes: connect a producer, read a known pattern from it, and tell what really carried it and how fast.

An engine's agent probes through its own backends and staging, so that a probe says what a transfer would
meet, and leaves the pair connected. A sidecar asks the agent of its own engine (side_client).
"""

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transfer.backends.base import Backend, Piece, ReadReport
from transfer.digest import part_digest, pattern
from transfer.errors import BackendError, Failure, FailureKind, PeerLostError, ReadTimeoutError, SettingError
from transfer.links import Link, LinkError
from transfer.peers import Group, Peers
from transfer.session.arena import Arena
from transfer.session.messages import PatternAsk, PatternTold, ProbeTold
from transfer.side_client import can_ask
from transfer.staging import Staging

SMALL_BYTES = 4_096
"""Read to tell the latency."""
PATTERN_SHARE_MAX = 32
"""At most one part in so many of the staging buffer serves as the pattern, and as much as each landing."""
LANDINGS = 4
LATENCY_READS = 3
PROBES_MAX = 64
"""Probes that are under way or wait for their turn."""


class PatternServer:
    """A pattern in the staging buffer for others to read, and room for some of theirs to land.

    Attributes:
        landings: offsets of that room.
        reserved_bytes: taken from the arena for both, for good.
    """

    def __init__(self, staging: Staging, arena: Arena, epoch: str, length_bytes: int) -> None:
        self.length_bytes = max(SMALL_BYTES, min(length_bytes, arena.free_bytes // PATTERN_SHARE_MAX))
        before = arena.used_bytes
        offset = arena.allocate(self.length_bytes)
        landings = [arena.allocate(self.length_bytes, from_end=True) for _ in range(LANDINGS)]
        self.landings = [landing for landing in landings if landing is not None]
        if offset is None or len(self.landings) < LANDINGS:
            raise SettingError("staging_bytes", staging.region.length_bytes, "give more, 64 KiB at least")
        self._offset = offset
        self.reserved_bytes = arena.used_bytes - before
        self._pattern = pattern(epoch, self.length_bytes)
        staging.write_bytes(offset, self._pattern)

    def tell(self, length_bytes: int) -> PatternTold:
        """Where the first bytes of the pattern are, and what they must come to."""
        length_bytes = min(length_bytes, self.length_bytes)
        digest = part_digest(memoryview(self._pattern)[:length_bytes])
        return PatternTold(offset=self._offset, length_bytes=length_bytes, digest=digest)


def may_ask_probes(link: Link, key: bytes) -> bool:
    """Whether a connection may have this agent dial others: it has proved the key, or is of this host."""
    return bool(key) or can_ask(link.host)


class Prober:
    """Carries out probes, as many at a time as there are landings; the others wait for one."""

    def __init__(
        self,
        peers: Peers,
        backends: Mapping[str, Backend],
        staging: Staging,
        patterns: PatternServer,
        transports: Sequence[str],
    ) -> None:
        self._peers = peers
        self._backends = backends
        self._staging = staging
        self._patterns = patterns
        self._transports = transports
        self._landings: asyncio.Queue[int] = asyncio.Queue()
        for landing in patterns.landings:
            self._landings.put_nowait(landing)
        self._count = 0
        self._waiting: dict[str, deque[asyncio.Future[PatternTold]]] = {}

    def heard(self, link: Link, told: PatternTold) -> None:
        """An answer; they come in the order of the questions."""
        waiting = self._waiting.get(link.id)
        if waiting:
            answer = waiting.popleft()
            if not answer.done():
                answer.set_result(told)

    def lost(self, link: Link, failure: Failure) -> None:
        for answer in self._waiting.pop(link.id, ()):
            if not answer.done():
                answer.set_exception(LinkError(failure.kind, failure.detail))

    async def probe(self, address: str, timeout_s: float) -> ProbeTold:
        """Probe a producer; failures are told, never raised."""
        if self._count >= PROBES_MAX:
            return failed_probe(address, FailureKind.OVERLOADED, f"{PROBES_MAX} probes are under way")
        self._count += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await self._probe(address, timeout_s)
        except LinkError as error:
            return failed_probe(address, error.failure.kind, error.failure.detail)
        except TimeoutError:
            return failed_probe(
                address, FailureKind.TRANSFER_TIMEOUT, f"no whole pattern came in {timeout_s:g} s"
            )
        except PeerLostError as error:
            return failed_probe(address, FailureKind.PEER_LOST, str(error))
        except ReadTimeoutError as error:
            return failed_probe(address, FailureKind.TRANSFER_TIMEOUT, str(error))
        except BackendError as error:
            return failed_probe(address, FailureKind.READ_FAILED, str(error))
        finally:
            self._count -= 1

    async def _probe(self, address: str, timeout_s: float) -> ProbeTold:
        until_s = time.monotonic() + timeout_s
        group = await self._peers.connect(address)
        link = group.links[min(group.links)]
        landing = await self._landings.get()
        try:
            return await self._read_patterns(address, group, _Place(link, landing, until_s))
        except PeerLostError as error:
            link.end(FailureKind.PEER_LOST, str(error))  # So that the next one connects anew.
            raise
        finally:
            self._landings.put_nowait(landing)

    async def _read_patterns(self, address: str, group: Group, place: "_Place") -> ProbeTold:
        link = place.link
        small = [await self._read(place, SMALL_BYTES) for _ in range(LATENCY_READS)]
        large = await self._read(place, self._patterns.length_bytes)
        kind, reason = link.peer.verdict
        transport = self._backends[link.peer.backend].transport(link.id)
        return ProbeTold(
            address=address,
            verdict=kind,
            verdict_reason=reason,
            backend=link.peer.backend,
            transport=transport,
            is_degraded=self._is_degraded(link, transport),
            latency_s=min(report.moved_s for report in small),
            bytes_per_s=large.read_bytes / max(large.moved_s, 1e-9),
            epoch=group.epoch,
        )

    def _is_degraded(self, link: Link, transport: str) -> bool:
        # A backend may know better than the name of a transport tells, as NIXL's does of RDMA devices.
        backend = self._backends[link.peer.backend]
        knows = getattr(backend, "is_degraded", None)
        if knows is not None and knows(link.id):
            return True
        wanted = self._transports
        return bool(wanted) and not any(name.lower() in transport.lower() for name in wanted)

    async def _read(self, place: "_Place", length_bytes: int) -> ReadReport:
        link = place.link
        told = await self._ask(link, length_bytes)
        is_in_bounds = told.offset + told.length_bytes <= link.peer.staging_bytes
        if not 0 < told.length_bytes <= length_bytes or not is_in_bounds:
            raise LinkError(FailureKind.MALFORMED, "the pattern it told of is not in its staging buffer")
        piece = Piece(told.offset, place.landing, told.length_bytes)
        left_s = max(0.01, place.until_s - time.monotonic())
        backend = self._backends[link.peer.backend]
        reading = asyncio.wrap_future(backend.read(link.id, (piece,), timeout_s=left_s))
        try:
            report = await asyncio.shield(reading)
        except asyncio.CancelledError:
            # The landing is free again only when the read has ended, which the backend bounds.
            await asyncio.wait([reading])
            _ = reading.exception()
            raise
        landed = self._staging.read_bytes(place.landing, told.length_bytes)
        if part_digest(landed) != told.digest:
            raise LinkError(FailureKind.WRONG_DIGEST, "what was read is not the pattern")
        return report

    async def _ask(self, link: Link, length_bytes: int) -> PatternTold:
        if not link.is_open:
            raise LinkError(FailureKind.PEER_LOST, "the side channel is closed")
        # A question that nobody waits for any more keeps its place: its answer comes first.
        owed = self._waiting.setdefault(link.id, deque())
        if len(owed) >= PROBES_MAX:
            raise LinkError(FailureKind.TRANSFER_TIMEOUT, f"it owes {len(owed)} answers")
        waiting: asyncio.Future[PatternTold] = asyncio.get_running_loop().create_future()
        owed.append(waiting)
        link.send(PatternAsk(length_bytes=length_bytes))
        return await waiting


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one probe reads from, lands, and until when."""

    link: Link
    landing: int
    until_s: float


def failed_probe(address: str, kind: FailureKind, detail: str) -> ProbeTold:
    """What is told of a probe that failed."""
    is_known = kind is FailureKind.IMPOSSIBLE_LAYOUT
    return ProbeTold(
        address=address,
        failure=str(kind),
        detail=detail[:1000],
        verdict="impossible" if is_known else "",
        verdict_reason=detail[:1000] if is_known else "",
    )
