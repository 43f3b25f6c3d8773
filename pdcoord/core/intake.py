"""Takes in what feeds, sidecars and engines tell: each fact goes to every account that it touches."""

from collections.abc import Callable
from dataclasses import replace

from pdcoord.core.accounts import Accounts
from pdcoord.core.canary import Canaries, CanaryBegan, CanaryJudged
from pdcoord.core.doubts import Doubts
from pdcoord.core.events import PathProbed, SidecarLost, SidecarReported, StreamStalled, TimePassed
from pdcoord.core.fleet import (
    EndpointGone,
    EndpointId,
    EndpointSeen,
    Health,
    Sample,
    SampleTaken,
    Signal,
)
from pdcoord.core.kvcache import KvCleared, KvLost, KvRemoved, KvSignal, KvStored
from pdcoord.core.model import Model
from pdcoord.core.prefixes import Prefixes
from pdcoord.core.remote import RemoteLoad

Report = (
    PathProbed
    | SidecarReported
    | SidecarLost
    | StreamStalled
    | KvSignal
    | CanaryBegan
    | CanaryJudged
    | TimePassed
)


class Intake:
    """Holds no state of its own but which endpoints' samples are doubted.

    Args:
        model: the model of its own name, whichever aliases and adapters lead to it.

    Attributes:
        doubts: those.
    """

    def __init__(
        self,
        accounts: Accounts,
        prefixes: Prefixes,
        remote: RemoteLoad,
        model: Callable[[str], Model | None],
        *,
        canaries: Canaries,
    ) -> None:
        self._fleet = accounts.fleet
        self._ledger = accounts.ledger
        self._paths = accounts.paths
        self._silent = accounts.silent
        self._progress = accounts.progress
        self.doubts = Doubts()
        self._speed = accounts.speed
        self._prefixes = prefixes
        self._remote = remote
        self._model = model
        self._canaries = canaries

    def take_signal(self, signal: Signal, now_s: float) -> None:
        """Take in a fact about one endpoint."""
        before = None
        if isinstance(signal, EndpointSeen):
            before = self._fleet.get(signal.endpoint.id)
        elif isinstance(signal, EndpointGone):
            before = self._fleet.get(signal.id)
        elif isinstance(signal, SampleTaken):
            signal = self._believed(signal)
            self._ledger.note_sample(signal.id, now_s)
            self._judge_paths(signal.id, signal.sample, now_s)
            self._progress.sampled(signal.id, signal.sample, now_s)
            self._doubt_canaries(signal.id, now_s)
        self._fleet.handle(signal)
        if isinstance(signal, EndpointSeen):
            self._remote.endpoints_changed(now_s)
        if before is None:
            return
        after = self._fleet.get(before.endpoint.id)
        if after is None or after.endpoint.address != before.endpoint.address:
            # Another process, or none: what it had cached and how its paths fared is gone with it.
            self._prefixes.forget(before.ordinal)
            self._paths.forget(before.endpoint.id)
            self._silent.forget(before.endpoint.id)
            self._progress.forget(before.endpoint.id, now_s)
            self.doubts.forget(before.endpoint.id)
            self._speed.forget(before.endpoint.id)
            self._ledger.forget(before.endpoint.id)
            self._canaries.forget(before.endpoint.id, now_s)

    def _doubt_canaries(self, endpoint_id: EndpointId, now_s: float) -> None:
        """What answers for the first time is to be tried, and what answers again may be another engine."""
        state = self._fleet.get(endpoint_id)
        if state is not None and state.health in {Health.UNKNOWN, Health.UNREACHABLE}:
            self._canaries.forget(endpoint_id, now_s)
            self._canaries.look(state.endpoint.pool, now_s)

    def take_report(self, event: Report, now_s: float) -> None:
        """Take in what a sidecar, an engine or a canary told."""
        match event:
            case CanaryBegan() | CanaryJudged():
                self._canaries.handle(event, now_s)
            case PathProbed():
                self._take_probe(event, now_s)
            case SidecarReported(sidecar, epoch, report):
                self._remote.take(sidecar, epoch, report, now_s)
                for state in self._fleet.at(sidecar):
                    self._canaries.heard(state.endpoint.id)
            case StreamStalled(request_id):
                self._progress.stalled(request_id, now_s)
            case TimePassed():
                pass  # Whoever waits for a time has looked at it.
            case SidecarLost(sidecar):
                self._remote.lose(sidecar, now_s)
            case KvStored() | KvRemoved() | KvCleared() | KvLost():
                self._take_kv_signal(event)

    def _believed(self, taken: SampleTaken) -> SampleTaken:
        """The sample, or our own account in its place where that contradicts it."""
        if self._fleet.get(taken.id) is None:
            return taken
        load = self._ledger.load(taken.id)
        return replace(taken, sample=self.doubts.sampled(taken.id, taken.sample, load))

    def _judge_paths(self, decode: EndpointId, sample: Sample, now_s: float) -> None:
        """Hold what sidecars told against the counters of the engine behind them."""
        if self._fleet.get(decode) is None:
            return
        judged = self._silent.sampled(decode, sample)
        for path in judged.bad:
            self._paths.fail_silently(path, now_s)
        for path in judged.good:
            self._paths.work_silently(path)

    def _take_kv_signal(self, signal: KvSignal) -> None:
        state = self._fleet.get(signal.id)
        if state is not None:
            self._prefixes.take(state, signal)

    def _take_probe(self, event: PathProbed, now_s: float) -> None:
        """Note a probe of every path that it was of: an address may serve several models."""
        decode = self._fleet.get(event.decode)
        if decode is None:
            return
        model = self._model(decode.endpoint.pool.model)
        for prefill in self._fleet.at(event.prefill):
            endpoint = prefill.endpoint
            is_path = endpoint.pool.can_prefill and endpoint.id != event.decode
            if model is None or not is_path or endpoint.pool.model != model.name:
                continue
            seeded = self._speed.path(endpoint, decode.endpoint).bandwidth_bytes_per_s
            bandwidth_min = model.disaggregation.bandwidth_bytes_per_s_min
            is_slow = event.probe.is_slow(seeded, bandwidth_min)
            self._paths.note_probe((endpoint.id, event.decode), event.probe, is_slow=is_slow, now_s=now_s)
