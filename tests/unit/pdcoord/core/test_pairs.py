"""Pairs: what a short list keeps, which links are used, and when nothing to split with is an outage."""

from collections import Counter
from dataclasses import replace

import pytest

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.ledger import Load
from pdcoord.core.legs import Leg, PoolLegs
from pdcoord.core.model import Disaggregation, Fallback, Model, SplitMode
from pdcoord.core.pairs import BestPair, Pairs, has_way_to_split
from pdcoord.core.paths import PathTable
from pdcoord.core.plan import Candidate, DropReason, Figures, Why
from pdcoord.core.probes import Probe
from pdcoord.core.request import RequestId
from pdcoord.core.shortlist import TROUBLED_MAX
from pdcoord.core.speed import SeededSpeed
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M = ModelName("m")
NOW_S = 10.0


def pool(name: str, role: Role, connector: Connector = Connector.PDCOORD, link: float = 1e10) -> Pool:
    side = Side(connector, KvLayout(16))
    return Pool(
        PoolName(name), M, role, "v", EngineKind.VLLM, side, SpeedFigures(0.01, 1e-4, 0.01), 1_000, link
    )


PREFILL, DECODE = pool("prefill", Role.PREFILL), pool("decode", Role.DECODE)
MODEL = Model(M, (PREFILL, DECODE))


def leg(of: Pool, index: int, *, own_s: float = 0.1, uncached: int = 1_000, moving: int = 0) -> Leg:
    """A leg whose own time is a queue on a prefill endpoint and a step on a decode one."""
    endpoint = Endpoint(EndpointId(f"{of.name}/{index}"), of, HostPort(f"{of.name}-{index}:80"))
    load = Load(bytes_in_flight=moving, begun_ordinal=index)
    is_prefill = of.role is Role.PREFILL
    return Leg(
        endpoint=endpoint,
        load=load,
        cached_tokens=1_000 - uncached,
        uncached_tokens=uncached,
        queue_s=own_s if is_prefill else 0.0,
        prefill_s=0.1,
        stall_s=0.0,
        step_s=0.0 if is_prefill else own_s,
        prefill_price=0.0,
        output_price=0.0,
        wait_s=own_s if is_prefill else 0.0,
    )


def legs(of: Pool, *made: Leg) -> PoolLegs:
    return PoolLegs(of, list(made), len(made))


def idle(of: Pool, count: int) -> PoolLegs:
    return legs(of, *(leg(of, index) for index in range(count)))


class Table:
    """A path table with tripped paths, and the pairs over it."""

    def __init__(self, model: Model = MODEL) -> None:
        self.model = model
        self.paths = PathTable()
        self.drops: Counter[DropReason] = Counter()

    def trip(self, prefill: Leg, decode: Leg, at_s: float = NOW_S) -> None:
        pair = (prefill.endpoint.id, decode.endpoint.id)
        self.paths.fail(pair, RungReason.PREFILL_UNREACHABLE, RequestId("x"), at_s)

    def probed(self, prefill: Leg, decode: Leg, *, failure: str = "", bandwidth: float | None = None) -> None:
        pair = (prefill.endpoint.id, decode.endpoint.id)
        probe = Probe(NOW_S, 30.0, failure, bandwidth_bytes_per_s=bandwidth)
        self.paths.note_probe(pair, probe, is_slow=bandwidth is not None, now_s=NOW_S)

    def pairs(self) -> Pairs:
        return Pairs(self.model, self.paths, SeededSpeed(), self.drops, NOW_S)

    def best(self, workers: PoolLegs, decodes: PoolLegs) -> BestPair | None:
        return self.pairs().best([workers], [decodes])


def chosen(found: BestPair | None) -> tuple[str, str]:
    assert found is not None
    assert found.candidate.mode is Mode.SPLIT
    assert found.candidate.prefill is not None
    return found.candidate.prefill.id, found.candidate.decode.id


def test_the_least_busy_ends_meet() -> None:
    workers = legs(
        PREFILL, leg(PREFILL, 0, own_s=0.5), leg(PREFILL, 1, own_s=0.1), leg(PREFILL, 2, own_s=0.3)
    )
    decodes = legs(DECODE, leg(DECODE, 0, own_s=0.05), leg(DECODE, 1, own_s=0.01))
    found = Table().best(workers, decodes)
    assert chosen(found) == ("prefill/1", "decode/1")
    assert found is not None
    assert [other.id for other in found.other_prefills] == ["prefill/2", "prefill/0"]


