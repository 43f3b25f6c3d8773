"""Requests of other coordinators, as sidecars tell of them: in the ledger beside our own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pdcoord.core.accounts import Accounts
from pdcoord.core.fleet import Endpoint, EndpointId
from pdcoord.core.ledger import Entry
from pdcoord.core.model import Model
from pdcoord.core.observations import TransferSeen
from pdcoord.core.request import RequestId
from pdcoord.core.trouble import Track
from pdcoord.protocol.control import (
    REQUESTS_MAX,
    ControlLegKind,
    Events,
    LegBegan,
    LegEnded,
    LoadEvent,
    OutputBegan,
    RequestBegan,
    RequestEnded,
    Snapshot,
)
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, ServedHeader

REMOTE_MAX = 65_536
"""Requests of others in all; of more, the rest is left out and counted."""
AGE_S_MAX = 600.0
"""An older request counts as of this age: the past beyond it changes no figure."""
SERVED = "served"
"""The outcome that a sidecar tells of a request whose answer came to its end."""
OWN_SHARE_MIN = 0.2
"""Of the time to the first output after the prefill, what is the transfer's at least."""


@dataclass(slots=True)
class _Remote:
    """One request of another coordinator.

    Attributes:
        worker: the planned prefill endpoint, equal to `decode` when colocated; None while not known.
        bytes_ahead: what was under way on its links before it.
        judged: prefill endpoints whose path its legs have already spoken of.
    """

    id: RequestId
    told: RequestBegan
    began_s: float
    decode: Endpoint | None = None
    worker: Endpoint | None = None
    has_output: bool = False
    bytes_ahead: int = 0
    judged: set[EndpointId] = field(default_factory=set)

    @property
    def is_whole(self) -> bool:
        """Whether everything that it names is known."""
        return self.decode is not None and self.worker is not None


@dataclass(slots=True)
class _Sidecar:
    epoch: str
    requests: dict[int, _Remote] = field(default_factory=dict)


