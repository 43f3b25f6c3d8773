"""The prefill side of a hand-over: leases on finished blocks, rooms, and the NIC that KV leaves by."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from msgspec.structs import replace

from pdcoord.sim.live import LiveRequest, Shared
from pdcoord.sim.messages import (
    DenyPull,
    DenyReason,
    GrantPull,
    IssuedTicket,
    PullAsk,
    PullGrant,
    TellShare,
)
from pdcoord.sim.network import Nic

REMEMBERED_MAX = 4_096
"""Ended leases remembered, to tell an expired ticket from a forged one."""
ROOMS_WAITING_MAX = 4_096
"""Decodes that may wait for a prefill that has not come; one more is refused."""


@dataclass(slots=True)
class Lease:
    """Finished prefill blocks that wait for a consumer.

    Attributes:
        pull_ids: pulls under way; the blocks stay until the last has closed.
        is_released: a consumer has what it needs, or will not come.
    """

    request_id: str
    blocks: list[int]
    token_count: int
    digest: int
    taint: int
    cached_tokens: int
    deadline_s: float
    transfer: str = ""
    pull_ids: set[str] = field(default_factory=set)
    is_released: bool = False


@dataclass(slots=True)
class Room:
    """SGLang's rendezvous on the prefill side: whichever leg comes first waits for the other."""

    pull_id: str | None = None
    request_id: str | None = None


