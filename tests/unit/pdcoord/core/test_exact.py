"""The exact index against a reference that keeps every block's tokens and walks them the slow way."""

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdcoord.core import exact
from pdcoord.core.blocks import token_keys
from pdcoord.core.exact import ExactCount, ExactIndex
from pdcoord.core.fleet import EndpointId
from pdcoord.core.kvcache import Coverage, EngineHash, KvRemoved, KvStored, Tier

E = EndpointId("e")
OURS = 4
MODEL = "m"


def name(tokens: tuple[int, ...], lora: str = "", salt: str = "") -> EngineHash:
    return EngineHash(hash((tokens, lora, salt)) & (2**64 - 1))


def stored(
    prompt: tuple[int, ...], begin: int, end: int, block: int, lora: str = "", salt: str = ""
) -> KvStored:
    """Blocks `begin` to `end` of a prompt, as an engine with that block size tells of them."""
    hashes = tuple(name(prompt[: (index + 1) * block], lora, salt) for index in range(begin, end))
    parent = name(prompt[: begin * block], lora, salt) if begin else None
    return KvStored(E, parent, hashes, prompt[begin * block : end * block], block, lora, salt)


def keys(prompt: tuple[int, ...], lora: str = "", salt: str = "") -> tuple[int, ...]:
    return token_keys(prompt, model=MODEL, cache_salt=salt, lora=lora, block_tokens=OURS)


def index(blocks_max: int = 10_000) -> ExactIndex:
    return ExactIndex(MODEL, OURS, blocks_max)


@dataclass
class Engine:
    """What one engine has: how often it stored each block, by tier and tokens up to its end."""

    block: int
    blocks: dict[tuple[Tier, tuple[int, ...]], int] = field(default_factory=Counter)

    def has(self, tier: Tier, prefix: tuple[int, ...]) -> bool:
        return self.blocks.get((tier, prefix), 0) > 0

    def cached(self, prompt: tuple[int, ...]) -> tuple[int, float]:
        """Tokens of the longest prefix in whole blocks, ours and theirs, and what each of ours is worth."""
        worth, end = 0.0, OURS
        while end <= len(prompt):
            weights = [exact.TIER_WEIGHTS[tier] for tier in Tier if self.covers(tier, prompt, end)]
            if not weights:
                break
            worth += max(weights)
            end += OURS
        tokens = end - OURS
        whole = tokens - tokens % self.block if self.block > OURS else tokens
        return whole, worth * whole / tokens if tokens else 0.0

    def covers(self, tier: Tier, prompt: tuple[int, ...], end: int) -> bool:
        """Whether the tier has a block that the tokens up to here end in, and any tier those before it."""
        first = (end - OURS) // self.block
        last = (end - 1) // self.block
        return any(
            len(prefix) == (last + 1) * self.block
            and prefix[:end] == prompt[:end]
            and all(
                any(self.has(each, prefix[: (index + 1) * self.block]) for each in Tier)
                for index in range(first, last)
            )
            for own_tier, prefix in self.blocks
            if own_tier is tier and self.has(tier, prefix)
        )


# Few tokens, so that prompts share beginnings.
prompts = st.lists(st.integers(0, 1), min_size=0, max_size=6).map(
    lambda turns: tuple(token for turn in turns for token in (turn, 7, turn, 8, 9, turn, 3, 1))
)
tiers = st.sampled_from([Tier.GPU, Tier.GPU, Tier.CPU])
ordinals = st.sampled_from([0, 1, 65])
BLOCKS = {0: 4, 1: 8, 65: 6}


class ExactMachine(RuleBasedStateMachine):
    """Engines whose blocks are ours, twice ours and ragged; every order of storing and removing."""

    def __init__(self) -> None:
        super().__init__()
        self.index = index()
        self.engines = {ordinal: Engine(block) for ordinal, block in BLOCKS.items()}

    def known(self, ordinal: int, prefix: tuple[int, ...]) -> bool:
        return not prefix or any(self.engines[ordinal].has(tier, prefix) for tier in Tier)

    @rule(ordinal=ordinals, prompt=prompts, begin=st.integers(0, 3), tier=tiers)
    def store(self, ordinal: int, prompt: tuple[int, ...], begin: int, tier: Tier) -> None:
        engine = self.engines[ordinal]
        end = len(prompt) // engine.block
        if begin >= end:
            return
        self.index.store(ordinal, replace(stored(prompt, begin, end, engine.block), tier=tier))
        if self.known(ordinal, prompt[: begin * engine.block]):
            for at in range(begin, end):
                engine.blocks[tier, prompt[: (at + 1) * engine.block]] += 1

    @rule(ordinal=ordinals, prompt=prompts, at=st.integers(1, 8), tier=tiers)
    def remove(self, ordinal: int, prompt: tuple[int, ...], at: int, tier: Tier) -> None:
        engine = self.engines[ordinal]
        prefix = prompt[: at * engine.block]
        self.index.remove(ordinal, KvRemoved(E, (name(prefix),), tier))
        if engine.has(tier, prefix):
            engine.blocks[tier, prefix] -= 1

    @rule(ordinal=ordinals, tier=st.sampled_from([None, Tier.CPU]))
    def clear(self, ordinal: int, tier: Tier | None) -> None:
        self.index.clear(ordinal, tier)
        blocks = self.engines[ordinal].blocks
        for each in [each for each in blocks if tier in {None, each[0]}]:
            del blocks[each]

    @rule(prompt=prompts)
    @precondition(lambda self: self.index.block_count)
    def match(self, prompt: tuple[int, ...]) -> None:
        found = self.index.match(keys(prompt))
        for ordinal, engine in self.engines.items():
            tokens, worth = engine.cached(prompt)
            assert found.get(ordinal, 0.0) == pytest.approx(worth), ordinal
            assert self.index.cached_tokens(ordinal, keys(prompt)) == tokens

    @invariant()
    def is_whole(self) -> None:
        self.index.validate()


