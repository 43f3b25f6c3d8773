"""What coordinators tell this sidecar, by replica: prefill targets with their paths, and decode endpoints."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pdcoord.protocol.control import TARGETS_MAX, Target, Targets
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.paths import ToldPath
from pdcoord.protocol.plans import PrefillTarget

KEEP_S = 60.0
"""What a replica told holds so long after its stream was lost: requests that it planned are still served."""
REPLICAS_MAX = 64


@dataclass(slots=True)
class _Replica:
    """What one replica last told.

    Attributes:
        lost_s: when its stream was lost; None while it is connected.
        decodes: decode endpoints at which streams may go on.
        has_told: it has told all its targets on the stream that is up.
    """

    targets: dict[HostPort, Target] = field(default_factory=dict)
    decodes: set[HostPort] = field(default_factory=set)
    lost_s: float | None = None
    has_told: bool = False


class TargetBook:
    """What each replica last told.

    Attributes:
        left_out: targets beyond what is kept of one replica.
    """

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}
        self._told: dict[HostPort, PrefillTarget] = {}
        self.left_out = 0

    def connect(self, replica: str) -> None:
        """A stream to this replica is up; what it told before holds until it tells anew."""
        known = self._replicas.setdefault(replica, _Replica())
        known.lost_s = None

    def lose(self, replica: str, now_s: float) -> None:
        known = self._replicas.get(replica)
        if known is not None:
            known.lost_s = now_s
            known.has_told = False

    def take(self, replica: str, told: Targets) -> None:
        """A replica told of changes."""
        known = self._replicas.get(replica)
        if known is None:
            return
        if told.is_whole:
            known.targets.clear()
            known.decodes.clear()
            known.has_told = True
        for address in told.removed:
            known.targets.pop(address, None)
        known.decodes.difference_update(told.decodes_removed)
        for address in told.decodes:
            if len(known.decodes) < TARGETS_MAX:
                known.decodes.add(address)
            else:
                self.left_out += 1
        for target in told.changed:
            if target.address in known.targets or len(known.targets) < TARGETS_MAX:
                known.targets[target.address] = target
            else:
                self.left_out += 1
        self._merge()

    def sweep(self, now_s: float) -> None:
        """Forget what replicas told that were lost long ago."""
        old = [name for name, known in self._replicas.items() if _is_old(known, now_s)]
        lost = [name for name, known in self._replicas.items() if known.lost_s is not None]
        surplus = max(0, len(self._replicas) - REPLICAS_MAX)
        for name in {*old, *lost[:surplus]}:
            del self._replicas[name]
        if old or surplus:
            self._merge()

    def targets(self) -> Iterable[PrefillTarget]:
        """Every target that any replica names, each address once."""
        return self._told.values()

    def get(self, address: HostPort) -> PrefillTarget | None:
        return self._told.get(address)

    def has_decode(self, address: HostPort) -> bool:
        """Whether any replica names a decode endpoint at which streams may go on."""
        return any(address in known.decodes for known in self._replicas.values())

    def __len__(self) -> int:
        return len(self._told)

    def is_shut(self, address: HostPort) -> bool:
        """Whether every connected replica calls this path open or impossible, and there is one."""
        told = [known.targets.get(address) for known in self._replicas.values() if known.has_told]
        return bool(told) and all(target is not None and target.is_shut for target in told)

    def states(self) -> Counter[str]:
        """How many targets are usable, and how many every connected replica calls shut."""
        return Counter("shut" if self.is_shut(address) else "usable" for address in self._told)

    def rows(self) -> Iterator[ToldPath]:
        """What each replica told, for GET /paths."""
        for name, known in self._replicas.items():
            for target in known.targets.values():
                yield ToldPath(
                    replica=name,
                    target=target.address,
                    verdict=target.verdict,
                    verdict_reason=target.verdict_reason,
                    breaker=target.breaker,
                    is_connected=known.lost_s is None,
                )

    def _merge(self) -> None:
        self._told = {
            target.address: PrefillTarget(
                address=target.address, bootstrap_port=target.bootstrap_port, kv_port=target.kv_port
            )
            for known in self._replicas.values()
            for target in known.targets.values()
            if target.verdict != "impossible"
        }


def _is_old(known: _Replica, now_s: float) -> bool:
    return known.lost_s is not None and now_s >= known.lost_s + KEEP_S
