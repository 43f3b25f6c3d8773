"""Layouts, parts and messages as they travel on the side channel, to and from the words of a session."""

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

from transfer.canonical import PartShape, TokenRange
from transfer.errors import Failure, LayoutError
from transfer.layout import (
    GroupShape,
    HeadRange,
    KvDtype,
    KvLayout,
    KvSplit,
    LayerScales,
    Order,
    RankLayout,
)
from transfer.session.bounds import (
    BLOCK_TOKENS_MAX,
    DIM_MAX,
    GROUPS_MAX,
    HEADS_MAX,
    LAYERS_MAX,
    RANKS_MAX,
    TEXT_CHARS_MAX,
    TOKENS_MAX,
    WAIT_S_MAX,
)
from transfer.session.messages import Denial, Done, Fetch, Layout, Message, Offer, Renewal, WirePart
from transfer.session.vocabulary import (
    Denied,
    DoneHeard,
    FetchAsked,
    Offered,
    Proof,
    RenewAsked,
    SendDenial,
    SendDone,
    SendFetch,
    SendOffer,
    SendRenewal,
    StagedPart,
    TransferId,
)

_Enum = TypeVar("_Enum", bound=StrEnum)

_SCALE_MAX = 1e30
"""No fp8 scale comes near it, and its product with any fp8 number is a finite float32."""


# Layouts.


def rank_layout_to_wire(layout: RankLayout) -> Layout:
    """A RankLayout as a map of plain values, for Hello and Welcome."""
    own = layout.layout
    return {
        "layout": {
            "block_tokens": own.block_tokens,
            "order": str(own.order),
            "dtype": str(own.dtype),
            "tensor_parallel": own.tensor_parallel,
            "tiling": own.tiling,
            "split": str(own.split),
            "head_dim_multiple": own.head_dim_multiple,
        },
        "rank": layout.rank,
        "groups": [
            {
                "layer_count": g.layer_count,
                "kv_heads": g.kv_heads,
                "key_dim": g.key_dim,
                "value_dim": g.value_dim,
                "window_tokens": g.window_tokens,
            }
            for g in layout.groups
        ],
        "scales": [[[s.key, s.value] for s in group] for group in layout.scales],
        "model": layout.model,
    }


def rank_layout_from_wire(wire: object) -> RankLayout:
    """The RankLayout that a peer tells of.

    Raises:
        LayoutError: if a field is missing, unknown, of another type, out of bounds, or not one of the values
            this version knows.
    """
    top = _fields(wire, "layout", {"layout", "rank", "groups", "scales", "model"})
    groups = _items(top["groups"], "groups", GROUPS_MAX)
    scales = _items(top["scales"], "scales", GROUPS_MAX)
    return RankLayout(
        layout=_kv_layout(top["layout"]),
        rank=_whole(top["rank"], "rank", 0, RANKS_MAX - 1),
        groups=tuple(_group(group) for group in groups),
        scales=tuple(
            tuple(_layer_scales(pair) for pair in _items(group, "scales", LAYERS_MAX)) for group in scales
        ),
        model=_text(top["model"], "model"),
    )


def _kv_layout(wire: object) -> KvLayout:
    names = {"block_tokens", "order", "dtype", "tensor_parallel", "tiling", "split", "head_dim_multiple"}
    own = _fields(wire, "layout", names)
    return KvLayout(
        block_tokens=_whole(own["block_tokens"], "block_tokens", 1, BLOCK_TOKENS_MAX),
        order=_member(Order, own["order"], "order"),
        dtype=_member(KvDtype, own["dtype"], "dtype"),
        tensor_parallel=_whole(own["tensor_parallel"], "tensor_parallel", 1, RANKS_MAX),
        tiling=_text(own["tiling"], "tiling"),
        split=_member(KvSplit, own["split"], "split"),
        head_dim_multiple=_whole(own["head_dim_multiple"], "head_dim_multiple", 1, DIM_MAX),
    )


def _group(wire: object) -> GroupShape:
    own = _fields(wire, "groups", {"layer_count", "kv_heads", "key_dim", "value_dim", "window_tokens"})
    window = own["window_tokens"]
    return GroupShape(
        layer_count=_whole(own["layer_count"], "layer_count", 1, LAYERS_MAX),
        kv_heads=_whole(own["kv_heads"], "kv_heads", 1, HEADS_MAX),
        key_dim=_whole(own["key_dim"], "key_dim", 1, DIM_MAX),
        value_dim=_whole(own["value_dim"], "value_dim", 0, DIM_MAX),
        window_tokens=None if window is None else _whole(window, "window_tokens", 1, TOKENS_MAX),
    )


def _layer_scales(wire: object) -> LayerScales:
    pair = _items(wire, "scales", 2)
    if len(pair) != 2:
        raise LayoutError("scales", len(pair), "a pair of numbers for each layer, of keys and of values")
    return LayerScales(key=_scale(pair[0]), value=_scale(pair[1]))


def _fields(wire: object, field: str, names: set[str]) -> Mapping[str, object]:
    """A map with exactly these keys; names of unknown keys are not repeated, they may be anything."""
    if not isinstance(wire, dict):
        raise LayoutError(field, type(wire).__name__, "a map")
    missing = sorted(names - wire.keys())
    if missing or len(wire) != len(names):
        raise LayoutError(field, f"{len(wire)} fields without {missing}", f"exactly {sorted(names)}")
    return wire