TestExact = ExactMachine.TestCase
TestExact.settings = settings(max_examples=60, stateful_step_count=30)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=130), st.integers(1, 40), st.integers(1, 40))
def test_keys_do_not_depend_on_the_engines_block_size(tokens: list[int], block: int, split: int) -> None:
    prompt = tuple(tokens)
    blocks = len(prompt) // block
    own = index()
    for begin in range(0, blocks, split):
        own.store(0, stored(prompt, begin, min(begin + split, blocks), block))
    own.validate()
    tokens = blocks * block // OURS * OURS
    if block > OURS:
        tokens -= tokens % block
    assert own.cached_tokens(0, keys(prompt)) == tokens
    assert own.match(keys(prompt)).get(0, 0) == pytest.approx(tokens / OURS)
    assert own.depth(0, keys(prompt)) == blocks * block // OURS
    assert own.block_count == own.counts[ExactCount.STORED] == blocks


@pytest.mark.parametrize("block", [1, 2, 3])
def test_small_blocks_leave_from_the_end(block: int) -> None:
    prompt = tuple(range(48))
    own, blocks = index(), 48 // block
    own.store(0, stored(prompt, 0, blocks, block))
    for end in range(blocks, 0, -1):
        assert own.match(keys(prompt)).get(0, 0) == end * block // OURS
        own.remove(0, KvRemoved(E, (name(prompt[: end * block]),)))
        own.validate()
    assert own.block_count == 0


def test_adapters_salts_and_models_do_not_share() -> None:
    prompt = tuple(range(16))
    own = index()
    own.store(0, stored(prompt, 0, 2, OURS, lora="a"))
    own.store(0, stored(prompt, 0, 3, OURS, salt="s"))
    # A run with a parent has what its parent has.
    own.store(0, replace(stored(prompt, 3, 4, OURS, salt="s"), cache_salt=""))
    assert own.match(keys(prompt)) == {}
    assert own.match(keys(prompt, lora="a")) == {0: 2}
    assert own.match(keys(prompt, salt="s")) == {0: 4}
    assert own.match(keys(prompt, lora="s")) == {}
    assert own.match(token_keys(prompt, model="other", cache_salt="s", block_tokens=OURS)) == {}


def test_what_else_is_in_a_block_parts_it_and_all_behind_it_from_plain_prompts() -> None:
    prompt = tuple(range(16))
    own = index()
    own.store(0, replace(stored(prompt, 0, 3, OURS), extras=("", "['image', 0]", "")))
    assert own.match(keys(prompt)) == {0: 1}
    own.store(0, stored(prompt, 3, 4, OURS))
    assert own.match(keys(prompt)) == {0: 1}
    own.validate()


def test_lower_tiers_count_for_less() -> None:
    prompt = tuple(range(16))
    own = index()
    own.store(0, replace(stored(prompt, 0, 4, OURS), tier=Tier.CPU))
    own.store(0, stored(prompt, 0, 1, OURS))
    own.store(3, replace(stored(prompt, 0, 2, OURS), tier=Tier.DISK))
    assert own.match(keys(prompt)) == pytest.approx({0: 1 + 3 * 0.8, 3: 2 * 0.5})
    # A prediction is as good as the best tier.
    first = keys(prompt)[0]
    assert own.match(keys(prompt), {first: 1 << 3 | 1 << 9}) == pytest.approx({0: 3.4, 3: 1.5, 9: 1})
    own.remove(0, KvRemoved(E, (name(prompt[:8]),), Tier.CPU))
    assert own.match(keys(prompt))[0] == 1


