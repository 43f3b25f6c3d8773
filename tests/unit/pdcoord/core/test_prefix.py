"""The prefix index against a reference that remembers everything the slow way."""

from collections.abc import Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdcoord.core.prefix import PrefixIndex, mark_depth
from pdcoord.core.request import BlockKey

# Chained keys: a prompt is a path in a small tree, and a key stands for the whole way to its node.
prompts = st.lists(st.integers(0, 2), max_size=6).map(
    lambda turns: tuple(BlockKey(hash(tuple(turns[: depth + 1]))) for depth in range(len(turns)))
)
ordinals = st.sampled_from([0, 1, 2, 63, 64, 200])


def match(held: dict[int, list[BlockKey]], keys: Sequence[BlockKey]) -> dict[int, int]:
    depths = {}
    for ordinal, blocks in held.items():
        depth = 0
        while depth < len(keys) and keys[depth] in blocks:
            depth += 1
        if depth:
            depths[ordinal] = depth
    return depths


class PrefixMachine(RuleBasedStateMachine):
    """Every operation on the index and on the reference; the reference lists blocks oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.held: dict[int, list[BlockKey]] = {}

    @rule(ordinal=ordinals, keys=prompts, blocks_max=st.integers(1, 8))
    def record(self, ordinal: int, keys: tuple[BlockKey, ...], blocks_max: int) -> None:
        self.index.record(ordinal, keys, blocks_max)
        blocks = self.held.setdefault(ordinal, [])
        for key in reversed(keys[:blocks_max]):
            if key in blocks:
                blocks.remove(key)
            blocks.append(key)
        del blocks[: max(0, len(blocks) - blocks_max)]

    @rule(ordinal=ordinals)
    def forget(self, ordinal: int) -> None:
        self.index.forget(ordinal)
        self.held.pop(ordinal, None)

    @rule(keys=prompts)
    def look(self, keys: tuple[BlockKey, ...]) -> None:
        found = match(self.held, keys)
        assert self.index.match(keys) == found
        for ordinal in (0, 1, 2, 63, 64, 200):
            assert self.index.depth(ordinal, keys) == found.get(ordinal, 0)

    @invariant()
    def both_directions_agree(self) -> None:
        self.index.validate()
        assert self.index.block_count == len({key for blocks in self.held.values() for key in blocks})


@given(st.sets(st.integers(0, 1_100), min_size=1, max_size=24), st.integers(1, 9))
def test_every_ordinal_of_a_mask_is_marked(marked: set[int], depth: int) -> None:
    found: dict[int, int] = {}
    mark_depth(found, sum(1 << ordinal for ordinal in marked), depth)
    assert found == dict.fromkeys(marked, depth)


@example([([1, 2], 5), ([5], 5), ([1, 5], 5), ([], 0)])
@given(st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 5)), max_size=40))
def test_keys_that_are_no_chain_do_no_harm(prompts_given: list[tuple[list[int], int]]) -> None:
    """Nobody makes such keys; a hash that two blocks share would."""
    index = PrefixIndex()
    for numbers, blocks_max in prompts_given:
        keys = tuple(BlockKey(number) for number in numbers)
        index.record(0, keys, blocks_max)
        assert index.depth(0, keys) <= len(keys)
        assert all(0 < depth <= len(keys) for depth in index.match(keys).values())
        assert index.block_count <= blocks_max
    index.forget(0)
    assert index.block_count == 0


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = settings(max_examples=40, stateful_step_count=25)


@given(prompts, prompts)
def test_one_endpoint_matches_the_common_prefix(one: tuple[BlockKey, ...], two: tuple[BlockKey, ...]) -> None:
    index = PrefixIndex()
    index.record(5, one, 100)
    common = sum(1 for a, b in zip(one, two, strict=False) if a == b)
    assert index.match(two) == ({5: common} if common else {})


def test_the_front_of_a_prefix_is_forgotten_last() -> None:
    keys = tuple(BlockKey(i) for i in range(10))
    index = PrefixIndex()
    index.record(0, keys, 10)
    index.record(0, (BlockKey(100), BlockKey(101), BlockKey(102)), 10)
    assert index.match(keys) == {0: 7}


def test_where_chains_part_the_front_is_still_forgotten_last() -> None:
    one, two, three, four, other = (BlockKey(i) for i in range(5))
    index = PrefixIndex()
    for keys in ((one, two, three), (one, two, four), (one, two, three), (other,)):
        index.record(0, keys, 5)
    for bound, depth in ((4, 3), (3, 2), (2, 1)):
        index.record(0, (other,), bound)
        index.validate()
        assert index.match((one, two, three)) == {0: depth}
        assert index.match((one, two, four)) == {0: min(depth, 2)}


def test_a_prompt_longer_than_the_bound_keeps_its_front() -> None:
    keys = tuple(BlockKey(i) for i in range(10))
    index = PrefixIndex()
    index.record(0, keys, 4)
    assert index.match(keys) == {0: 4}
    assert index.block_count == 4


def test_many_holders_are_told_apart_by_depth() -> None:
    keys = tuple(BlockKey(i) for i in range(20))
    index = PrefixIndex()
    for ordinal in range(1_000):
        index.record(ordinal, keys[: ordinal % 21], 100)
    assert index.match(keys) == {o: o % 21 for o in range(1_000) if o % 21}


def test_what_was_never_recorded_matches_nobody() -> None:
    index = PrefixIndex()
    assert index.match(()) == {}
    assert index.match((BlockKey(1),)) == {}
    index.forget(3)
    index.validate()
