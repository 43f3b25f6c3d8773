"""The decode side of a hand-over: handshakes, pulls, heartbeats, and the NIC that KV arrives by."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from msgspec.structs import replace

from pdcoord.protocol.headers import HostPort
from pdcoord.sim.live import LiveRequest, Shared, State
from pdcoord.sim.messages import (
    AskHandshake,
    AskPull,
    ClosePull,
    ConsumerEvent,
    EngineRequest,
    FailReason,
    HandshakeAnswered,
    HandshakeFailed,
    PeerInfo,
    PullAsk,
    PullBroken,
    PullCancelled,
    PullDenied,
    PullGrant,
    PullGranted,
    PullShareChanged,
    SendHeartbeat,
    SendRelease,
    TransferDone,
)
from pdcoord.sim.network import Nic
from pdcoord.sim.tokens import mix, prompt_digest
from transfer.verdict import Connector, Side, verdict

PEERS_MAX = 1_024
"""Producers remembered; the one met longest ago is forgotten and greeted again if it is needed."""


class Stage(StrEnum):
    """How far a fetch is; closing waits for word that nothing writes into its blocks any more."""

    GREETING = "greeting"
    ASKED = "asked"
    SETUP = "setup"
    MOVING = "moving"
    CLOSING = "closing"


@dataclass(slots=True)
class Fetch:
    """One request's KV on its way.

    Attributes:
        missing_tokens: prompt tokens that are not in the local cache.
        failure: of a closing fetch, what to report once it is closed; None if the request was aborted.
    """

    live: LiveRequest
    address: HostPort
    pull_id: str
    missing_tokens: int
    began_s: float
    stage: Stage = Stage.GREETING
    grant: PullGrant | None = None
    transfer_bytes: int = 0
    moving_since_s: float = 0.0
    failure: tuple[FailReason, str] | None = None


@dataclass(slots=True)
class _Peer:
    """A producer that was greeted or is being greeted."""

    info: PeerInfo | None = None
    is_asking: bool = False
    ready_s: float = 0.0
    waiting: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class FetchEnded:
    """What came of a fetch.

    Attributes:
        grant: what was fetched; None if the fetch failed.
        failure: None for one that arrived, and for one that was aborted.
    """

    live: LiveRequest
    grant: PullGrant | None
    failure: tuple[FailReason, str] | None


class Consumer:
    """What one engine wants from producers.

    Attributes:
        ended: fetches that ended since the caller last emptied it.
    """

    def __init__(self, shared: Shared, engine_id: str) -> None:
        self.nic = Nic(shared.settings.link_bytes_per_s)
        self.ended: list[FetchEnded] = []
        self._shared = shared
        self._engine_id = engine_id
        self._pull_count = 0
        self._fetches: dict[str, Fetch] = {}
        self._fetch_of: dict[str, str] = {}
        self._peers: OrderedDict[HostPort, _Peer] = OrderedDict()

    def fetches(self) -> tuple[Fetch, ...]:
        return tuple(self._fetches.values())

    def begin(self, live: LiveRequest, address: HostPort, missing_tokens: int) -> None:
        """Fetch a request's KV into the blocks it has been given."""
        self._pull_count += 1
        pull_id = f"{self._engine_id}/{self._pull_count}"
        fetch = Fetch(live, address, pull_id, missing_tokens, self._shared.now_s)
        self._fetches[pull_id] = fetch
        self._fetch_of[live.id] = pull_id
        self._shared.timers.set(("fetch", pull_id), self._shared.now_s + self._shared.settings.pull_s_max)
        peer = self._peer(address)
        is_known = peer.info is not None and self._is_engine_meant(fetch, peer.info)
        if is_known and not peer.is_asking and peer.ready_s <= self._shared.now_s:
            self._ask(fetch)
            return
        peer.waiting.append(pull_id)
        if not is_known and not peer.is_asking:
            peer.is_asking = True
            self._shared.emit(AskHandshake(address))

    def _peer(self, address: HostPort) -> _Peer:
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = _Peer()
            self._forget_one()
        return peer

    def _forget_one(self) -> None:
        if len(self._peers) > PEERS_MAX:
            for address, peer in self._peers.items():
                if not peer.waiting and not peer.is_asking:
                    del self._peers[address]
                    return

    @staticmethod
    def _is_engine_meant(fetch: Fetch, info: PeerInfo) -> bool:
        ticket = fetch.live.request.ticket
        return ticket is None or ticket.engine_id in {"", info.engine_id}

    # Greeting.

    def on_event(self, event: ConsumerEvent) -> None:
        """A producer, or the way to it, answered."""
        match event:
            case HandshakeAnswered():
                self.on_handshake(event.address, event.info)
            case HandshakeFailed():
                self.on_handshake(event.address, None)
            case PullGranted():
                self.on_granted(event.pull_id, event.grant)
            case PullShareChanged():
                self.on_share(event.pull_id, event.share_bytes_per_s)
            case PullDenied():
                detail = f"the producer refuses the ticket: {event.reason}"
                self.on_refused(event.pull_id, FailReason.PULL_DENIED, detail)
            case PullBroken():
                detail = "the producer's connection is gone"
                self.on_refused(event.pull_id, FailReason.PULL_BROKEN, detail)
            case PullCancelled():
                self.on_cancelled(event.pull_id)

    def on_handshake(self, address: HostPort, info: PeerInfo | None) -> None:
        """The producer told of itself, or (None) did not answer."""
        peer = self._peers.get(address)
        if peer is None or not peer.is_asking:
            return
        peer.is_asking = False
        if info is None:
            peer.info = None
            self._fail_all(peer, FailReason.HANDSHAKE_FAILED, "no answer from the producer's side channel")
            return
        if peer.info is None or peer.info.engine_id != info.engine_id:
            peer.ready_s = self._shared.now_s + self._shared.settings.handshake_s
        peer.info = info
        self._shared.timers.set(("peer", address), max(peer.ready_s, self._shared.now_s))

    def on_peer_timer(self, address: HostPort) -> None:
        """A producer has become known: go on with whoever waited for it."""
        peer = self._peers.get(address)
        if peer is None or peer.info is None:
            return
        objection = self._objection(peer.info)
        waiting, peer.waiting = peer.waiting, []
        for pull_id in waiting:
            fetch = self._fetches.get(pull_id)
            if fetch is None or fetch.stage is not Stage.GREETING:
                continue
            if objection is not None:
                self._end(fetch, (FailReason.INCOMPATIBLE, objection))
            elif not self._is_engine_meant(fetch, peer.info):
                detail = "the ticket is of an engine that has restarted: engine ids differ"
                self._end(fetch, (FailReason.HANDSHAKE_FAILED, detail))
            else:
                self._ask(fetch)

    def _objection(self, info: PeerInfo) -> str | None:
        settings = self._shared.settings
        if info.model != settings.model:
            return "the producer serves another model"
        found = verdict(Side(info.speaks, info.layout), settings.side)
        if found.is_possible or self._corrupts_silently(info):
            return None
        return f"compatibility mismatch: {found.reason}"

    def _corrupts_silently(self, info: PeerInfo) -> bool:
        """Block sizes that divide pass the stock handshake (vLLM 0.32), and the KV lands in wrong places."""
        settings = self._shared.settings
        mine, theirs = settings.layout.block_tokens, info.layout.block_tokens
        return (
            settings.is_silent_corruption_stock
            and settings.connector is Connector.NIXL
            and info.speaks is Connector.NIXL
            and info.layout.differences(settings.layout) == ["block_tokens"]
            and mine % theirs == 0
        )

    def _fail_all(self, peer: _Peer, reason: FailReason, detail: str) -> None:
        waiting, peer.waiting = peer.waiting, []
        for pull_id in waiting:
            if (fetch := self._fetches.get(pull_id)) is not None:
                self._end(fetch, (reason, detail))

    # Pulling.

    def _ask(self, fetch: Fetch) -> None:
        fetch.stage = Stage.ASKED
        request = fetch.live.request
        if request.ticket is not None:
            ticket = request.ticket
            ask = PullAsk(
                engine_id=ticket.engine_id, request_id=ticket.request_id, block_ids=ticket.block_ids
            )
        else:
            assert request.room is not None, "a fetch has neither ticket nor room"
            ask = PullAsk(room=request.room.room)
        self._shared.emit(AskPull(fetch.pull_id, fetch.address, ask))

    def on_granted(self, pull_id: str, grant: PullGrant) -> None:
        fetch = self._fetches.get(pull_id)
        if fetch is None or fetch.stage is not Stage.ASKED:
            return
        fetch.grant = grant
        fetch.stage = Stage.SETUP
        at_s = self._shared.now_s + self._shared.settings.pull_setup_s
        self._shared.timers.set(("setup", pull_id), at_s)

    def on_setup_timer(self, pull_id: str) -> None:
        fetch = self._fetches[pull_id]
        assert fetch.grant is not None, "a pull was set up without a grant"
        grant = fetch.grant
        fetch.stage = Stage.MOVING
        fetch.moving_since_s = self._shared.now_s
        # Whole blocks move, the producer's.
        missing = max(0, min(fetch.missing_tokens, grant.token_count - grant.sent_tokens))
        block_count = -(-missing // grant.block_tokens)
        fetch.transfer_bytes = block_count * grant.block_tokens * grant.kv_bytes_per_token
        self.nic.begin(pull_id, self._shared.now_s, fetch.transfer_bytes, grant.share_bytes_per_s)
        self._set_nic_timer()

    def on_share(self, pull_id: str, share_bytes_per_s: float) -> None:
        fetch = self._fetches.get(pull_id)
        if fetch is None or fetch.grant is None:
            return
        if fetch.stage is Stage.SETUP:
            fetch.grant = replace(fetch.grant, share_bytes_per_s=share_bytes_per_s)
            return
        self.nic.set_peer_share(pull_id, share_bytes_per_s, self._shared.now_s)
        self._set_nic_timer()

    def on_nic_timer(self) -> None:
        for pull_id in self.nic.advance(self._shared.now_s):
            fetch = self._fetches[pull_id]
            assert fetch.grant is not None, "a pull moved without a grant"
            self._shared.emit(ClosePull(pull_id, is_done=True))
            self._shared.emit(
                TransferDone(
                    fetch.live.id,
                    fetch.transfer_bytes,
                    fetch.transfer_bytes // (fetch.grant.block_tokens * fetch.grant.kv_bytes_per_token),
                    self._shared.now_s - fetch.moving_since_s,
                )
            )
            self._end(fetch, None)
        self._set_nic_timer()

    def on_refused(self, pull_id: str, reason: FailReason, detail: str) -> None:
        """The producer denied the pull, or its connection is gone: nothing writes any more."""
        fetch = self._fetches.get(pull_id)
        if fetch is not None:
            failure = fetch.failure if fetch.stage is Stage.CLOSING else (reason, detail)
            self._end(fetch, failure, is_broken=True)

    def on_cancelled(self, pull_id: str) -> None:
        """A pull that was closed unfinished is really closed."""
        fetch = self._fetches.get(pull_id)
        if fetch is not None and fetch.stage is Stage.CLOSING:
            self._end(fetch, fetch.failure, is_broken=True)

    def on_fetch_timer(self, pull_id: str) -> None:
        fetch = self._fetches[pull_id]
        self._close(fetch, (FailReason.PULL_TIMEOUT, "the KV did not arrive in time"))

    def cancel(self, live: LiveRequest) -> None:
        """Stop fetching for a request nobody waits for; `ended` says when its blocks are its own again."""
        self._close(self._fetches[self._fetch_of[live.id]], None)

    def _close(self, fetch: Fetch, failure: tuple[FailReason, str] | None) -> None:
        fetch.failure = failure
        if fetch.stage is Stage.GREETING:
            self._end(fetch, failure, is_broken=True)
            return
        if fetch.stage is Stage.CLOSING:
            return
        fetch.stage = Stage.CLOSING
        self._shared.timers.clear(("setup", fetch.pull_id))
        self._shared.timers.clear(("fetch", fetch.pull_id))
        self.nic.end(fetch.pull_id, self._shared.now_s)
        self._set_nic_timer()
        self._shared.emit(ClosePull(fetch.pull_id, is_done=False))

    def _end(self, fetch: Fetch, failure: tuple[FailReason, str] | None, *, is_broken: bool = False) -> None:
        del self._fetches[fetch.pull_id]
        del self._fetch_of[fetch.live.id]
        self._shared.timers.clear(("fetch", fetch.pull_id))
        self._shared.timers.clear(("setup", fetch.pull_id))
        self.nic.end(fetch.pull_id, self._shared.now_s)
        self._set_nic_timer()
        if failure is not None:
            self._shared.counters.failed_transfers += 1
        arrived = failure is None and not is_broken
        if arrived:
            self._shared.counters.arrived_transfers += 1
        self.ended.append(FetchEnded(fetch.live, fetch.grant if arrived else None, failure))

    def taint_of(self, live: LiveRequest, grant: PullGrant) -> int:
        """What is wrong with fetched KV; 0 if it is this prompt's, in the right places."""
        if grant.taint:
            return grant.taint
        expected = prompt_digest(live.request.prompt[: grant.token_count])
        if grant.digest != expected or grant.token_count > live.prompt_tokens:
            return mix(grant.digest, expected) | 1
        mine = self._shared.settings.layout.block_tokens
        if mine != grant.block_tokens and self._shared.settings.connector is Connector.NIXL:
            return mix(mine, grant.block_tokens) | 1
        return 0

    # Leases of requests that wait.

    def arm_heartbeat(self) -> None:
        """Begin to renew leases, if that has not begun."""
        if ("heartbeat", "") not in self._shared.timers:
            at_s = self._shared.now_s + self._shared.settings.heartbeat_s
            self._shared.timers.set(("heartbeat", ""), at_s)

    def on_heartbeat_timer(self, lives: Iterable[LiveRequest]) -> None:
        """Renew the leases of requests whose KV has not come yet."""
        waiting: dict[tuple[HostPort, str], list[str]] = {}
        for live in lives:
            ticket = live.request.ticket
            if ticket is not None and live.awaits_fetch and live.state is not State.CLOSING:
                waiting.setdefault((ticket.address, ticket.engine_id), []).append(ticket.request_id)
        for (address, engine_id), request_ids in waiting.items():
            self._shared.emit(SendHeartbeat(address, engine_id, tuple(request_ids)))
        if waiting:
            self.arm_heartbeat()

    def release(self, request: EngineRequest) -> None:
        """Tell the producer of a request's ticket, if it has one, that nobody will fetch."""
        ticket = request.ticket
        if ticket is not None:
            self._shared.emit(SendRelease(ticket.address, ticket.engine_id, ticket.request_id))

    # Inside.

    def set_link_factor(self, factor: float) -> None:
        self.nic.set_factor(factor, self._shared.now_s)
        self._set_nic_timer()

    def _set_nic_timer(self) -> None:
        at_s = self.nic.next_completion_s()
        if at_s is None:
            self._shared.timers.clear(("nic", ""))
        else:
            self._shared.timers.set(("nic", ""), max(at_s, self._shared.now_s))

    def validate(self) -> None:
        """Assert that fetches and flows agree."""
        assert {pull_id: f.live.id for pull_id, f in self._fetches.items()} == {
            pull_id: request_id for request_id, pull_id in self._fetch_of.items()
        }, "fetches are indexed wrongly"
        moving = {pull_id for pull_id, f in self._fetches.items() if f.stage is Stage.MOVING}
        assert set(self.nic.flow_ids) == moving, "flows differ from the pulls that move"
        for pull_id, fetch in self._fetches.items():
            is_timed = ("fetch", pull_id) in self._shared.timers
            assert is_timed or fetch.stage is Stage.CLOSING, "a fetch has no deadline"
