"""What was sent and has not ended: the coordinator's own account of load, between signals."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from pdcoord.core.fleet import EndpointId, Sample
from pdcoord.core.request import RequestId

PREFILL_MEMORY_S = 30.0
"""How far back prefills count in their share of an endpoint's time: about as long as an answer takes."""
PREFILL_SHARE_MAX = 0.9
TYPICAL_WEIGHT = 0.02
"""Of the latest prefill in what is typical: some 50 requests are remembered."""


# Not frozen, though nobody changes it: that would double what making it costs each request.
@dataclass(slots=True)
class Entry:
    """One request's account.

    Attributes:
        worker: the endpoint that prefills; equal to `decode` when colocated.
        prefill_us: predicted work of the prefill, in whole microseconds so that sums return to zero.
        transfer_bytes: KV to move from worker to decode; 0 when colocated.
        uncached_tokens: of the prompt, to be written into the decode endpoint's KV pool.
        is_streamed: its answer begins with its first token, not with its last.
        is_remote: another coordinator sent it; a sidecar told of it.
    """

    request_id: RequestId
    decode: EndpointId
    worker: EndpointId
    prefill_us: int
    prompt_tokens: int
    transfer_bytes: int
    uncached_tokens: int = 0
    is_streamed: bool = True
    is_remote: bool = False


@dataclass(slots=True)
class Load:
    """The account of one endpoint.

    Attributes:
        prefills: predicted microseconds of prefills not known to be done, by request, oldest first.
        request_count: requests with a leg here, from dispatch until its part is over; a colocated
            one counts once.
        decode_count: those of them whose decode leg is here, from dispatch to end.
        streaming_count: those of them whose prefill is done: a local prefill would stall these.
        context_tokens: prompt tokens of those requests.
        pending_tokens: uncached ones of requests whose decode leg is here and has not begun.
        bytes_in_flight: KV being moved from or to here.
        progress_since_s: when the oldest prefill is taken to have started.
        own_peak: most requests that were known here at any time since the last sample.
        own_at_sample: the same over the time before the last sample; what the sample counts beyond
            it is others' load. The peak, since a request may end while its sample travels.
        begun_ordinal: grows with each request sent here, over all endpoints; breaks ties.
        streaming_tokens: prompt tokens of those whose prefill is done.
        batch_s, context_token_s: `streaming_count` and `streaming_tokens` summed over time, up to `summed_s`.
        prefilled_us: predicted work of all prefills that were ever done or given up here.
        prefilled_s: when the last of them is known to have ended.
        ended_count: requests whose decode leg here has ended, since the account was opened.
        recent_prefill_s: predicted work of prefills sent here, fading over PREFILL_MEMORY_S, as of
            `recent_at_s`.
    """

    prefills: dict[RequestId, int] = field(default_factory=dict)
    prefill_us: int = 0
    request_count: int = 0
    decode_count: int = 0
    streaming_count: int = 0
    context_tokens: int = 0
    pending_tokens: int = 0
    bytes_in_flight: int = 0
    progress_since_s: float = 0.0
    own_peak: int = 0
    own_at_sample: int = 0
    begun_ordinal: int = 0
    streaming_tokens: int = 0
    batch_s: float = 0.0
    context_token_s: float = 0.0
    summed_s: float = 0.0
    prefilled_us: int = 0
    prefilled_s: float = 0.0
    recent_prefill_s: float = 0.0
    recent_at_s: float = 0.0
    ended_count: int = 0

    @property
    def is_empty(self) -> bool:
        return not self.request_count

    def pending_prefill_s(self, now_s: float) -> float:
        """Predicted wait behind the prefills that were sent here and are not known to be done."""
        if not self.prefills:
            return 0.0
        done_us = (now_s - self.progress_since_s) * 1e6
        if done_us <= 0.0:
            return self.prefill_us / 1e6
        oldest_us = next(iter(self.prefills.values()))
        return (self.prefill_us - min(done_us, oldest_us)) / 1e6

    def prefill_share(self, now_s: float) -> float:
        """Share of its time that the endpoint lately spent on prefills, 0..PREFILL_SHARE_MAX.

        So much longer does an answer take that is generated beside them.
        """
        if not self.recent_prefill_s:
            return 0.0
        share = (
            self.recent_prefill_s * math.exp((self.recent_at_s - now_s) / PREFILL_MEMORY_S) / PREFILL_MEMORY_S
        )
        return min(share, PREFILL_SHARE_MAX)

    def add_prefill(self, work_s: float, now_s: float) -> None:
        fade = math.exp((self.recent_at_s - now_s) / PREFILL_MEMORY_S)
        self.recent_prefill_s = self.recent_prefill_s * fade + work_s
        self.recent_at_s = now_s

    def sum_up(self, now_s: float) -> None:
        """Bring the sums over time up to now; to be called before what they are of changes."""
        passed_s = now_s - self.summed_s
        if passed_s > 0.0:
            self.batch_s += self.streaming_count * passed_s
            self.context_token_s += self.streaming_tokens * passed_s
            self.summed_s = now_s

    def others(self, sample: Sample | None) -> int:
        """Requests on the endpoint that neither this coordinator sent nor a sidecar told of."""
        if sample is None:
            return 0
        return max(0, sample.running + sample.waiting - self.own_at_sample)


