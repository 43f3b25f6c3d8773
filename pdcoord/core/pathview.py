"""One path as the admin listener shows it: everything that speaks for it or against it."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from pdcoord.core.canary import Canaries, CanaryView
from pdcoord.core.fleet import Endpoint, Pool
from pdcoord.core.model import Model
from pdcoord.core.paths import BreakerState
from pdcoord.core.probes import Probe
from pdcoord.core.remote import Accounts
from transfer.presets import PRESETS
from transfer.verdict import Verdict


@dataclass(frozen=True, slots=True)
class PathView:
    """One path as the admin listener shows it.

    Attributes:
        bandwidth_bytes_per_s: what decisions count with: of the policy, no more than measured lately.
        fault: why its last probe or its canary shuts the path; empty if neither does.
        probe: the last one, be it fresh or not; None if there was none.
        canary: of its pools; None where they need none.
    """

    prefill: Endpoint
    decode: Endpoint
    verdict: Verdict
    state: BreakerState
    bandwidth_bytes_per_s: float
    bytes_in_flight: int
    fault: str
    probe: Probe | None
    canary: CanaryView | None


def layout_words(pool: Pool) -> str:
    """How a pool stores its KV, in one line: vendor, connector, the preset that says the same, every key."""
    side = pool.side
    if side.layout is None:
        return f"{pool.vendor} {side.connector}: layout unknown"
    presets = [preset.name for preset in PRESETS.values() if preset.layout == side.layout]
    named = f" {'|'.join(presets)}" if presets else ""
    keys = " ".join(f"{key}={value}" for key, value in asdict(side.layout).items())
    return f"{pool.vendor} {side.connector}{named}: {keys}"


def path_views(
    models: Iterable[Model], accounts: Accounts, canaries: Canaries, now_s: float
) -> Iterator[PathView]:
    """Every pair of endpoints that could be a path, of all these models."""
    for model in models:
        endpoints = [state.endpoint for state in accounts.fleet.of_model(model.name)]
        for prefill, decode in itertools.product(endpoints, endpoints):
            if prefill.pool.can_prefill and decode.pool.can_decode and prefill.id != decode.id:
                yield _view(prefill, decode, accounts, canaries, now_s)


def _view(
    prefill: Endpoint, decode: Endpoint, accounts: Accounts, canaries: Canaries, now_s: float
) -> PathView:
    paths = accounts.paths
    seeded = accounts.speed.path(prefill, decode)
    gate = paths.gates.fault(prefill, decode)
    state = paths.state(prefill.id, decode.id, now_s)
    return PathView(
        prefill=prefill,
        decode=decode,
        verdict=paths.verdict(prefill.pool, decode.pool),
        state=BreakerState.OPEN if gate else state,
        bandwidth_bytes_per_s=paths.figures(prefill.id, decode.id, seeded, now_s).bandwidth_bytes_per_s,
        bytes_in_flight=accounts.ledger.load(decode.id).bytes_in_flight,
        fault=paths.fault(prefill.id, decode.id, now_s) or gate,
        probe=paths.probe(prefill.id, decode.id),
        canary=canaries.view(prefill, decode, now_s),
    )
