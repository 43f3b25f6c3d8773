"""The producers that this rank reads from: dialled once, kept connected, backed off from when they fail."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transfer.backends.base import Backend
from transfer.door import Identity
from transfer.errors import BackendError, Failure, FailureKind, LayoutError
from transfer.layout import RankLayout
from transfer.links import Link, LinkError, LinkLimits, dial, is_loopback, split_address
from transfer.plan import sources_of
from transfer.roce import read_ports
from transfer.session.messages import VERSION, Hello, Message
from transfer.session.vocabulary import Source
from transfer.session.wire import rank_layout_to_wire
from transfer.settings import AgentSettings

BACKOFFS_MAX = 4_096
"""Addresses remembered to have failed; the one that failed longest ago is forgotten."""


@dataclass(frozen=True, slots=True)
class PeersSettings:
    """How producers are dialled; see the fields of the same name in AgentSettings.

    Attributes:
        has_rdma: this node has an RDMA device. Without one UCX carries reads to other hosts over TCP, and
            UCX 1.21 can then end the process that answers when the reading one dies: tcp goes before nixl.
    """

    key: bytes
    host: str
    limits: LinkLimits
    peers_max: int
    backoff_first_s: float
    backoff_max_s: float
    has_rdma: bool = True

    @classmethod
    def of(cls, settings: AgentSettings, limits: LinkLimits) -> "PeersSettings":
        return cls(
            settings.key,
            settings.advertise_host,
            limits,
            settings.peers_max,
            settings.backoff_first_s,
            settings.backoff_max_s,
            has_rdma=bool(read_ports()),
        )

    def preference(self, backends: Iterable[str], address: str) -> list[str]:
        """Names of backends for this producer, the best first."""
        names = list(backends)
        host, _ = split_address(address)
        is_here = is_loopback(host) or host == self.host.strip("[]")
        if is_here or self.has_rdma or not {"nixl", "tcp"} <= set(names):
            return names
        return ["tcp", *(name for name in names if name != "tcp")]


@dataclass(slots=True)
class _Backoff:
    """An address that failed; `epoch` is the last that a ticket named when it was dialled in vain."""

    until_s: float
    wait_s: float
    failure: Failure
    epoch: str


@dataclass(slots=True)
class Group:
    """The ranks of one producer that this rank reads from.

    Attributes:
        links: by rank; all of them open, or the group is forgotten.
        sources: as the Inbox knows them.
    """

    address: str
    epoch: str
    links: dict[int, Link] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()

    @property
    def is_open(self) -> bool:
        return all(link.is_open for link in self.links.values())


class Peers:
    """All producers, by the address of their rank 0.

    Whatever is heard of a link, and its end, is told to `hear` and `lost`. Lives in one event loop.
    """

    def __init__(
        self,
        identity: Identity,
        layout: RankLayout,
        backends: Mapping[str, Backend],
        settings: PeersSettings,
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"],
        hear: Callable[[Link, Message], None],
        lost: Callable[[Link, Failure], None],
    ) -> None:
        self._identity = identity
        self._layout = layout
        self._backends = backends
        self._settings = settings
        self._spawn = spawn
        self._hear = hear
        self._lost = lost
        self._groups: OrderedDict[str, Group] = OrderedDict()
        self._dialling: dict[str, asyncio.Future[Group]] = {}
        self._backoffs: OrderedDict[str, _Backoff] = OrderedDict()
        self._links: dict[str, Link] = {}

    @property
    def group_count(self) -> int:
        return len(self._groups)

    def link(self, link_id: str) -> Link | None:
        """An open link by its id."""
        found = self._links.get(link_id)
        return found if found is not None and found.is_open else None

    async def connect(self, address: str) -> Group:
        """The producer's ranks, dialled if they are not connected.

        Raises:
            LinkError: if it cannot be connected, or could not a moment ago.
        """
        group = self._groups.get(address)
        if group is not None:
            if group.is_open:
                self._groups.move_to_end(address)
                return group
            del self._groups[address]
            _end_all(group.links)
        dialling = self._dialling.get(address)
        if dialling is None:
            self._check_backoff(address)
            dialling = self._dialling[address] = asyncio.get_running_loop().create_future()
            self._spawn(self._dial_into(address, dialling))
        return await asyncio.shield(dialling)

    def hint(self, address: str, epoch: str) -> None:
        """A ticket names this producer: one of an epoch that was not dialled in vain yet is dialled at once.

        Else an engine that was started again would be waited for as long as its last life was not there.
        """
        backoff = self._backoffs.get(address)
        if backoff is not None and epoch not in {"", backoff.epoch}:
            backoff.epoch = epoch
            backoff.until_s = 0.0

    def close(self) -> None:
        for link in list(self._links.values()):
            link.end(FailureKind.CLOSED)

    def _check_backoff(self, address: str) -> None:
        backoff = self._backoffs.get(address)
        if backoff is not None and time.monotonic() < backoff.until_s:
            raise LinkError(backoff.failure.kind, f"{backoff.failure.detail} (not tried again yet)")

    async def _dial_into(self, address: str, result: "asyncio.Future[Group]") -> None:
        try:
            group = await self._dial_group(address)
        except LinkError as error:
            self._back_off(address, error.failure)
            _fail(result, error)
        else:
            self._backoffs.pop(address, None)
            self._groups[address] = group
            if not result.done():
                result.set_result(group)
        finally:
            del self._dialling[address]
            _fail(result, LinkError(FailureKind.CLOSED))  # Cancelled, if nothing was set by now.

    def _back_off(self, address: str, failure: Failure) -> None:
        before = self._backoffs.pop(address, None)
        settings = self._settings
        wait_s = (
            settings.backoff_first_s if before is None else min(2 * before.wait_s, settings.backoff_max_s)
        )
        epoch = "" if before is None else before.epoch
        self._backoffs[address] = _Backoff(time.monotonic() + wait_s, wait_s, failure, epoch)
        if len(self._backoffs) > BACKOFFS_MAX:
            self._backoffs.popitem(last=False)

    async def _dial_group(self, address: str) -> Group:
        """Connect rank 0, learn of the others from it, and connect those that are needed."""
        self._make_room()
        links: dict[int, Link] = {}
        try:
            first = await self._dial(address)
            links[0] = first
            layout = _rank_0(first, address)
            needs = sources_of(self._layout, layout.layout.tensor_parallel)
            for need in needs:
                if need.rank not in links:
                    links[need.rank] = await self._dial_rank(first, need.rank)
            sources = tuple(
                Source(
                    links[need.rank].id,
                    _layout(links[need.rank]),
                    need.reader_count,
                    links[need.rank].peer.staging_bytes,
                )
                for need in needs
            )
        except LayoutError as error:
            _end_all(links)
            raise LinkError(FailureKind.IMPOSSIBLE_LAYOUT, str(error)) from error
        except BaseException:
            _end_all(links)
            raise
        return Group(address, first.peer.epoch, links, sources)

    async def _dial_rank(self, first: Link, rank: int) -> Link:
        ranks = first.peer.ranks
        if rank >= len(ranks):
            raise LinkError(FailureKind.UNREACHABLE, f"the producer has not told where its rank {rank} is")
        if is_loopback(split_address(ranks[rank])[0]) and not is_loopback(first.host):
            detail = (
                f"the producer's rank {rank} advertises {ranks[rank]}, this very host: set advertise_host"
            )
            raise LinkError(FailureKind.UNREACHABLE, detail)
        link = await self._dial(ranks[rank])
        is_same = (link.peer.engine_id, link.peer.epoch) == (first.peer.engine_id, first.peer.epoch)
        if not is_same or _layout(link).rank != rank:
            link.end(FailureKind.STALE_EPOCH)
            raise LinkError(FailureKind.STALE_EPOCH, f"rank {rank} is not of the engine that rank 0 is of")
        return link

    async def _dial(self, address: str) -> Link:
        settings = self._settings
        hello = Hello(
            version=VERSION,
            nonce=b"",
            engine_id=self._identity.engine_id,
            epoch=self._identity.epoch,
            layout=rank_layout_to_wire(self._layout),
            backends=tuple(
                (name, self._backends[name].metadata())
                for name in settings.preference(self._backends, address)
            ),
            host=settings.host,
        )
        link = await dial(address, hello, settings.key, settings.limits)
        self._links[link.id] = link
        self._spawn(self._run(link))
        backend = self._backends.get(link.peer.backend)
        if backend is None:
            link.end(FailureKind.MALFORMED)
            raise LinkError(FailureKind.MALFORMED, f"{address} chose a backend that was not offered")
        try:
            async with asyncio.timeout(settings.limits.handshake_timeout_s):
                await asyncio.wrap_future(backend.connect(link.id, link.peer.metadata))
        except (TimeoutError, BackendError) as error:
            link.end(FailureKind.UNREACHABLE)
            detail = str(error) or "it did not connect in time"
            raise LinkError(FailureKind.UNREACHABLE, f"{address} by {link.peer.backend}: {detail}") from error
        return link

    async def _run(self, link: Link) -> None:
        """A link to its end; its backend forgets the peer, so that reads from it end soon."""
        try:
            failure = await link.run(lambda message: self._hear(link, message))
        finally:
            del self._links[link.id]
            self._forget_groups_of(link)
            backend = self._backends.get(link.peer.backend)
            if backend is not None:
                backend.forget(link.id)
        self._lost(link, failure)

    def _forget_groups_of(self, link: Link) -> None:
        for address, group in list(self._groups.items()):
            if link in group.links.values():
                del self._groups[address]
                _end_all(group.links)

    def _make_room(self) -> None:
        """Drop the producer that was connected longest ago if there are too many; its reads fail."""
        while self._groups and len(self._groups) + len(self._dialling) > self._settings.peers_max:
            _, oldest = self._groups.popitem(last=False)
            _end_all(oldest.links)


def _layout(link: Link) -> RankLayout:
    assert link.peer.layout is not None, "a producer tells its layout"
    return link.peer.layout


def _rank_0(link: Link, address: str) -> RankLayout:
    layout = _layout(link)
    if layout.rank != 0:
        raise LinkError(FailureKind.MALFORMED, f"{address} is rank {layout.rank}, expected rank 0")
    return layout


def _end_all(links: dict[int, Link]) -> None:
    for link in links.values():
        link.end(FailureKind.PEER_LOST, "another rank of the producer is gone")


def _fail(result: "asyncio.Future[Group]", error: LinkError) -> None:
    if not result.done():
        result.set_exception(error)
        result.exception()  # Whoever waited may be gone; then nobody else asks.
