"""Simulated prefix caches in the words of real ones: KV events and token keys made from a workload's keys."""

from collections.abc import Iterator, Sequence

from pdcoord.core.blocks import chain, pack_tokens, root_key
from pdcoord.core.fleet import EndpointId
from pdcoord.core.kvcache import EngineHash, KvRemoved, KvStored
from pdcoord.core.request import BlockKey

KEYS_MAX = 1_000_000
"""Keys remembered; the one learned longest ago is forgotten, and what is told of it is not understood."""
_WORD = 0xFFFF_FFFF


class KvWords:
    """Stands a made-up run of token ids in for each key, the same wherever the key occurs."""

    def __init__(self, model: str, key_tokens: int) -> None:
        if key_tokens < 2:
            raise ValueError(f"key_tokens is {key_tokens}, expected at least 2")
        self._key_tokens = key_tokens
        self._seed = root_key(model, "", "")
        self._rest = (0,) * (key_tokens - 2)
        # The key before it in its chain, None at the beginning; and the coordinator's own key.
        self._known: dict[int, tuple[int | None, BlockKey]] = {}

    def _tokens(self, key: int) -> tuple[int, ...]:
        return key & _WORD, key >> 32 & _WORD, *self._rest

    def token_keys(self, keys: Sequence[int]) -> tuple[BlockKey, ...]:
        """The coordinator's keys of a chain, which is known from then on."""
        known = self._known
        found: list[BlockKey] = []
        parent: int | None = None
        for key in keys:
            entry = known.get(key)
            if entry is None:
                before = found[-1] if found else self._seed
                packed = pack_tokens(self._tokens(key))
                entry = known[key] = parent, chain(before, packed, len(packed))[0]
            found.append(entry[1])
            parent = key
        while len(known) > KEYS_MAX:
            del known[next(iter(known))]
        return tuple(found)

    def stored(self, endpoint_id: EndpointId, keys: Sequence[int]) -> Iterator[KvStored]:
        """What an engine would say that has stored these, one event for each run of a chain."""
        run: list[int] = []
        parent: int | None = None
        for key in keys:
            entry = self._known.get(key)
            if run and (entry is None or entry[0] != run[-1]):
                yield self._event(endpoint_id, parent, run)
                run = []
            if entry is not None:
                parent = parent if run else entry[0]
                run.append(key)
        if run:
            yield self._event(endpoint_id, parent, run)

    def _event(self, endpoint_id: EndpointId, parent: int | None, run: list[int]) -> KvStored:
        token_ids: list[int] = []
        for key in run:
            token_ids += self._tokens(key)
        return KvStored(
            id=endpoint_id,
            parent=None if parent is None else _hash(parent),
            hashes=tuple(map(_hash, run)),
            token_ids=tuple(token_ids),
            block_tokens=self._key_tokens,
        )

    def removed(self, endpoint_id: EndpointId, keys: Sequence[int]) -> KvRemoved:
        """What it would say that has evicted these."""
        return KvRemoved(endpoint_id, tuple(map(_hash, keys)))


def _hash(key: int) -> EngineHash:
    return EngineHash(key & 0xFFFF_FFFF_FFFF_FFFF)