def test_among_equals_it_is_whose_turn_is_longest_past() -> None:
    assert chosen(Table().best(idle(PREFILL, 9), idle(DECODE, 9))) == ("prefill/0", "decode/0")


def test_a_long_queue_of_bytes_is_avoided_even_where_the_prefill_would_start_at_once() -> None:
    workers = [leg(PREFILL, index, own_s=0.0, moving=10**11) for index in range(20)]
    workers.append(leg(PREFILL, 20, own_s=0.2))
    assert chosen(Table().best(legs(PREFILL, *workers), idle(DECODE, 1))) == ("prefill/20", "decode/0")


def test_a_cached_prefix_on_the_decode_side_saves_its_transfer() -> None:
    model = replace(MODEL, disaggregation=Disaggregation(uncached_tokens_min=0, saving_s_min=0.0))
    decodes = legs(DECODE, *(leg(DECODE, i) for i in range(10)), leg(DECODE, 10, own_s=0.10001, uncached=10))
    assert chosen(Table(model).best(idle(PREFILL, 1), decodes)) == ("prefill/0", "decode/10")


def test_a_path_that_was_probed_in_vain_or_is_slow_is_passed_over_and_counted() -> None:
    rules = Disaggregation(bandwidth_bytes_per_s_min=0.0)
    workers, decodes = idle(PREFILL, 4), idle(DECODE, 1)
    table = Table(replace(MODEL, disaggregation=rules))
    table.probed(workers.legs[0], decodes.legs[0], failure="unreachable")
    table.probed(workers.legs[1], decodes.legs[0], bandwidth=0.0)
    table.probed(workers.legs[2], decodes.legs[0], bandwidth=1e6)
    found = table.best(workers, decodes)
    assert chosen(found) == ("prefill/3", "decode/0")
    assert found is not None
    assert [other.id for other in found.other_prefills] == ["prefill/2"]
    assert table.drops == {DropReason.PROBE_FAILED: 1, DropReason.BANDWIDTH_TOO_LOW: 1}


def test_what_was_measured_is_what_a_pair_costs() -> None:
    workers, decodes = idle(PREFILL, 1), idle(DECODE, 1)
    table = Table()
    table.probed(workers.legs[0], decodes.legs[0], bandwidth=2e9)
    found = table.best(workers, decodes)
    assert found is not None
    figures = found.candidate.figures
    assert figures.transfer_s == pytest.approx(0.002 + figures.transfer_bytes / 2e9)


def test_a_closed_path_is_passed_over_and_counted() -> None:
    table, workers, decodes = Table(), idle(PREFILL, 2), idle(DECODE, 1)
    table.trip(workers.legs[0], decodes.legs[0])
    assert chosen(table.best(workers, decodes)) == ("prefill/1", "decode/0")
    assert table.drops == {DropReason.BREAKER_OPEN: 1}


def test_a_half_open_path_may_be_chosen_but_is_no_rung() -> None:
    table, decodes = Table(), idle(DECODE, 1)
    workers = legs(PREFILL, *(leg(PREFILL, index, own_s=index / 10) for index in range(4)))
    table.trip(workers.legs[0], decodes.legs[0], at_s=NOW_S - 5)
    table.trip(workers.legs[1], decodes.legs[0], at_s=NOW_S - 5)
    found = table.best(workers, decodes)
    assert chosen(found) == ("prefill/0", "decode/0")
    assert found is not None
    assert [other.id for other in found.other_prefills] == ["prefill/2", "prefill/3"]


@pytest.mark.parametrize("bad_count", [1, 4, TROUBLED_MAX, 40])
def test_endpoints_in_trouble_do_not_crowd_out_the_others(bad_count: int) -> None:
    table, decodes = Table(), idle(DECODE, 6)
    workers = idle(PREFILL, bad_count + 1)
    for worker in workers.legs[:bad_count]:
        for decode in decodes.legs:
            table.trip(worker, decode)
    assert chosen(table.best(workers, decodes))[0] == f"prefill/{bad_count}"