class Producer:
    """What one engine owes to consumers."""

    def __init__(self, shared: Shared, engine_id: str) -> None:
        self.engine_id = engine_id
        self.nic = Nic(shared.settings.link_bytes_per_s)
        self._shared = shared
        self._leases: dict[str, Lease] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._rooms: dict[int, Room] = {}
        self._room_of_pull: dict[str, int] = {}
        self._lease_of_pull: dict[str, str] = {}
        # By transfer: leases, pulls that came before the prefill was done, and those nobody wants any more.
        self._lease_of_transfer: dict[str, str] = {}
        self._early_pulls: dict[str, str] = {}
        self._unwanted: OrderedDict[str, None] = OrderedDict()

    @property
    def room_count(self) -> int:
        return len(self._rooms)

    def has_lease(self, request_id: str) -> bool:
        return request_id in self._leases

    def pinned_blocks(self) -> Iterator[int]:
        """Each block once for each lease that has it."""
        for lease in self._leases.values():
            yield from lease.blocks

    def leases(self) -> tuple[Lease, ...]:
        return tuple(self._leases.values())

    # Tickets.

    def issue(self, live: LiveRequest) -> IssuedTicket:
        """Pin a finished prefill's blocks and put a lease on them."""
        shared = self._shared
        lease_s = shared.settings.lease_s if live.request.lease_s is None else live.request.lease_s
        lease = Lease(
            request_id=live.id,
            blocks=list(live.blocks),
            token_count=live.prompt_tokens,
            digest=live.digest,
            taint=live.taint,
            cached_tokens=live.cached_tokens or 0,
            deadline_s=shared.now_s + lease_s,
            transfer=live.request.transfer,
        )
        shared.pool.pin(lease.blocks)
        self._leases[live.id] = lease
        shared.timers.set(("lease", live.id), lease.deadline_s)
        if lease.transfer:
            self._meet(live, lease)
        return IssuedTicket(
            engine_id=self.engine_id,
            request_id=live.id,
            block_ids=(tuple(lease.blocks),),
            token_count=lease.token_count,
            cached_tokens=lease.cached_tokens,
        )

    def _lease(self, engine_id: str, name: str) -> Lease | None:
        """By request id, or by transfer where the engine id is empty."""
        if not engine_id:
            name = self._lease_of_transfer.get(name, "")
        elif engine_id != self.engine_id:
            return None
        return self._leases.get(name)

    def on_heartbeat(self, engine_id: str, names: tuple[str, ...]) -> None:
        for name in names:
            lease = self._lease(engine_id, name)
            if lease is not None:
                renewed_s = self._shared.now_s + self._shared.settings.renewal_s
                lease.deadline_s = max(lease.deadline_s, renewed_s)
                self._shared.timers.set(("lease", lease.request_id), lease.deadline_s)

    def on_release(self, engine_id: str, name: str) -> None:
        lease = self._lease(engine_id, name)
        if lease is None:
            if not engine_id and name not in self._ended:
                _remember(self._unwanted, name)
                return
            self._shared.counters.late_notifications += 1
            return
        lease.is_released = True
        self._end_if_unused(lease)

    def on_lease_timer(self, request_id: str) -> None:
        """A lease ran out: its blocks go, whoever reads them."""
        lease = self._leases[request_id]
        self._shared.counters.expired_leases += 1
        for pull_id in sorted(lease.pull_ids):
            del self._lease_of_pull[pull_id]
            self._deny(pull_id, DenyReason.LEASE_EXPIRED)
        lease.pull_ids.clear()
        lease.is_released = True
        self._end_if_unused(lease)

    def _end_if_unused(self, lease: Lease) -> None:
        if not lease.is_released or lease.pull_ids:
            return
        del self._leases[lease.request_id]
        self._shared.timers.clear(("lease", lease.request_id))
        self._shared.pool.unpin(lease.blocks)
        _remember(self._ended, lease.request_id)
        if lease.transfer:
            self._lease_of_transfer.pop(lease.transfer, None)
            _remember(self._ended, lease.transfer)

    # Transfers: the decode may ask before the prefill is done.

    def _meet(self, live: LiveRequest, lease: Lease) -> None:
        """The prefill is done: let the pull go on that waited for it."""
        self._lease_of_transfer[lease.transfer] = lease.request_id
        pull_id = self._early_pulls.pop(lease.transfer, None)
        if pull_id is not None:
            self._grant_lease(pull_id, lease, self._sent_tokens(live))
        elif lease.transfer in self._unwanted:
            del self._unwanted[lease.transfer]
            lease.is_released = True
            self._end_if_unused(lease)

    def _sent_tokens(self, live: LiveRequest) -> int:
        """Tokens whose KV went out while the steps after theirs were computed, at the link's speed."""
        settings = self._shared.settings
        if live.scheduled_s is None:
            return 0
        by_link = (self._shared.now_s - live.scheduled_s) * self.nic.share_bytes_per_s
        # What the last step computes can only leave after it.
        before_last = live.prompt_tokens - min(live.prompt_tokens, settings.step_tokens_max)
        return min(before_last, int(by_link / settings.kv_bytes_per_token))

    def give_up(self, transfer: str) -> None:
        """A prefill that names this transfer, or none, ended without KV to hand over: its decode is told."""
        pull_id = self._early_pulls.pop(transfer, None)
        if pull_id is not None:
            self._deny(pull_id, DenyReason.PREFILL_FAILED)

    def _ask_early(self, pull_id: str, transfer: str) -> None:
        lease = self._lease("", transfer)
        if lease is not None and not lease.is_released:
            self._grant_lease(pull_id, lease)
        elif lease is not None or transfer in self._ended:
            self._deny(pull_id, DenyReason.LEASE_EXPIRED)
        elif transfer in self._early_pulls or len(self._early_pulls) >= ROOMS_WAITING_MAX:
            self._deny(pull_id, DenyReason.ROOM_IN_USE)
        else:
            self._early_pulls[transfer] = pull_id

    # Pulls.

    def on_pull_asked(self, pull_id: str, ask: PullAsk) -> str | None:
        """Grant or deny a pull, or let it wait in its room.

        Returns:
            The prefill that waited for this pull in its room, if one did.
        """
        if ask.room is not None:
            return self._join_room(pull_id, ask.room)
        if not ask.engine_id:
            self._ask_early(pull_id, ask.request_id)
            return None
        lease = self._leases.get(ask.request_id)
        reason = self._objection(ask, lease)
        if reason is not None or lease is None:
            self._deny(pull_id, reason or DenyReason.UNKNOWN_REQUEST)
            return None
        self._grant_lease(pull_id, lease)
        return None

    def _grant_lease(self, pull_id: str, lease: Lease, sent_tokens: int = 0) -> None:
        lease.pull_ids.add(pull_id)
        self._lease_of_pull[pull_id] = lease.request_id
        self._grant(
            pull_id,
            PullGrant(
                token_count=lease.token_count,
                digest=lease.digest,
                kv_bytes_per_token=self._shared.settings.kv_bytes_per_token,
                share_bytes_per_s=0.0,
                block_tokens=self._shared.pool.block_tokens,
                taint=lease.taint,
                cached_tokens=lease.cached_tokens,
                sent_tokens=sent_tokens,
            ),
        )

    def _objection(self, ask: PullAsk, lease: Lease | None) -> DenyReason | None:
        if ask.engine_id != self.engine_id:
            return DenyReason.STALE_ENGINE
        if lease is None:
            was_here = ask.request_id in self._ended
            return DenyReason.LEASE_EXPIRED if was_here else DenyReason.UNKNOWN_REQUEST
        if lease.is_released:
            return DenyReason.LEASE_EXPIRED
        if ask.block_ids != (tuple(lease.blocks),):
            return DenyReason.WRONG_BLOCKS
        return None

    def on_pull_closed(self, pull_id: str, *, is_done: bool) -> tuple[str, bool] | None:
        """A consumer closed its pull.

        Returns:
            For a room: the prefill it belongs to and whether its KV has arrived whole.
        """
        if pull_id in self._room_of_pull:
            room = self._rooms.pop(self._room_of_pull.pop(pull_id))
            self._end_flow(pull_id)
            return None if room.request_id is None else (room.request_id, is_done)
        request_id = self._lease_of_pull.pop(pull_id, None)
        if request_id is None:
            for transfer, early_id in self._early_pulls.items():
                if early_id == pull_id:
                    del self._early_pulls[transfer]
                    return None
            if is_done:
                self._shared.counters.late_notifications += 1
            return None
        self._end_flow(pull_id)
        lease = self._leases[request_id]
        lease.pull_ids.discard(pull_id)
        # A consumer that went away half-way leaves the lease as it is: another may come with the ticket.
        lease.is_released = lease.is_released or is_done
        self._end_if_unused(lease)
        return None

    # Rooms.

    def enter_room(self, live: LiveRequest, room_number: int) -> bool:
        """Announce a prefill in its room; whether its decode is there already.

        Raises:
            ValueError: if another prefill is in the room.
        """
        room = self._rooms.setdefault(room_number, Room())
        if room.request_id is not None:
            raise ValueError(f"room is {room_number}, which another prefill has entered")
        room.request_id = live.id
        return room.pull_id is not None

    def _join_room(self, pull_id: str, room_number: int) -> str | None:
        room = self._rooms.get(room_number)
        if room is None:
            if len(self._rooms) >= ROOMS_WAITING_MAX:
                self._deny(pull_id, DenyReason.ROOM_IN_USE)
                return None
            room = self._rooms[room_number] = Room()
        elif room.pull_id is not None:
            self._deny(pull_id, DenyReason.ROOM_IN_USE)
            return None
        room.pull_id = pull_id
        self._room_of_pull[pull_id] = room_number
        return room.request_id

    def push(self, live: LiveRequest, room_number: int, first_token: int) -> None:
        """Send a finished prefill to the decode in its room."""
        pull_id = self._rooms[room_number].pull_id
        assert pull_id is not None, "a prefill ran before its decode had come"
        self._grant(
            pull_id,
            PullGrant(
                token_count=live.prompt_tokens,
                digest=live.digest,
                kv_bytes_per_token=self._shared.settings.kv_bytes_per_token,
                share_bytes_per_s=0.0,
                block_tokens=self._shared.pool.block_tokens,
                taint=live.taint,
                cached_tokens=live.cached_tokens or 0,
                first_token=first_token,
            ),
        )

    def leave_room(self, room_number: int) -> None:
        """The prefill ended without a hand-over: a decode that waits in the room is told."""
        room = self._rooms.pop(room_number, None)
        if room is not None and room.pull_id is not None:
            del self._room_of_pull[room.pull_id]
            self._deny(room.pull_id, DenyReason.PREFILL_FAILED)

    # The NIC.

    def set_link_factor(self, factor: float) -> None:
        before = self.nic.share_bytes_per_s
        self.nic.set_factor(factor, self._shared.now_s)
        self._tell_shares(before)

    def _grant(self, pull_id: str, grant: PullGrant) -> None:
        before = self.nic.share_bytes_per_s
        self.nic.begin(pull_id, self._shared.now_s)
        share = self.nic.share_bytes_per_s
        self._tell_shares(before, but=pull_id)
        self._shared.emit(GrantPull(pull_id, replace(grant, share_bytes_per_s=share)))

    def _deny(self, pull_id: str, reason: DenyReason) -> None:
        self._end_flow(pull_id)
        self._shared.emit(DenyPull(pull_id, reason))

    def _end_flow(self, pull_id: str) -> None:
        if pull_id in self.nic:
            before = self.nic.share_bytes_per_s
            self.nic.end(pull_id, self._shared.now_s)
            self._tell_shares(before)

    def _tell_shares(self, before: float, but: str | None = None) -> None:
        share = self.nic.share_bytes_per_s
        if share != before:
            for pull_id in self.nic.flow_ids:
                if pull_id != but:
                    self._shared.emit(TellShare(pull_id, share))

    def validate(self) -> None:
        """Assert that pulls, leases, rooms and flows agree."""
        for pull_id, request_id in self._lease_of_pull.items():
            assert pull_id in self._leases[request_id].pull_ids, "a pull has no lease"
            assert pull_id in self.nic, "a granted pull takes no share"
        for pull_id, number in self._room_of_pull.items():
            assert self._rooms[number].pull_id == pull_id, "a pull has no room"
        assert set(self.nic.flow_ids) <= set(self._lease_of_pull) | set(self._room_of_pull), "a stray flow"
        for lease in self._leases.values():
            assert lease.pull_ids or not lease.is_released, "a released lease stays"
            assert ("lease", lease.request_id) in self._shared.timers, "a lease never ends"
        assert len(self._early_pulls) <= ROOMS_WAITING_MAX, "too many pulls wait for their prefills"
        leased = {lease.transfer: lease.request_id for lease in self._leases.values() if lease.transfer}
        assert self._lease_of_transfer == leased, "transfers and leases differ"
        assert not self._early_pulls.keys() & leased.keys(), "a pull waits for a prefill that is done"


def _remember(names: OrderedDict[str, None], name: str) -> None:
    names[name] = None
    if len(names) > REMEMBERED_MAX:
        names.popitem(last=False)
