"""Exact prefix index of one model: what engines say they have cached, under keys of our own.

Engines name blocks by hashes of their own and cut prompts at their own block size. Here each endpoint's
names lead to our keys, made from the token ids that the engine tells, so that endpoints of any vendor and
block size can be compared. A block that does not end where one of ours does carries the chain on: the
last key and the tokens behind it.

Removing a block removes the keys that end in it. For engine blocks at least as large as ours that is
exact in any order of removal; smaller ones rely on engines evicting a chain from its end, as vLLM (blocks
are freed last first) and SGLang (only leaves are evicted) do.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import xxhash

from pdcoord.core.blocks import TOKEN_BYTES, chain, pack_tokens, root_key
from pdcoord.core.kvcache import Coverage, EngineHash, KvRemoved, KvStored, Tier
from pdcoord.core.prefix import mark_depth
from pdcoord.core.request import BlockKey

TIER_WEIGHTS = {Tier.GPU: 1.0, Tier.CPU: 0.8, Tier.DISK: 0.5, Tier.REMOTE: 0.3}
"""What a block's tokens count for by the best tier that has it: loading it back costs time as well."""

ENGINE_BLOCK_TOKENS_MAX = 8_192
"""Larger blocks are nobody's: what claims them is not believed."""

STORED_BLOCKS_MAX = 65_536
"""Blocks of one event; what tells more is not believed."""

EVICTED_AT_ONCE = 256
"""Blocks dropped at a time past the bound, so that finding the oldest is paid for by many."""

_TIERS = tuple(Tier)
_GPU, _LOWER = 0, range(1, len(_TIERS))
_LOSS = tuple(1.0 - TIER_WEIGHTS[tier] for tier in _TIERS)


class ExactCount(StrEnum):
    """What is counted of engines' events, in blocks unless it says otherwise; closed, a metric's label."""

    STORED = "stored"
    REMOVED = "removed"
    REPEATED = "repeated"
    CONFLICTING = "conflicting"
    ORPHANED = "orphaned"
    UNKNOWN_REMOVED = "unknown-removed"
    OTHER_GROUP = "other-group"
    EVICTED = "evicted"
    MALFORMED_EVENTS = "malformed-events"
    CLEARED_EVENTS = "cleared-events"
    LOST_EVENTS = "lost-events"


@dataclass(frozen=True, slots=True)
class _Ragged:
    """A block that does not end where one of ours does.

    Attributes:
        keys: of our blocks that end in it; may be none.
        key: the chain's last key.
        pending: packed tokens behind that, fewer than one of our blocks.
    """

    keys: tuple[int, ...]
    key: int
    pending: bytes


# A block's keys of ours, as small as they can be kept: there are millions. One that ends where ours does
# has its one key or all of them, the last of which the chain goes on from.
_Record = int | tuple[int, ...] | _Ragged


@dataclass(slots=True)
class _Shelf:
    """One tier of one endpoint.

    Attributes:
        blocks: by engine hash, least recently stored first.
        copies: how often more than once a block is stored; vLLM does not merge equal blocks and tells the
            storing and the removal of each.
        shared: how many blocks more than one have a key.
    """

    blocks: dict[int, _Record] = field(default_factory=dict)
    copies: dict[int, int] = field(default_factory=dict)
    shared: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Holder:
    """What one endpoint has told.

    Attributes:
        bit: its ordinal as a mask.
        group: KV group that decides; None until one is seen that can.
        coarsest_tokens: size of the largest block told.
        finest_tokens: size of the smallest.
    """

    bit: int
    shelves: tuple[_Shelf, ...] = field(default_factory=lambda: tuple(_Shelf() for _ in _TIERS))
    group: int | None = None
    coarsest_tokens: int = 0
    finest_tokens: int = ENGINE_BLOCK_TOKENS_MAX