def _items(wire: object, field: str, count_max: int) -> list[object]:
    if not isinstance(wire, list | tuple) or len(wire) > count_max:
        raise LayoutError(field, type(wire).__name__, f"a list of at most {count_max}")
    return list(wire)


def _whole(wire: object, field: str, least: int, most: int) -> int:
    if not isinstance(wire, int) or isinstance(wire, bool) or not least <= wire <= most:
        raise LayoutError(field, _brief(wire), f"a whole number in {least}..{most}")
    return wire


def _text(wire: object, field: str) -> str:
    if not isinstance(wire, str) or len(wire) > TEXT_CHARS_MAX:
        raise LayoutError(field, _brief(wire), f"text of at most {TEXT_CHARS_MAX} characters")
    return wire


def _scale(wire: object) -> float:
    if isinstance(wire, int | float) and not isinstance(wire, bool) and 0 < wire <= _SCALE_MAX:
        return float(wire)
    raise LayoutError("scales", _brief(wire), "finite numbers above 0")


def _member(members: type[_Enum], wire: object, field: str) -> _Enum:
    for member in members:
        if member == wire:
            return member
    raise LayoutError(field, _brief(wire), f"one of {', '.join(members)}")


def _brief(wire: object) -> object:
    """A value as an error shows it: a peer's own long text is not repeated."""
    if wire is None or isinstance(wire, bool | float):
        return wire
    if isinstance(wire, int):
        return wire if abs(wire) < 1 << 64 else "a huge number"
    return wire[:64] if isinstance(wire, str) else type(wire).__name__


# Parts, actions and events.


def part_to_wire(part: StagedPart) -> WirePart:
    shape = part.shape
    return WirePart(
        form=shape.form,
        group=shape.group,
        head_first=shape.heads.first,
        head_count=shape.heads.count,
        token_first=shape.tokens.first,
        token_count=shape.tokens.count,
        offset=part.offset,
        length_bytes=part.length_bytes,
        digest=part.digest,
    )


def part_from_wire(part: WirePart) -> StagedPart:
    """The part itself; that it fits the layout, the prompt and the staging buffer is the Inbox's to check."""
    shape = PartShape(
        form=part.form,
        group=part.group,
        heads=HeadRange(part.head_first, part.head_count),
        tokens=TokenRange(part.token_first, part.token_count),
    )
    return StagedPart(shape, part.offset, part.length_bytes, part.digest)


def message_of(action: SendFetch | SendOffer | SendDenial | SendDone | SendRenewal) -> Message:
    """What an action says on the side channel."""
    match action:
        case SendFetch():
            return Fetch(
                transfer=action.transfer,
                nonce=action.proof.nonce,
                prompt_hash=action.proof.prompt_hash,
                first_token=action.first_token,
                reader_count=action.reader_count,
                wait_s=min(max(action.wait_s, 0.0), WAIT_S_MAX),
            )
        case SendOffer():
            parts = tuple(part_to_wire(part) for part in action.parts)
            return Offer(
                transfer=action.transfer,
                parts=parts,
                token_count=action.token_count,
                is_last=action.is_last,
            )
        case SendDenial():
            failure = action.failure
            detail = failure.detail[:TEXT_CHARS_MAX]
            return Denial(transfer=action.transfer, kind=failure.kind, detail=detail)
        case SendDone():
            return Done(
                transfer=action.transfer,
                nonce=action.proof.nonce,
                prompt_hash=action.proof.prompt_hash,
                reader_count=action.reader_count,
            )
        case SendRenewal():
            return Renewal(transfers=action.transfers)


def outbox_event(
    consumer: str, message: Fetch | Renewal | Done, *, is_layout_equal: bool
) -> FetchAsked | RenewAsked | DoneHeard:
    """What a consumer said, as the Outbox hears it.

    Args:
        consumer: names the connection it came over.
        message: what `frames.Channel` decoded, so it is within bounds.
        is_layout_equal: whether the consumer rank's Hello told of the very layout of this rank.
    """
    match message:
        case Fetch():
            proof = Proof(message.nonce, message.prompt_hash)
            return FetchAsked(
                consumer,
                TransferId(message.transfer),
                proof,
                message.first_token,
                message.reader_count,
                is_layout_equal,
                message.wait_s,
            )
        case Renewal():
            return RenewAsked(consumer, tuple(TransferId(t) for t in message.transfers))
        case Done():
            proof = Proof(message.nonce, message.prompt_hash)
            return DoneHeard(consumer, TransferId(message.transfer), proof, message.reader_count)


def inbox_event(source: str, message: Offer | Denial) -> Offered | Denied:
    """What a source said, as the Inbox hears it; `source` names the connection it came over."""
    match message:
        case Offer():
            parts = tuple(part_from_wire(part) for part in message.parts)
            return Offered(source, TransferId(message.transfer), parts, message.token_count, message.is_last)
        case Denial():
            return Denied(source, TransferId(message.transfer), Failure(message.kind, message.detail))