def test_a_tier_may_name_blocks_that_another_told_the_tokens_of() -> None:
    prompt = tuple(range(8))
    own = index()
    told = stored(prompt, 0, 2, OURS)
    own.store(0, told)
    own.store(
        0, replace(told, tier=Tier.CPU, token_ids=(), parent=None, hashes=(*told.hashes, EngineHash(5)))
    )
    own.remove(0, KvRemoved(E, told.hashes))
    assert own.match(keys(prompt)) == pytest.approx({0: 1.6})
    assert own.counts[ExactCount.ORPHANED] == 1


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([(0, Coverage.UNSAID), (1, Coverage.UNSAID)], {0: 1}),
        ([(0, Coverage.PARTIAL), (1, Coverage.FULL), (2, Coverage.FULL)], {0: 2}),
        ([(1, Coverage.FULL), (0, Coverage.PARTIAL)], {0: 1}),
        ([(1, Coverage.UNSAID)], {}),
        ([(0, Coverage.PARTIAL)], {}),
    ],
)
def test_the_first_group_of_full_attention_decides(
    told: list[tuple[int, Coverage]], expected: dict[int, int]
) -> None:
    prompt = tuple(range(16))
    own = index()
    for blocks, (group, coverage) in enumerate(told, 1):
        own.store(0, replace(stored(prompt, 0, blocks, OURS), group=group, coverage=coverage))
    assert own.match(keys(prompt)) == expected
    # The others' removals do not touch it.
    deciding = next((g for g, c in told if c is Coverage.FULL), 0)
    own.remove(0, KvRemoved(E, (name(prompt[:4]),), group=deciding + 1))
    assert own.match(keys(prompt)) == expected
    own.remove(0, KvRemoved(E, (name(prompt[:4]),), group=deciding))
    assert own.match(keys(prompt)) == {}


GOOD = stored(tuple(range(8)), 0, 2, OURS)


@pytest.mark.parametrize(
    "lie",
    [
        replace(GOOD, token_ids=GOOD.token_ids[:-1]),
        replace(GOOD, block_tokens=8),
        replace(GOOD, block_tokens=0, token_ids=()),
        replace(GOOD, block_tokens=-4),
        replace(GOOD, block_tokens=2**40),
        replace(GOOD, hashes=()),
        replace(GOOD, extras=("x",)),
        replace(GOOD, token_ids=(-1, *GOOD.token_ids[1:])),
        replace(GOOD, token_ids=(2**32, *GOOD.token_ids[1:])),
        replace(GOOD, hashes=(EngineHash(1),) * 65_537, token_ids=(1,) * 65_537, block_tokens=1),
    ],
)
def test_a_lie_is_counted_and_changes_nothing(lie: KvStored) -> None:
    own = index()
    own.store(0, lie)
    assert own.block_count == 0
    assert own.counts == {ExactCount.MALFORMED_EVENTS: 1}
    own.validate()


def test_unknown_parents_and_removals_are_counted() -> None:
    own = index()
    own.remove(0, KvRemoved(E, GOOD.hashes))
    own.store(0, replace(GOOD, parent=EngineHash(77)))
    own.store(0, GOOD)
    own.remove(0, KvRemoved(E, (EngineHash(78),)))
    assert own.counts[ExactCount.ORPHANED] == 2
    assert own.counts[ExactCount.UNKNOWN_REMOVED] == 3
    assert own.match(keys(tuple(range(8)))) == {0: 2}


def test_of_one_name_for_two_prefixes_the_later_is_believed() -> None:
    own = index()
    other = tuple(range(100, 108))
    own.store(0, GOOD)
    own.store(0, replace(stored(other, 0, 2, OURS), hashes=GOOD.hashes))
    assert own.match(keys(tuple(range(8)))) == {}
    assert own.match(keys(other)) == {0: 2}
    assert own.counts[ExactCount.CONFLICTING] == 2
    own.validate()


def test_a_block_stored_twice_leaves_with_its_second_removal() -> None:
    own = index()
    own.store(0, GOOD)
    own.store(0, GOOD)
    own.remove(0, KvRemoved(E, GOOD.hashes))
    assert own.match(keys(tuple(range(8)))) == {0: 2}
    own.remove(0, KvRemoved(E, GOOD.hashes))
    assert own.match(keys(tuple(range(8)))) == {}
    own.validate()


def test_one_that_floods_drives_out_its_own() -> None:
    own = index(blocks_max=1_000)
    prompt = tuple(range(40))
    own.store(0, stored(prompt, 0, 10, OURS))
    for number in range(500):
        flood = tuple(range(1_000 + number * 40, 1_040 + number * 40))
        own.store(1, stored(flood, 0, 10, OURS))
        assert own.block_count <= 1_000
    own.validate()
    assert own.match(keys(prompt)) == {0: 10}
    assert own.counts[ExactCount.EVICTED] >= 4_000


def test_what_is_matched_is_spared() -> None:
    own = index(blocks_max=1_000)
    used, unused = tuple(range(40)), tuple(range(50, 90))
    own.store(0, stored(unused, 0, 10, OURS))
    own.store(0, stored(used, 0, 10, OURS))
    for number in range(200):
        own.store(0, stored(tuple(range(1_000 + number * 40, 1_040 + number * 40)), 0, 10, OURS))
        own.touch(keys(used))
    assert own.match(keys(used)) == {0: 10}
    assert own.match(keys(unused)) == {}
    own.set_bound(5)
    assert own.block_count <= 5
    own.validate()
