"""One path as the admin listener shows it: everything that speaks for it or against it."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from pdcoord.core.accounts import Accounts
from pdcoord.core.canary import Canaries, CanaryView
from pdcoord.core.fleet import Endpoint, Fleet, Pool
from pdcoord.core.model import Model
from pdcoord.core.paths import BreakerState
from pdcoord.core.probes import Probe
from transfer.presets import PRESETS
from transfer.verdict import Verdict

PATHS_SHOWN_MAX = 100_000
_Pair = tuple[Endpoint, Endpoint]


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
    models: Iterable[Model], accounts: Accounts, canaries: Canaries, now_s: float, count_max: int
) -> list[PathView]:
    """Pairs of endpoints that could be paths, of all these models, those that are not closed first."""
    found: tuple[list[_Pair], list[_Pair]] = ([], [])
    for pair in _pairs(models, accounts.fleet):
        is_closed = _state(*pair, accounts, now_s) is BreakerState.CLOSED
        if len(found[is_closed]) < count_max:
            found[is_closed].append(pair)
        if len(found[False]) >= count_max:
            break
    pairs = itertools.islice(itertools.chain(*found), count_max)
    return [_view(prefill, decode, accounts, canaries, now_s) for prefill, decode in pairs]


def path_count(models: Iterable[Model], fleet: Fleet) -> int:
    """How many there are."""
    return sum(1 for _ in _pairs(models, fleet))


def _pairs(models: Iterable[Model], fleet: Fleet) -> Iterator[_Pair]:
    for model in models:
        endpoints = [state.endpoint for state in fleet.of_model(model.name)]
        prefills = [each for each in endpoints if each.pool.can_prefill]
        decodes = [each for each in endpoints if each.pool.can_decode]
        yield from (pair for pair in itertools.product(prefills, decodes) if pair[0].id != pair[1].id)


def _state(prefill: Endpoint, decode: Endpoint, accounts: Accounts, now_s: float) -> BreakerState:
    paths = accounts.paths
    is_shut = bool(paths.gates.fault(prefill, decode))
    return BreakerState.OPEN if is_shut else paths.state(prefill.id, decode.id, now_s)


def _view(
    prefill: Endpoint, decode: Endpoint, accounts: Accounts, canaries: Canaries, now_s: float
) -> PathView:
    paths = accounts.paths
    seeded = accounts.speed.path(prefill, decode)
    gate = paths.gates.fault(prefill, decode)
    return PathView(
        prefill=prefill,
        decode=decode,
        verdict=paths.verdict(prefill.pool, decode.pool),
        state=_state(prefill, decode, accounts, now_s),
        bandwidth_bytes_per_s=paths.figures(prefill.id, decode.id, seeded, now_s).bandwidth_bytes_per_s,
        bytes_in_flight=accounts.ledger.load(decode.id).bytes_in_flight,
        fault=paths.fault(prefill.id, decode.id, now_s) or gate,
        probe=paths.probe(prefill.id, decode.id),
        canary=canaries.view(prefill, decode, now_s),
    )