IDLE = Load()
"""The account of whoever was sent nothing; read only."""


class Ledger:
    """Accounts by endpoint and by request; every entry begun is ended exactly once.

    Attributes:
        typical_prefill_s: mean predicted prefill of the latest requests; 0.0 before the first.
    """

    def __init__(self) -> None:
        self._entries: dict[RequestId, Entry] = {}
        self._loads: dict[EndpointId, Load] = {}
        self._begun_count = 0
        self._unheard: set[RequestId] = set()
        self._remote: set[RequestId] = set()
        self.typical_prefill_s = 0.0

    @property
    def open_count(self) -> int:
        """Own requests begun and not ended."""
        return len(self._entries) - len(self._remote)

    @property
    def remote_count(self) -> int:
        """Requests of other coordinators likewise."""
        return len(self._remote)

    def remote_ids(self) -> set[RequestId]:
        return set(self._remote)

    @property
    def accounts(self) -> Mapping[EndpointId, Load]:
        """Every account there is; read only. An endpoint without one is IDLE."""
        return self._loads

    def load(self, endpoint_id: EndpointId) -> Load:
        """The account of one endpoint; read only."""
        return self._loads.get(endpoint_id, IDLE)

    def loads(self) -> Iterator[tuple[EndpointId, Load]]:
        return iter(self._loads.items())

    def begin(self, entry: Entry, now_s: float) -> None:
        assert entry.request_id not in self._entries, f"{entry.request_id} is already in the ledger"
        self._entries[entry.request_id] = entry
        self._begun_count += 1
        if entry.is_remote:
            self._remote.add(entry.request_id)
        if entry.prompt_tokens or not entry.is_remote:
            self._note_typical(entry.prefill_us / 1e6)  # Of a foreign router's no figure is known.
        decode = self._own(entry.decode)
        decode.request_count += 1
        decode.decode_count += 1
        decode.context_tokens += entry.prompt_tokens
        decode.pending_tokens += entry.uncached_tokens
        decode.begun_ordinal = self._begun_count
        worker = self._own(entry.worker)
        self._retire(worker, now_s)
        if not entry.is_streamed:
            self._unheard.add(entry.request_id)
        worker.begun_ordinal = self._begun_count
        worker.request_count += worker is not decode
        if not worker.prefills:
            worker.progress_since_s = now_s
        worker.prefills[entry.request_id] = entry.prefill_us
        worker.add_prefill(entry.prefill_us / 1e6, now_s)
        worker.prefill_us += entry.prefill_us
        worker.bytes_in_flight += entry.transfer_bytes
        decode.bytes_in_flight += entry.transfer_bytes
        for load in (worker, decode):
            load.own_peak = max(load.own_peak, load.request_count)

    def _note_typical(self, prefill_s: float) -> None:
        weight = max(1.0 / self._begun_count, TYPICAL_WEIGHT)
        self.typical_prefill_s += weight * (prefill_s - self.typical_prefill_s)

    def _retire(self, load: Load, now_s: float) -> None:
        """Take prefills for done whose end nobody will tell of, when their predicted time is over.

        A whole answer begins when it is complete; until then its prefill would seem to keep others waiting.
        """
        while load.prefills:
            request_id, prefill_us = next(iter(load.prefills.items()))
            end_s = load.progress_since_s + prefill_us / 1e6
            if request_id not in self._unheard or end_s > now_s:
                return
            self.finish_prefill(request_id, end_s)

    def finish_prefill(self, request_id: RequestId, now_s: float) -> None:
        """The prompt is computed and, for a split request, its KV has arrived. Idempotent."""
        entry = self._entries[request_id]
        worker = self._own(entry.worker)
        if request_id not in worker.prefills:
            return
        if next(iter(worker.prefills)) == request_id:
            worker.progress_since_s = now_s
        self._unheard.discard(request_id)
        prefill_us = worker.prefills.pop(request_id)
        worker.prefill_us -= prefill_us
        worker.prefilled_us += prefill_us
        worker.bytes_in_flight -= entry.transfer_bytes
        decode = self._own(entry.decode)
        worker.request_count -= worker is not decode
        decode.bytes_in_flight -= entry.transfer_bytes
        decode.sum_up(now_s)
        decode.streaming_count += 1
        decode.streaming_tokens += entry.prompt_tokens
        decode.pending_tokens -= entry.uncached_tokens

    def rename(self, request_id: RequestId, to: RequestId) -> None:
        """An entry goes on under another id, at the same place in every account."""
        assert to not in self._entries, f"{to} is already in the ledger"
        entry = self._entries[to] = replace(self._entries.pop(request_id), request_id=to)
        worker = self._own(entry.worker)
        if request_id in worker.prefills:
            renamed = {to if name == request_id else name: us for name, us in worker.prefills.items()}
            worker.prefills = renamed
        for names in (self._unheard, self._remote):
            if request_id in names:
                names.remove(request_id)
                names.add(to)

    def note_prefilled(self, endpoint_id: EndpointId, at_s: float) -> None:
        """A prefill is known to have ended here then."""
        load = self._loads.get(endpoint_id)
        if load is not None:
            load.prefilled_s = max(load.prefilled_s, at_s)

    def summed_load(self, endpoint_id: EndpointId, now_s: float) -> Load:
        """The account of one endpoint with its sums over time brought up to now; read only."""
        load = self.load(endpoint_id)
        if load is not IDLE:
            load.sum_up(now_s)
        return load

    def end(self, request_id: RequestId, now_s: float) -> None:
        self.finish_prefill(request_id, now_s)
        entry = self._entries.pop(request_id)
        self._remote.discard(request_id)
        decode = self._own(entry.decode)
        decode.request_count -= 1
        decode.decode_count -= 1
        decode.ended_count += 1
        decode.sum_up(now_s)
        decode.streaming_count -= 1
        decode.streaming_tokens -= entry.prompt_tokens
        decode.context_tokens -= entry.prompt_tokens

    def note_sample(self, endpoint_id: EndpointId, now_s: float) -> None:
        """A sample of this endpoint has just been taken: what is sent now is in it."""
        load = self._loads.get(endpoint_id)
        if load is not None:
            self._retire(load, now_s)
            load.own_at_sample = load.own_peak
            load.own_peak = load.request_count

    def validate(self) -> None:
        """Assert that the accounts are the sums of the entries."""
        for endpoint_id, load in self._loads.items():
            decoding = [e for e in self._entries.values() if e.decode == endpoint_id]
            assert load.decode_count == len(decoding), f"{endpoint_id}: decode_count"
            here = {e.request_id for e in decoding} | set(load.prefills)
            assert load.request_count == len(here), f"{endpoint_id}: request_count"
            assert load.context_tokens == sum(e.prompt_tokens for e in decoding), f"{endpoint_id}: context"
            streaming = [e for e in decoding if e.request_id not in self.load(e.worker).prefills]
            assert load.streaming_count == len(streaming), f"{endpoint_id}: streaming_count"
            tokens = sum(e.prompt_tokens for e in streaming)
            assert load.streaming_tokens == tokens, f"{endpoint_id}: streaming_tokens"
            assert min(load.batch_s, load.context_token_s) >= 0.0, f"{endpoint_id}: a sum below 0"
            pending = sum(e.uncached_tokens for e in decoding) - sum(e.uncached_tokens for e in streaming)
            assert load.pending_tokens == pending, f"{endpoint_id}: pending_tokens"
            assert load.prefill_us == sum(load.prefills.values()), f"{endpoint_id}: prefill_us"
            assert set(load.prefills) <= set(self._entries), f"{endpoint_id}: prefill of an ended request"
            moving = sum(
                e.transfer_bytes * ((e.worker == endpoint_id) + (e.decode == endpoint_id))
                for e in self._entries.values()
                if e.request_id in self.load(e.worker).prefills
            )
            assert load.bytes_in_flight == moving, f"{endpoint_id}: bytes_in_flight"
        assert self._remote == {e.request_id for e in self._entries.values() if e.is_remote}, "remote"
        if not self._entries:
            assert all(load.is_empty for load in self._loads.values()), "load without a request"

    def _own(self, endpoint_id: EndpointId) -> Load:
        load = self._loads.get(endpoint_id)
        if load is None:
            load = self._loads[endpoint_id] = Load()
        return load

    def forget(self, endpoint_id: EndpointId) -> None:
        """The endpoint is gone: drop its account once nothing is left in it."""
        load = self._loads.get(endpoint_id)
        if load is not None and load.is_empty:
            del self._loads[endpoint_id]
