"""What was sent and has not ended: the coordinator's own account of load, between signals."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from pdcoord.core.fleet import EndpointId, Sample
from pdcoord.core.request import RequestId


@dataclass(frozen=True, slots=True)
class Entry:
    """One request's account.

    Attributes:
        worker: the endpoint that prefills; equal to `decode` when colocated.
        prefill_us: predicted work of the prefill, in whole microseconds so that sums return to zero.
        transfer_bytes: KV to move from worker to decode; 0 when colocated.
    """

    request_id: RequestId
    decode: EndpointId
    worker: EndpointId
    prefill_us: int
    prompt_tokens: int
    transfer_bytes: int


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
        bytes_in_flight: KV being moved from or to here.
        progress_since_s: when the oldest prefill is taken to have started.
        own_peak: most own requests at any time since the last sample.
        own_at_sample: the same over the time before the last sample; what the sample counts beyond
            it is others' load. The peak, since a request may end while its sample travels.
        begun_ordinal: grows with each request sent here, over all endpoints; breaks ties.
    """

    prefills: dict[RequestId, int] = field(default_factory=dict)
    prefill_us: int = 0
    request_count: int = 0
    decode_count: int = 0
    streaming_count: int = 0
    context_tokens: int = 0
    bytes_in_flight: int = 0
    progress_since_s: float = 0.0
    own_peak: int = 0
    own_at_sample: int = 0
    begun_ordinal: int = 0

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

    def others(self, sample: Sample | None) -> int:
        """Requests on the endpoint that this coordinator did not send, as of the last sample."""
        if sample is None:
            return 0
        return max(0, sample.running + sample.waiting - self.own_at_sample)


_IDLE = Load()


class Ledger:
    """Accounts by endpoint and by request; every entry begun is ended exactly once."""

    def __init__(self) -> None:
        self._entries: dict[RequestId, Entry] = {}
        self._loads: dict[EndpointId, Load] = {}
        self._begun_count = 0

    @property
    def open_count(self) -> int:
        """Requests begun and not ended."""
        return len(self._entries)

    def load(self, endpoint_id: EndpointId) -> Load:
        """The account of one endpoint; read only."""
        return self._loads.get(endpoint_id, _IDLE)

    def loads(self) -> Iterator[tuple[EndpointId, Load]]:
        return iter(self._loads.items())

    def begin(self, entry: Entry, now_s: float) -> None:
        assert entry.request_id not in self._entries, f"{entry.request_id} is already in the ledger"
        self._entries[entry.request_id] = entry
        self._begun_count += 1
        decode = self._own(entry.decode)
        decode.request_count += 1
        decode.decode_count += 1
        decode.context_tokens += entry.prompt_tokens
        decode.begun_ordinal = self._begun_count
        worker = self._own(entry.worker)
        worker.begun_ordinal = self._begun_count
        worker.request_count += worker is not decode
        if not worker.prefills:
            worker.progress_since_s = now_s
        worker.prefills[entry.request_id] = entry.prefill_us
        worker.prefill_us += entry.prefill_us
        worker.bytes_in_flight += entry.transfer_bytes
        decode.bytes_in_flight += entry.transfer_bytes
        for load in (worker, decode):
            load.own_peak = max(load.own_peak, load.request_count)

    def finish_prefill(self, request_id: RequestId, now_s: float) -> None:
        """The prompt is computed and, for a split request, its KV has arrived. Idempotent."""
        entry = self._entries[request_id]
        worker = self._own(entry.worker)
        if request_id not in worker.prefills:
            return
        if next(iter(worker.prefills)) == request_id:
            worker.progress_since_s = now_s
        worker.prefill_us -= worker.prefills.pop(request_id)
        worker.bytes_in_flight -= entry.transfer_bytes
        decode = self._own(entry.decode)
        worker.request_count -= worker is not decode
        decode.bytes_in_flight -= entry.transfer_bytes
        decode.streaming_count += 1

    def end(self, request_id: RequestId, now_s: float) -> None:
        self.finish_prefill(request_id, now_s)
        entry = self._entries.pop(request_id)
        decode = self._own(entry.decode)
        decode.request_count -= 1
        decode.decode_count -= 1
        decode.streaming_count -= 1
        decode.context_tokens -= entry.prompt_tokens

    def note_sample(self, endpoint_id: EndpointId) -> None:
        """A sample of this endpoint has just been taken: what is sent now is in it."""
        load = self._loads.get(endpoint_id)
        if load is not None:
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
            assert load.prefill_us == sum(load.prefills.values()), f"{endpoint_id}: prefill_us"
            assert set(load.prefills) <= set(self._entries), f"{endpoint_id}: prefill of an ended request"
            moving = sum(
                e.transfer_bytes * ((e.worker == endpoint_id) + (e.decode == endpoint_id))
                for e in self._entries.values()
                if e.request_id in self.load(e.worker).prefills
            )
            assert load.bytes_in_flight == moving, f"{endpoint_id}: bytes_in_flight"
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