class RemoteLoad:
    """Others' requests by sidecar. A sidecar's snapshot replaces all of them at once.

    Args:
        model: the policy's model of that name.

    Attributes:
        left_out: requests that were not taken in for want of room.
    """

    def __init__(self, accounts: Accounts, model: Callable[[str], Model | None]) -> None:
        self._to = accounts
        self._model = model
        self._sidecars: dict[HostPort, _Sidecar] = {}
        self._count = 0
        self.left_out = 0

    @property
    def count(self) -> int:
        """Requests of others under way."""
        return self._count

    def take(self, sidecar: HostPort, epoch: str, report: Snapshot | Events, now_s: float) -> None:
        """Take in what a sidecar told of requests that this coordinator has not sent."""
        known = self._sidecars.get(sidecar)
        if known is None or known.epoch != epoch:
            self.lose(sidecar, now_s)
            known = self._sidecars[sidecar] = _Sidecar(epoch)
        if isinstance(report, Snapshot):
            self._replace(sidecar, known, report, now_s)
            return
        for event in report.events:
            self._take_event(sidecar, known, event, now_s)

    def lose(self, sidecar: HostPort, now_s: float) -> None:
        """Nobody tells of this sidecar any more: what it told is void."""
        lost = self._sidecars.pop(sidecar, None)
        for remote in lost.requests.values() if lost is not None else ():
            self._end(remote, None, now_s)

    def endpoints_changed(self, now_s: float) -> None:
        """Endpoints came: enter what waited for them."""
        for sidecar, known in self._sidecars.items():
            for remote in known.requests.values():
                if not remote.is_whole:
                    self._unbook(remote, now_s)
                    self._book(sidecar, remote)

    def endpoint_ids(self) -> set[EndpointId]:
        """Every endpoint that a request of others is in the account of."""
        ends = (end for remote in self._all() for end in (remote.decode, remote.worker))
        return {end.id for end in ends if end is not None}

    def request_ids(self) -> set[RequestId]:
        return {remote.id for remote in self._all()}

    def validate(self) -> None:
        """Assert that what is booked is in the ledger, and nothing else."""
        remotes = list(self._all())
        assert len(remotes) == self._count <= REMOTE_MAX, "others' requests are miscounted"
        booked = {remote.id for remote in remotes if remote.decode is not None}
        assert self._to.ledger.remote_ids() == booked, "the ledger and others' requests disagree"

    def _all(self) -> Iterator[_Remote]:
        for known in self._sidecars.values():
            yield from known.requests.values()

    def _replace(self, sidecar: HostPort, known: _Sidecar, told: Snapshot, now_s: float) -> None:
        listed = {each.ordinal for each in told.requests}
        for ordinal in [ordinal for ordinal in known.requests if ordinal not in listed]:
            self._end(known.requests.pop(ordinal), None, now_s)
        for each in told.requests:
            remote = known.requests.get(each.ordinal)
            if remote is None:
                self._begin(sidecar, known, each, now_s)
            elif each.has_output and not remote.has_output:
                self._finish_prefill(remote, now_s)

    def _take_event(self, sidecar: HostPort, known: _Sidecar, event: LoadEvent, now_s: float) -> None:
        if isinstance(event, RequestBegan):
            if event.ordinal not in known.requests:
                self._begin(sidecar, known, event, now_s)
            return
        remote = known.requests.get(event.ordinal)
        if remote is None:
            return  # Of a request of our own, or one that was left out.
        match event:
            case OutputBegan(_, served):
                self._begin_output(remote, served, now_s)
            case RequestEnded(ordinal, outcome, served):
                del known.requests[ordinal]
                decode = self._there(remote.decode)
                if outcome == SERVED and decode is not None:
                    self._to.progress.served(decode, Track.FLOW, now_s)
                self._end(remote, served, now_s)
            case LegEnded():
                self._end_leg(remote, event, now_s)
            case LegBegan():
                pass

    def _begin(self, sidecar: HostPort, known: _Sidecar, told: RequestBegan, now_s: float) -> None:
        if len(known.requests) >= REQUESTS_MAX or self._count >= REMOTE_MAX:
            self.left_out += 1
            return
        # A space is in no id of our own.
        request_id = RequestId(f"{sidecar} {known.epoch} {told.ordinal}")
        remote = _Remote(request_id, told, now_s - min(told.age_s, AGE_S_MAX))
        known.requests[told.ordinal] = remote
        self._count += 1
        self._book(sidecar, remote)
        if told.has_output:
            self._finish_prefill(remote, now_s)
        elif not told.age_s and remote.decode is not None and remote.worker is not None:
            self._try_path(remote.worker.id, remote.decode.id, remote.id, now_s)

    def _try_path(self, worker: EndpointId, decode: EndpointId, request_id: RequestId, now_s: float) -> None:
        """Where the path is to be tried, another's request is the one that tries it."""
        if worker != decode and self._to.paths.lets_pass(worker, decode, now_s):
            self._to.paths.begin(worker, decode, request_id)

    def _book(self, sidecar: HostPort, remote: _Remote) -> None:
        """Enter a request in the accounts of those of its endpoints that are known."""
        told, load = remote.told, remote.told.load
        remote.decode = self._find(sidecar, load.model, is_prefill=False)
        if remote.decode is None:
            return
        remote.worker = remote.decode
        if told.prefill is not None:
            remote.worker = self._find(told.prefill, load.model, is_prefill=True)
        worker = remote.worker or remote.decode
        ledger = self._to.ledger
        ends = {worker.id, remote.decode.id}
        remote.bytes_ahead = max(ledger.load(end).bytes_in_flight for end in ends)
        entry = Entry(
            request_id=remote.id,
            decode=remote.decode.id,
            worker=worker.id,
            prefill_us=load.prefill_us if remote.worker is not None else 0,
            prompt_tokens=load.prompt_tokens,
            transfer_bytes=load.transfer_bytes if worker is not remote.decode else 0,
            uncached_tokens=load.landing_tokens,
            is_streamed=told.is_streamed,
            is_remote=True,
        )
        ledger.begin(entry, remote.began_s)
        if remote.has_output:
            ledger.finish_prefill(remote.id, remote.began_s)

    def _unbook(self, remote: _Remote, now_s: float) -> None:
        if remote.decode is None:
            return
        self._to.ledger.end(remote.id, now_s)
        for end in (remote.decode, remote.worker):
            if end is not None and self._to.fleet.get(end.id) is None:
                self._to.ledger.forget(end.id)
        remote.decode = remote.worker = None

    def _find(self, address: HostPort, model: str, *, is_prefill: bool) -> Endpoint | None:
        """The endpoint there of that model; of a request that names none, whichever is there."""
        for state in self._to.fleet.at(address):
            pool = state.endpoint.pool
            fits = pool.can_prefill if is_prefill else pool.can_decode
            if fits and (not model or pool.model == model):
                return state.endpoint
        return None

    def _finish_prefill(self, remote: _Remote, now_s: float) -> None:
        remote.has_output = True
        if remote.decode is not None:
            self._to.ledger.finish_prefill(remote.id, now_s)

    def _begin_output(self, remote: _Remote, served: ServedHeader, now_s: float) -> None:
        if remote.has_output:
            return
        decode, worker = self._there(remote.decode), self._there(remote.worker)
        if decode is not None and worker is not None:
            used = self._judge(remote, decode, served, now_s)
            self._to.progress.served(decode, Track.START, now_s)
            waited_s = (served.transfer_ms or 0.0) / 1e3
            if remote.id in self._to.ledger.load(worker.id).prefills:
                self._to.ledger.note_prefilled(worker.id, now_s - waited_s)
            if used is not None:
                self._to.progress.served(used, Track.PREFILL, now_s)
                tokens = remote.told.load.transfer_bytes // max(1, used.pool.kv_bytes_per_token)
                self._to.silent.answered(used.id, decode.id, tokens)
            if used is worker and not served.rungs and served.transfer_ms is not None:
                self._learn_transfer(remote, used, decode, waited_s, now_s)
        self._finish_prefill(remote, now_s)

    def _judge(
        self, remote: _Remote, decode: Endpoint, served: ServedHeader, now_s: float
    ) -> Endpoint | None:
        """What was done says how the paths are; the prefill endpoint whose KV came, if it did."""
        for taken in served.rungs:
            self._blame(remote, decode, taken.target, taken.reason, now_s)
        if served.mode is not Mode.SPLIT or served.prefill is None:
            return None
        used = self._find(served.prefill, remote.told.load.model, is_prefill=True)
        if used is not None:
            remote.judged.add(used.id)
            self._to.paths.succeed(used.id, decode.id)
        return used

    def _blame(
        self, remote: _Remote, decode: Endpoint, address: HostPort, reason: RungReason, now_s: float
    ) -> None:
        prefill = self._find(address, remote.told.load.model, is_prefill=True)
        if prefill is not None and prefill.id not in remote.judged:
            remote.judged.add(prefill.id)
            self._to.paths.fail((prefill.id, decode.id), reason, remote.id, now_s)

    def _end_leg(self, remote: _Remote, leg: LegEnded, now_s: float) -> None:
        """A leg that failed speaks of its path at once, though the request may go on for long."""
        decode = self._there(remote.decode)
        if decode is None or leg.outcome not in _REASONS:
            return
        reason = RungReason(leg.outcome)
        if leg.prefill is not None:
            self._blame(remote, decode, leg.prefill, reason, now_s)
        progress = self._to.progress
        if leg.kind is ControlLegKind.DECODE:
            progress.decode_failed(decode, reason, remote.id, now_s, had_output=remote.has_output)
        elif leg.prefill is not None:
            prefill = self._find(leg.prefill, remote.told.load.model, is_prefill=True)
            if prefill is not None:
                progress.prefill_failed(prefill, decode, reason, remote.id, now_s)

    def _end(self, remote: _Remote, served: ServedHeader | None, now_s: float) -> None:
        self._count -= 1
        decode, worker = remote.decode, remote.worker
        if decode is not None and worker is not None:
            if served is not None and not remote.has_output and self._there(decode) is not None:
                self._judge(remote, decode, served, now_s)
            if remote.id in self._to.ledger.load(worker.id).prefills:
                self._to.ledger.note_prefilled(worker.id, now_s)
            if worker.id not in remote.judged:
                self._to.paths.abandon(worker.id, decode.id, remote.id)
        self._unbook(remote, now_s)

    def _there(self, endpoint: Endpoint | None) -> Endpoint | None:
        """The endpoint, if it is still the same process."""
        state = self._to.fleet.get(endpoint.id) if endpoint is not None else None
        is_same = state is not None and endpoint is not None and state.endpoint.address == endpoint.address
        return endpoint if is_same else None

    def _learn_transfer(
        self, remote: _Remote, prefill: Endpoint, decode: Endpoint, waited_s: float, now_s: float
    ) -> None:
        told = remote.told
        state, model = self._to.fleet.get(decode.id), self._model(decode.pool.model)
        bytes_moved = told.load.transfer_bytes
        if not (told.is_sequential and told.is_streamed and bytes_moved) or model is None:
            return
        if state is None or state.sample is None or state.sample.waiting:
            return  # It may have waited for its place in the engine.
        ledger = self._to.ledger
        load = ledger.load(decode.id)
        context_tokens = load.streaming_tokens + told.load.prompt_tokens
        step_s = self._to.speed.step_s(decode, load.streaming_count + 1, context_tokens)
        in_flight = max(load.bytes_in_flight, ledger.load(prefill.id).bytes_in_flight)
        ahead = max(remote.bytes_ahead, in_flight - bytes_moved, 0)
        took_s = max(waited_s - step_s, OWN_SHARE_MIN * waited_s)
        seen = TransferSeen(prefill, decode, bytes_moved, ahead, took_s)
        self._to.lessons.transferred(seen, model.disaggregation.bandwidth_bytes_per_s_min, now_s)


_REASONS = frozenset(str(reason) for reason in RungReason)
