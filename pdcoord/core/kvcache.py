"""What an engine tells of its prefix cache: the signals that the exact prefix index lives on."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

from pdcoord.core.fleet import EndpointId

EngineHash = NewType("EngineHash", int)
"""An engine's own name of a block, 64 bits: all of an int hash, the last 8 bytes of a longer one."""


class Tier(StrEnum):
    """Where an engine keeps a block; closed, best first."""

    GPU = "gpu"
    CPU = "cpu"
    DISK = "disk"
    REMOTE = "remote"


class Coverage(StrEnum):
    """What a KV group of a hybrid model remembers of a prompt."""

    FULL = "full"
    PARTIAL = "partial"
    UNSAID = "unsaid"


@dataclass(frozen=True, slots=True)
class KvStored:
    """A run of blocks can now be found by hash.

    Attributes:
        parent: hash of the block before the first; None where the run begins a prompt.
        hashes: one for each block, in order.
        token_ids: of all blocks together; empty where the same blocks are known from another tier.
        block_tokens: in each block, as the engine counts them here.
        lora: name of the adapter, "" for none.
        cache_salt: of the prompt that the run begins, "" for none; a run with a parent has its parent's.
        extras: what else the engine hashed into each block (images and such), "" for nothing; empty where no
            block has any.
        group: KV group of a hybrid model; 0 where there is only one.
        coverage: of that group; a group of partial coverage (sliding window, state space) never decides.
    """

    id: EndpointId
    parent: EngineHash | None
    hashes: tuple[EngineHash, ...]
    token_ids: tuple[int, ...]
    block_tokens: int
    lora: str = ""
    cache_salt: str = ""
    extras: tuple[str, ...] = ()
    tier: Tier = Tier.GPU
    group: int = 0
    coverage: Coverage = Coverage.UNSAID


@dataclass(frozen=True, slots=True)
class KvRemoved:
    """Blocks were evicted from one tier."""

    id: EndpointId
    hashes: tuple[EngineHash, ...]
    tier: Tier = Tier.GPU
    group: int = 0


@dataclass(frozen=True, slots=True)
class KvCleared:
    """The engine emptied its prefix cache, or is about to tell all of it: what follows is everything.

    Attributes:
        tier: the only one that was emptied; None for all.
    """

    id: EndpointId
    tier: Tier | None = None


@dataclass(frozen=True, slots=True)
class KvLost:
    """Events were missed for good: nothing is certain of this cache until it is cleared."""

    id: EndpointId


KvSignal = KvStored | KvRemoved | KvCleared | KvLost