class ExactIndex:
    """Blocks of all of a model's endpoints, at most `blocks_max` of them.

    Past the bound the endpoint with the most blocks in a tier loses its least recently stored, those
    matched since then excepted once, so that one that floods drives out its own.

    Attributes:
        block_tokens: tokens of one of our keys.
        counts: of what was taken in, kept and left out.
    """

    def __init__(self, model: str, block_tokens: int, blocks_max: int) -> None:
        self.model = model
        self.block_tokens = block_tokens
        self.blocks_max = blocks_max
        self.counts: Counter[ExactCount] = Counter()
        self._holders: dict[int, _Holder] = {}
        self._masks: tuple[dict[int, int], ...] = tuple({} for _ in _TIERS)
        self._coarse: dict[int, int] = {}
        self._block_count = 0
        self._touched: set[int] = set()

    @property
    def block_count(self) -> int:
        """Engine blocks of all endpoints and tiers; equal blocks of one endpoint and tier count once."""
        return self._block_count

    def ordinals(self) -> set[int]:
        """Of the endpoints that something is known of."""
        return set(self._holders)

    def match(
        self, keys: Sequence[BlockKey], predicted: Mapping[BlockKey, int] | None = None
    ) -> dict[int, float]:
        """Cached blocks of the longest matching prefix by endpoint ordinal, each weighted by its best tier.

        Where an engine's blocks are larger than ours, only as many as make whole ones of its own count.

        Args:
            predicted: masks of ordinals by key, which count as the best tier.
        """
        gpu = self._masks[_GPU]
        lower = [(self._masks[tier], _LOSS[tier]) for tier in _LOWER if self._masks[tier]]
        ahead: Mapping[BlockKey, int] = predicted or {}
        matched: dict[int, int] = {}
        losses: dict[int, float] = {}
        alive, depth = -1, 0
        for key in keys:
            best = gpu.get(key, 0)
            if ahead:
                best |= ahead.get(key, 0)
            held = best
            for masks, _ in lower:
                held |= masks.get(key, 0)
            still = alive & held
            if depth and still != alive:
                mark_depth(matched, alive ^ still, depth)
            alive = still
            if not alive:
                break
            if held != best:
                _note_losses(losses, alive & ~best, key, lower)
            depth += 1
        if depth and alive:
            mark_depth(matched, alive, depth)
        worth = {ordinal: blocks - losses.get(ordinal, 0.0) for ordinal, blocks in matched.items()}
        for ordinal in matched.keys() & self._coarse.keys():
            blocks = matched[ordinal]
            worth[ordinal] *= self._whole_tokens(ordinal, blocks) / (blocks * self.block_tokens)
        return worth

    def depth(self, ordinal: int, keys: Sequence[BlockKey]) -> int:
        """Blocks of the longest prefix that one endpoint holds in any tier."""
        bit = 1 << ordinal
        masks = [each for each in self._masks if each]
        for index, key in enumerate(keys):
            if not any(each.get(key, 0) & bit for each in masks):
                return index
        return len(keys)

    def cached_tokens(self, ordinal: int, keys: Sequence[BlockKey]) -> int:
        """Tokens of the longest prefix that one endpoint can use, whatever the tier."""
        return self._whole_tokens(ordinal, self.depth(ordinal, keys))

    def told_at_once(self, ordinal: int) -> int:
        """Blocks of ours that an endpoint may have computed and not yet told of: up to one of its own."""
        holder = self._holders.get(ordinal)
        return holder.coarsest_tokens // self.block_tokens if holder is not None else 0

    def set_bound(self, blocks_max: int) -> None:
        """Change the bound; what is over it goes now."""
        self.blocks_max = blocks_max
        self._keep_bound()

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Note that these keys were of use, which matters once room gets short."""
        if self._block_count * 2 < self.blocks_max:
            return
        if len(self._touched) > self.blocks_max // 4:
            self._touched.clear()
        self._touched.update(keys)

    def store(self, ordinal: int, event: KvStored) -> None:
        """Take in blocks that an endpoint stored."""
        blocks, tokens = len(event.hashes), len(event.token_ids)
        is_sound = 0 < blocks <= STORED_BLOCKS_MAX and 0 < event.block_tokens <= ENGINE_BLOCK_TOKENS_MAX
        is_sound &= tokens in {0, blocks * event.block_tokens} and len(event.extras) in {0, blocks}
        if not is_sound:
            self.counts[ExactCount.MALFORMED_EVENTS] += 1
            return
        holder = self._holders.get(ordinal)
        if holder is None:
            holder = self._holders[ordinal] = _Holder(1 << ordinal)
        if not _decides(holder, event.group, event.coverage):
            self.counts[ExactCount.OTHER_GROUP] += blocks
            return
        self._note_size(ordinal, holder, event.block_tokens)
        tier = _TIERS.index(event.tier)
        if not tokens:
            records = [_find(holder, block_hash) for block_hash in event.hashes]
        else:
            made = self._records(holder, event)
            if made is None:
                return
            records = [*made]
        # Last block first, so that the front of a prefix, without which the rest is worth nothing, is the
        # youngest of its run.
        for block_hash, record in zip(reversed(event.hashes), reversed(records), strict=True):
            if record is None:
                self.counts[ExactCount.ORPHANED] += 1
            else:
                self._put(holder, tier, block_hash, record)
        self._keep_bound()

    def remove(self, ordinal: int, event: KvRemoved) -> None:
        """Take out blocks that an endpoint removed from one tier."""
        holder = self._holders.get(ordinal)
        if holder is None:
            self.counts[ExactCount.UNKNOWN_REMOVED] += len(event.hashes)
            return
        if event.group != (holder.group or 0):
            self.counts[ExactCount.OTHER_GROUP] += len(event.hashes)
            return
        tier = _TIERS.index(event.tier)
        shelf = holder.shelves[tier]
        for block_hash in event.hashes:
            copies = shelf.copies.get(block_hash, 0)
            if copies:
                _count_down(shelf.copies, block_hash, copies)
            elif block_hash in shelf.blocks:
                self._drop(holder, tier, block_hash)
            else:
                self.counts[ExactCount.UNKNOWN_REMOVED] += 1
                continue
            self.counts[ExactCount.REMOVED] += 1

    def clear(self, ordinal: int, only: Tier | None = None) -> None:
        """Forget what an endpoint holds, in one tier or in all."""
        holder = self._holders.get(ordinal)
        if holder is None:
            return
        for tier, shelf in enumerate(holder.shelves):
            if only is None or _TIERS[tier] is only:
                for block_hash in [*shelf.blocks]:
                    self._drop(holder, tier, block_hash)
                shelf.copies.clear()
        if only is None:
            del self._holders[ordinal]
            self._coarse.pop(ordinal, None)

    def validate(self) -> None:
        """Assert that every table follows from the blocks alone, and that the bound holds."""
        for tier, masks in enumerate(self._masks):
            expected: dict[int, int] = {}
            for holder in self._holders.values():
                shelf = holder.shelves[tier]
                held = Counter(key for record in shelf.blocks.values() for key in _keys(record))
                shared = {key: count - 1 for key, count in held.items() if count > 1}
                assert shelf.shared == shared, "shared keys miscounted"
                assert shelf.copies.keys() <= shelf.blocks.keys(), "a copy of a block that is not there"
                for key in held:
                    expected[key] = expected.get(key, 0) | holder.bit
            assert masks == expected, "keys and blocks disagree"
        sizes = [len(shelf.blocks) for holder in self._holders.values() for shelf in holder.shelves]
        assert self._block_count == sum(sizes), "blocks miscounted"
        assert self._block_count <= self.blocks_max, "more blocks than allowed"

    def _note_size(self, ordinal: int, holder: _Holder, block_tokens: int) -> None:
        holder.coarsest_tokens = max(holder.coarsest_tokens, block_tokens)
        holder.finest_tokens = min(holder.finest_tokens, block_tokens)
        if holder.finest_tokens > self.block_tokens:
            self._coarse[ordinal] = holder.finest_tokens
        else:
            self._coarse.pop(ordinal, None)

    def _whole_tokens(self, ordinal: int, blocks: int) -> int:
        """What an engine can use of so many of our blocks: whole blocks of its own."""
        tokens = blocks * self.block_tokens
        return tokens - tokens % self._coarse.get(ordinal, 1)

    def _records(self, holder: _Holder, event: KvStored) -> Sequence[_Record] | None:
        """The blocks' records; None, and counted, where they cannot be known."""
        if event.parent is None:
            key, pending = root_key(self.model, event.cache_salt, event.lora), b""
        else:
            parent = _find(holder, event.parent)
            if parent is None:
                self.counts[ExactCount.ORPHANED] += len(event.hashes)
                return None
            key, pending = _end_of(parent)
        try:
            tokens = pack_tokens(event.token_ids)
        except (OverflowError, TypeError):
            self.counts[ExactCount.MALFORMED_EVENTS] += 1
            return None
        ours = self.block_tokens
        if pending or event.block_tokens % ours or any(event.extras):
            return self._ragged_records(key, pending, tokens, event)
        keys = chain(key, tokens, ours * TOKEN_BYTES)
        each = event.block_tokens // ours
        if each == 1:
            return keys
        return [keys[at : at + each] for at in range(0, len(keys), each)]

    def _ragged_records(self, key: int, pending: bytes, tokens: bytes, event: KvStored) -> list[_Record]:
        records: list[_Record] = []
        ours, theirs = self.block_tokens * TOKEN_BYTES, event.block_tokens * TOKEN_BYTES
        for index in range(len(event.hashes)):
            if event.extras and event.extras[index]:
                # What else is in the block is in all keys from here on; no plain prompt has them.
                key = xxhash.xxh3_64_intdigest(event.extras[index].encode("utf-8", "surrogatepass"), key)
            data = pending + tokens[index * theirs : (index + 1) * theirs]
            keys = chain(key, data, ours)
            key = keys[-1] if keys else key
            pending = data[len(keys) * ours :]
            records.append(_Ragged(keys, key, pending) if pending or not keys else keys)
        return records

    def _put(self, holder: _Holder, tier: int, block_hash: EngineHash, record: _Record) -> None:
        shelf = holder.shelves[tier]
        before = shelf.blocks.get(block_hash)
        if before is not None:
            if before == record:
                # Stored again: now it is the youngest.
                shelf.blocks[block_hash] = shelf.blocks.pop(block_hash)
                shelf.copies[block_hash] = shelf.copies.get(block_hash, 0) + 1
                self.counts[ExactCount.REPEATED] += 1
                return
            # One name for two prefixes: the later is believed.
            self.counts[ExactCount.CONFLICTING] += 1
            self._drop(holder, tier, block_hash)
        shelf.blocks[block_hash] = record
        self._block_count += 1
        self.counts[ExactCount.STORED] += 1
        masks, bit = self._masks[tier], holder.bit
        for key in _keys(record):
            mask = masks.get(key)
            if mask is None:
                masks[key] = bit
            elif mask & bit:
                shelf.shared[key] = shelf.shared.get(key, 0) + 1
            else:
                masks[key] = mask | bit

    def _drop(self, holder: _Holder, tier: int, block_hash: int) -> None:
        shelf = holder.shelves[tier]
        record = shelf.blocks.pop(block_hash)
        shelf.copies.pop(block_hash, None)
        self._block_count -= 1
        masks, bit = self._masks[tier], holder.bit
        for key in _keys(record):
            shared = shelf.shared.get(key, 0)
            if shared:
                _count_down(shelf.shared, key, shared)
                continue
            left = masks[key] & ~bit
            if left:
                masks[key] = left
            else:
                del masks[key]

    def _keep_bound(self) -> None:
        while self._block_count > self.blocks_max:
            shelves = ((holder, tier) for holder in self._holders.values() for tier in range(len(_TIERS)))
            holder, tier = max(shelves, key=lambda each: len(each[0].shelves[each[1]].blocks))
            blocks = holder.shelves[tier].blocks
            over = max(self._block_count - self.blocks_max, min(EVICTED_AT_ONCE, self.blocks_max // 16))
            oldest = list(itertools.islice(blocks.items(), over))
            spared = [block_hash for block_hash, record in oldest if self._is_touched(record)]
            for block_hash in spared:
                blocks[block_hash] = blocks.pop(block_hash)
            gone = {block_hash for block_hash, _ in oldest}.difference(spared)
            # Where all are of use the oldest go all the same: each is spared once.
            for block_hash in gone or spared:
                self._drop(holder, tier, block_hash)
                self.counts[ExactCount.EVICTED] += 1

    def _is_touched(self, record: _Record) -> bool:
        own = self._touched.intersection(_keys(record))
        self._touched -= own
        return bool(own)


def _decides(holder: _Holder, group: int, coverage: Coverage) -> bool:
    """Whether a group's blocks tell what a hybrid model has cached.

    A prefix can be used only as far as the groups of full attention have it; those that look back no
    further than a window need its end alone, which is there when the rest is. So the first full group
    decides, or group 0 where nothing is said of them.
    """
    if coverage is Coverage.PARTIAL:
        return False
    if holder.group is None and (coverage is Coverage.FULL or group == 0):
        holder.group = group
    return group == holder.group


def _find(holder: _Holder, block_hash: EngineHash) -> _Record | None:
    for shelf in holder.shelves:
        record = shelf.blocks.get(block_hash)
        if record is not None:
            return record
    return None


def _keys(record: _Record) -> tuple[int, ...]:
    if isinstance(record, int):
        return (record,)
    return record.keys if isinstance(record, _Ragged) else record


def _end_of(record: _Record) -> tuple[int, bytes]:
    """The chain's last key, and the tokens behind it."""
    if isinstance(record, int):
        return record, b""
    return (record.key, record.pending) if isinstance(record, _Ragged) else (record[-1], b"")


def _note_losses(
    losses: dict[int, float], bits: int, key: BlockKey, lower: Sequence[tuple[dict[int, int], float]]
) -> None:
    """Charge one block to endpoints that have it in a lower tier alone."""
    for masks, loss in lower:
        own = bits & masks.get(key, 0)
        bits ^= own
        while own:
            lowest = own & -own
            ordinal = lowest.bit_length() - 1
            losses[ordinal] = losses.get(ordinal, 0.0) + loss
            own ^= lowest


def _count_down(counts: dict[int, int], key: int, count: int) -> None:
    if count > 1:
        counts[key] = count - 1
    else:
        del counts[key]