def test_one_open_path_among_closed_ones_is_found() -> None:
    table, workers, decodes = Table(), idle(PREFILL, 8), idle(DECODE, 8)
    for worker in workers.legs:
        for decode in decodes.legs:
            if (worker, decode) != (workers.legs[6], decodes.legs[7]):
                table.trip(worker, decode)
    assert chosen(table.best(workers, decodes)) == ("prefill/6", "decode/7")


def test_an_endpoint_is_not_paired_with_itself() -> None:
    one, many = idle(pool("both", Role.BOTH), 1), idle(pool("both", Role.BOTH), 9)
    assert Table().best(one, one) is None
    prefill, decode = chosen(Table().best(many, many))
    assert prefill != decode


def test_the_ladder_is_given_as_many_as_the_policy_says() -> None:
    for count in (0, 1, 7, 16):
        table = Table(replace(MODEL, fallback=Fallback(other_prefill_max=count)))
        found = table.best(idle(PREFILL, 30), idle(DECODE, 3))
        assert found is not None
        assert len(found.other_prefills) == count
        assert len({chosen(found)[0], *(other.id for other in found.other_prefills)}) == count + 1


@pytest.mark.parametrize(
    ("prefill", "decode", "bandwidth_min", "reason"),
    [
        (pool("p", Role.PREFILL, Connector.NIXL), DECODE, 0.0, DropReason.VERDICT_IMPOSSIBLE),
        (pool("p", Role.PREFILL, link=0.0), DECODE, 0.0, DropReason.BANDWIDTH_UNKNOWN),
        (PREFILL, pool("d", Role.DECODE, link=0.0), 1e9, DropReason.BANDWIDTH_UNKNOWN),
        (pool("p", Role.PREFILL, link=5e8), DECODE, 1e9, DropReason.BANDWIDTH_TOO_LOW),
    ],
)
def test_a_way_that_cannot_be_used_has_a_reason_for_each_pair(
    prefill: Pool, decode: Pool, bandwidth_min: float, reason: DropReason
) -> None:
    rules = Disaggregation(bandwidth_bytes_per_s_min=bandwidth_min)
    table = Table(Model(M, (prefill, decode), disaggregation=rules))
    assert table.best(idle(prefill, 3), idle(decode, 5)) is None
    assert table.drops == {reason: 15}
    assert not has_way_to_split(table.model, table.paths)


def candidate(decode: Leg) -> Candidate:
    return Candidate(decode.endpoint, None, None, Figures(0, 0, 0, 0, 0, 0, 0, 0, 0))


def test_why_nothing_is_split() -> None:
    cached = legs(DECODE, leg(DECODE, 0, uncached=10), leg(DECODE, 1))
    pairs = Table().pairs()
    assert pairs.best([], [cached]) is None
    assert pairs.why_none(candidate(cached.legs[0]), []) is Why.PREFIX_CACHED
    assert pairs.why_none(candidate(cached.legs[1]), []) is Why.NO_PREFILL_ENDPOINT
    assert pairs.why_none(candidate(cached.legs[1]), [idle(PREFILL, 1)]) is Why.NO_OPEN_PATH


@pytest.mark.parametrize(("mode", "is_split"), [(SplitMode.AUTO, False), (SplitMode.ALWAYS, True)])
def test_a_prompt_that_the_decode_endpoint_has_cached_stays_there(mode: SplitMode, *, is_split: bool) -> None:
    table = Table(replace(MODEL, disaggregation=Disaggregation(mode=mode)))
    found = table.best(idle(PREFILL, 1), legs(DECODE, leg(DECODE, 0, uncached=10)))
    assert (found is not None) is is_split


def test_one_that_cannot_serve_alone_is_paired_however_little_is_left() -> None:
    prefill, decode = (replace(of, engine=EngineKind.SGLANG) for of in (PREFILL, DECODE))
    found = Table().best(idle(prefill, 1), legs(decode, leg(decode, 0, uncached=1)))
    assert chosen(found) == ("prefill/0", "decode/0")


def test_only_a_policy_with_prefill_pods_for_the_purpose_can_have_an_outage() -> None:
    paths = PathTable()
    assert has_way_to_split(MODEL, paths)
    assert not has_way_to_split(Model(M, (DECODE,)), paths)
    assert not has_way_to_split(Model(M, (pool("both", Role.BOTH), DECODE)), paths)
    assert has_way_to_split(Model(M, (PREFILL, pool("both", Role.BOTH))), paths)
