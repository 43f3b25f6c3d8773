"""Which index answers for whom, and how far engines are believed."""

from dataclasses import replace

import pytest

from pdcoord.core import prefixes as module
from pdcoord.core.blocks import block_keys, token_keys
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.exact import ExactCount
from pdcoord.core.fleet import (
    Endpoint,
    EndpointId,
    EndpointState,
    EngineKind,
    ModelName,
    Pool,
    PoolName,
    Role,
)
from pdcoord.core.kvcache import EngineHash, KvCleared, KvLost, KvRemoved, KvStored, Tier
from pdcoord.core.model import Model, PrefixMode
from pdcoord.core.predicted import PREDICTION_S_MAX
from pdcoord.core.prefixes import SILENCE_S_MAX, Prefixes, RoutedBy, Trust
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.headers import HostPort
from transfer.verdict import Connector, Side

M = ModelName("m")
POOL = Pool(
    name=PoolName("p"),
    model=M,
    role=Role.BOTH,
    vendor="x",
    engine=EngineKind.VLLM,
    side=Side(Connector.NONE, None),
    speed=SpeedFigures(0.0, 1e-3, 0.01),
    kv_bytes_per_token=1,
    link_bytes_per_s=1.0,
)
MODEL = Model(M, (POOL,), prefix_mode=PrefixMode.PRECISE, precise_block_tokens=16, prefix_block_tokens=16)
TOKENS = tuple(range(160))
TEXT = bytes(range(160)) * 4
ID = EndpointId("e")


def state(ordinal: int = 0) -> EndpointState:
    return EndpointState(Endpoint(EndpointId(f"e{ordinal}"), POOL, HostPort(f"h{ordinal}:1")), ordinal)


def request(tokens: tuple[int, ...] = TOKENS, text: bytes = TEXT) -> Request:
    return Request(
        id=RequestId("r"),
        model=M,
        prompt_tokens=len(tokens),
        block_keys=block_keys(text, model=M, cache_salt="", block_bytes=64),
        block_tokens=16,
        token_keys=token_keys(tokens, model=M, block_tokens=16),
        token_block_tokens=16,
    )


def told(blocks: int, tier: Tier = Tier.GPU) -> KvStored:
    hashes = tuple(EngineHash(1 + index) for index in range(blocks))
    return KvStored(ID, None, hashes, TOKENS[: blocks * 16], 16, tier=tier)


@pytest.fixture
def prefixes() -> Prefixes:
    made = Prefixes()
    made.replace_models([MODEL])
    return made


def cached(prefixes: Prefixes, now_s: float = 0.0, asked: Request | None = None) -> dict[int, int]:
    found = prefixes.cached_tokens(asked or request(), MODEL, now_s)
    prefixes.validate()
    return found


def sent(prefixes: Prefixes, ordinal: int, blocks: int) -> None:
    """A request of so many blocks was sent there, in both granularities."""
    asked = request(TOKENS[: blocks * 16], TEXT[: blocks * 64])
    prefixes.record(state(ordinal), asked, MODEL, 0.0)


def test_one_that_was_never_heard_is_judged_by_what_it_was_sent(prefixes: Prefixes) -> None:
    sent(prefixes, 0, 5)
    assert cached(prefixes) == {0: 80}
    assert prefixes.trust(state(0)) is Trust.NONE


def test_one_that_was_heard_from_the_start_is_believed(prefixes: Prefixes) -> None:
    sent(prefixes, 0, 5)
    prefixes.take(state(0), KvCleared(ID))
    assert cached(prefixes).get(0, 0) == 0
    prefixes.take(state(0), told(3))
    assert cached(prefixes) == {0: 48}
    prefixes.take(state(0), KvRemoved(ID, (EngineHash(2),)))
    assert cached(prefixes) == {0: 16}
    assert prefixes.trust(state(0)) is Trust.FULL


def test_one_that_events_were_missed_of_has_the_better_of_both(prefixes: Prefixes) -> None:
    sent(prefixes, 0, 5)
    prefixes.take(state(0), KvCleared(ID))
    prefixes.take(state(0), told(9))
    prefixes.take(state(0), KvLost(ID))
    assert prefixes.trust(state(0)) is Trust.PARTIAL
    assert cached(prefixes) == {0: 80}
    prefixes.take(state(0), told(3))
    assert cached(prefixes) == {0: 80}
    prefixes.take(state(0), told(9))
    assert cached(prefixes) == {0: 144}
    prefixes.take(state(0), KvCleared(ID, Tier.CPU))
    assert prefixes.trust(state(0)) is Trust.PARTIAL


