"""A workload's keys as KV events: the coordinator's index finds by them what a place has cached."""

import pytest

from pdcoord.core.exact import ExactIndex
from pdcoord.core.fleet import EndpointId
from pdcoord.sim.routers import kvwords
from pdcoord.sim.routers.kvwords import KvWords

HERE = EndpointId("here")
CHAIN = (7, 1 << 40, 1 << 41, -5)


def test_what_was_stored_is_found_by_its_keys_until_it_is_removed() -> None:
    words, index = KvWords("m", 32), ExactIndex("m", 32, 1_000)
    keys = words.token_keys(CHAIN)
    assert words.token_keys(CHAIN[:2]) == keys[:2]
    first, second = [*words.stored(HERE, CHAIN[:2])], [*words.stored(HERE, CHAIN[2:])]
    assert [len(each.hashes) for each in (*first, *second)] == [2, 2]
    for event in (*first, *second):
        index.store(0, event)
    assert index.match(keys) == {0: 4.0}
    index.remove(0, words.removed(HERE, CHAIN[3:]))
    assert index.match(keys) == {0: 3.0}
    index.validate()


def test_runs_of_several_chains_are_events_of_their_own() -> None:
    words = KvWords("m", 16)
    words.token_keys((1, 2, 3))
    words.token_keys((1, 8))
    events = [*words.stored(HERE, (1, 2, 8, 3, 99))]
    assert [(each.parent, each.hashes) for each in events] == [(None, (1, 2)), (1, (8,)), (2, (3,))]
    assert all(len(each.token_ids) == 16 * len(each.hashes) for each in events)


def test_what_is_forgotten_is_not_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvwords, "KEYS_MAX", 2)
    words = KvWords("m", 16)
    words.token_keys((1, 2, 3))
    assert [each.hashes for each in words.stored(HERE, (1, 2, 3))] == [(2, 3)]
    with pytest.raises(ValueError, match="expected at least 2"):
        KvWords("m", 1)