def test_a_request_without_usable_keys_is_judged_by_what_was_sent(prefixes: Prefixes) -> None:
    sent(prefixes, 0, 5)
    prefixes.take(state(0), KvCleared(ID))
    for asked in (replace(request(), token_keys=()), replace(request(), token_block_tokens=32)):
        assert cached(prefixes, asked=asked) == {0: 80}
    assert prefixes.cached_tokens(request(), replace(MODEL, name=ModelName("other")), 0.0) == {0: 80}


def test_tokens_in_slower_tiers_count_for_less_and_the_last_token_is_computed(prefixes: Prefixes) -> None:
    prefixes.take(state(0), KvCleared(ID))
    prefixes.take(state(0), told(10, Tier.CPU))
    prefixes.take(state(1), KvCleared(ID))
    prefixes.take(state(1), told(10))
    assert cached(prefixes) == {0: 128, 1: 159}


def test_what_was_routed_is_predicted_for_a_while(prefixes: Prefixes) -> None:
    prefixes.take(state(0), KvCleared(ID))
    prefixes.take(state(0), told(3))
    sent(prefixes, 0, 6)
    assert cached(prefixes, 1.0) == {0: 96}
    assert cached(prefixes, PREDICTION_S_MAX) == {0: 48}
    prefixes.take(state(0), KvCleared(ID))
    sent(prefixes, 0, 6)
    assert cached(prefixes, 1.0) == {0: 96}
    prefixes.take(state(0), KvCleared(ID))
    assert cached(prefixes, 1.0).get(0, 0) == 0


def test_one_that_falls_silent_is_not_believed_until_it_is_heard(prefixes: Prefixes) -> None:
    prefixes.take(state(0), KvCleared(ID))
    prefixes.take(state(0), told(3))
    sent(prefixes, 0, 3)
    assert cached(prefixes, SILENCE_S_MAX * 9) == {0: 48}
    assert prefixes.trust(state(0)) is Trust.FULL, "it had nothing to tell"
    sent(prefixes, 0, 8)
    assert cached(prefixes, SILENCE_S_MAX) == {0: 48}
    assert cached(prefixes, SILENCE_S_MAX + 1.0) == {0: 128}
    assert prefixes.trust(state(0)) is Trust.NONE
    prefixes.take(state(0), told(2))
    assert prefixes.trust(state(0)) is Trust.PARTIAL


def test_hearing_in_time_is_an_answer(prefixes: Prefixes) -> None:
    prefixes.take(state(0), KvCleared(ID))
    sent(prefixes, 0, 8)
    prefixes.take(state(0), told(1))
    assert cached(prefixes, SILENCE_S_MAX + 1.0) == {0: 16}
    assert prefixes.trust(state(0)) is Trust.FULL


def test_the_two_indexes_are_compared_on_who_computes(prefixes: Prefixes) -> None:
    asked = request()
    prefixes.compare(state(0), asked, MODEL)
    prefixes.take(state(0), KvCleared(ID))
    prefixes.take(state(0), told(3))
    prefixes.record(state(0), request(TOKENS[:32], TEXT[: 5 * 64]), MODEL, 0.0)
    prefixes.compare(state(0), asked, MODEL)
    prefixes.compare(state(0), replace(asked, token_keys=()), MODEL)
    found = prefixes.comparison(M)
    assert found is not None
    assert found.requests == {RoutedBy.APPROXIMATE: 2, RoutedBy.PRECISE: 1}
    assert (found.compared, found.precise_tokens, found.approximate_tokens) == (1, 48, 80)
    assert found.apart_tokens == 32


def test_a_gone_endpoint_leaves_nothing(prefixes: Prefixes) -> None:
    prefixes.take(state(0), KvCleared(ID))
    prefixes.take(state(0), told(3))
    sent(prefixes, 0, 5)
    prefixes.forget(0)
    assert cached(prefixes) == {}
    index = prefixes.index(M)
    assert index is not None
    assert index.block_count == 0
    assert prefixes.trust(state(0)) is Trust.NONE


def test_models_come_and_go(prefixes: Prefixes) -> None:
    prefixes.take(state(0), KvCleared(ID))
    prefixes.take(state(0), told(5))
    prefixes.replace_models([replace(MODEL, precise_blocks_max=2)])
    index = prefixes.index(M)
    assert index is not None
    assert index.block_count == 2
    assert index.counts[ExactCount.EVICTED] == 3
    prefixes.replace_models([replace(MODEL, precise_block_tokens=32)])
    assert prefixes.index(M) is not index
    assert prefixes.trust(state(0)) is Trust.NONE
    prefixes.replace_models([replace(MODEL, prefix_mode=PrefixMode.APPROXIMATE)])
    assert prefixes.index(M) is None
    assert prefixes.comparison(M) is None
    prefixes.take(state(0), told(5))
    assert cached(prefixes) == {}


def test_silence_is_longer_than_a_prediction() -> None:
    assert module.SILENCE_S_MAX > PREDICTION_S_MAX
