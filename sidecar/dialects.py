"""Request bodies of the legs, made from the client's own by moving raw JSON values, never re-encoding them.

nixlv2: vLLM 0.32 with NixlConnector, as llm-d's sidecar (llm-d-router ebab6879) speaks it; of the fields
set here vLLM ignores those that an API does not have. pdcoord: vLLM with our connector, both legs at once.
sglang: SGLang 0.5.23 bootstrap fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from pdcoord.protocol.errors import Refusal, RefusedError, RefuseReason
from pdcoord.protocol.headers import parse_host_port
from pdcoord.protocol.openai import ONE_ENGINE_COUNTS, ONE_ENGINE_FLAGS, ROOM_PATHS, Api
from pdcoord.protocol.plans import DialectName, PrefillTarget
from pdcoord.protocol.tickets import (
    NESTED_DEPTH_MAX,
    NESTED_FIELDS,
    PAIRING_FIELD,
    PREFILL_TICKET,
    TICKET_FIELD,
    Pairing,
    Ticket,
    decode_pairing,
    is_steering,
)

Fields = dict[str, msgspec.Raw]
"""The members of a JSON object, by name, each value as the raw bytes that were sent."""

_MARKERS = (b"_transfer_params", b"bootstrap_")

_fields_decoder = msgspec.json.Decoder(Fields)
_ONE = msgspec.Raw(b"1")
_FALSE = msgspec.Raw(b"false")
_PREFILL_TICKET = msgspec.Raw(msgspec.json.encode(PREFILL_TICKET))


@dataclass(frozen=True, slots=True)
class ClientBody:
    """A generative call's body, read as far as the legs need it.

    Attributes:
        raw: the body as it may be sent to an engine: the client's own bytes, or those without the
            members that no client may set.
        unsplittable: why this call must stay on one engine whoever asks for a split; empty if it need not.
    """

    api: Api
    raw: bytes
    fields: Fields
    is_stream: bool
    unsplittable: str

    def splittable_in(self, dialect: DialectName) -> bool:
        if self.unsplittable:
            return False
        return dialect is not DialectName.SGLANG or self.api.path in ROOM_PATHS


def read_body(api: Api, raw: bytes, *, is_prefill_leg: bool = False) -> ClientBody:
    """Read a generative call's body.

    Args:
        is_prefill_leg: another sidecar sends it, and its request for a ticket may stay. A ticket itself
            may not: only what names no host is let through.

    Raises:
        RefusedError: 400, if it is not one JSON object. What the members hold is left to the engine.
    """
    fields = _decode(raw)
    kept = _without_forbidden(fields, raw)
    if is_prefill_leg and kept is not fields:
        kept |= _asked_for(fields)
    return ClientBody(
        api=api,
        raw=raw if kept is fields else _encode(kept),
        fields=kept,
        is_stream=_is_true(kept, "stream"),
        unsplittable=_unsplittable(api, kept),
    )


def scrub(raw: bytes, content_type: bytes) -> bytes:
    """The body of a call that is passed through, without the members that no client may set.

    Raises:
        RefusedError: 400, if it may hold one and cannot be read.
    """
    if not raw or content_type.lower().startswith(b"multipart/") or not _may_hold_forbidden(raw):
        return raw
    try:
        fields = _decode(raw)
    except RefusedError as error:
        if error.refusal.reason is RefuseReason.INVALID_FIELD:
            return raw  # A JSON value that is no object has no members.
        raise
    kept = _without_forbidden(fields, raw)
    return raw if kept is fields else _encode(kept)


def nixlv2_prefill(body: ClientBody) -> bytes:
    """The client's call as a prefill leg: one token, not streamed, with a request for a ticket."""
    return _encode(_unstreamed(body) | dict.fromkeys(body.api.token_limit_fields, _ONE) | _ASK)


def nixlv2_decode(body: ClientBody, ticket: Ticket) -> bytes:
    """The client's call as a decode leg: its own bytes with the ticket put in, to the byte."""
    return _splice(body, b'"%b":%b' % (TICKET_FIELD.encode(), ticket))


def pdcoord_prefill(body: ClientBody, pairing: Pairing) -> bytes:
    """The client's call as a prefill leg whose KV is fetched while it is computed."""
    return _encode(_unstreamed(body) | dict.fromkeys(body.api.token_limit_fields, _ONE) | _ask_as(pairing))


def pdcoord_decode(body: ClientBody, peer: PrefillTarget, pairing: Pairing, *, kv_port: int) -> bytes:
    """The client's call as the decode leg beside it: its own bytes with the place to fetch from put in.

    Args:
        kv_port: of a target that names none.
    """
    host, _ = parse_host_port(peer.address)
    told = pairing.told(host, kv_port if peer.kv_port is None else peer.kv_port)
    return _splice(body, b'"%b":%b' % (TICKET_FIELD.encode(), msgspec.json.encode(told)))


def sglang_prefill(body: ClientBody, peer: PrefillTarget, *, bootstrap_port: int, room: int) -> bytes:
    """The client's call as SGLang's prefill leg.

    It is not streamed, so that its status tells whether the prefill went well.
    """
    members = _bootstrap(peer, bootstrap_port, room)
    return _encode(_unstreamed(body) | {name: msgspec.Raw(value) for name, value in members.items()})


def sglang_decode(body: ClientBody, peer: PrefillTarget, *, bootstrap_port: int, room: int) -> bytes:
    """The client's call as SGLang's decode leg: its own bytes with the rendezvous put in."""
    members = _bootstrap(peer, bootstrap_port, room)
    return _splice(body, b",".join(b'"%b":%b' % (name.encode(), value) for name, value in members.items()))


_ASK: Fields = {TICKET_FIELD: _PREFILL_TICKET}


def _ask_as(pairing: Pairing) -> Fields:
    return {TICKET_FIELD: msgspec.Raw(msgspec.json.encode(pairing.asked()))}


def _bootstrap(peer: PrefillTarget, default_port: int, room: int) -> dict[str, bytes]:
    host, _ = parse_host_port(peer.address)
    port = default_port if peer.bootstrap_port is None else peer.bootstrap_port
    return {
        "bootstrap_host": msgspec.json.encode(f"[{host}]" if ":" in host else host),
        "bootstrap_port": b"%d" % port,
        "bootstrap_room": b"%d" % room,
    }


def _unstreamed(body: ClientBody) -> Fields:
    fields = {name: value for name, value in body.fields.items() if name != "stream_options"}
    fields["stream"] = _FALSE
    if "store" in fields:
        fields["store"] = _FALSE  # /v1/responses: the prefill engine must not keep an answer of one token.
    return fields


def _decode(raw: bytes) -> Fields:
    try:
        return _fields_decoder.decode(raw)
    except msgspec.ValidationError as error:
        refusal = Refusal(RefuseReason.INVALID_FIELD, "The body is not a JSON object; send one.")
        raise RefusedError(refusal) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        where = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        refusal = Refusal(RefuseReason.MALFORMED_JSON, f"The body is not valid JSON: {where}.")
        raise RefusedError(refusal) from error


def _encode(fields: Mapping[str, msgspec.Raw]) -> bytes:
    return msgspec.json.encode(fields)


def _splice(body: ClientBody, members: bytes) -> bytes:
    """Put members first in the object; safe because the body has none of the same name."""
    start = body.raw.index(b"{") + 1
    separator = b"," if body.fields else b""
    return b"".join((body.raw[:start], members, separator, body.raw[start:]))


def _may_hold_forbidden(raw: bytes) -> bool:
    # A name can be written with \u escapes, and an engine may read UTF-16 or -32, which has zero bytes.
    return any(marker in raw for marker in _MARKERS) or b"\\u" in raw or b"\0" in raw


def _without_forbidden(fields: Fields, raw: bytes, depth: int = 0) -> Fields:
    """The same object if there is nothing to take out, else another."""
    if not _may_hold_forbidden(raw):
        return fields
    changed: Fields = {}
    if depth < NESTED_DEPTH_MAX:
        for name in NESTED_FIELDS:
            value = bytes(fields.get(name, b""))
            inner = _inner(value)
            kept = _without_forbidden(inner, value, depth + 1)
            if kept is not inner:
                changed[name] = msgspec.Raw(_encode(kept))
    if not changed and not any(map(is_steering, fields)):
        return fields
    return {name: changed.get(name, value) for name, value in fields.items() if not is_steering(name)}


def _inner(value: bytes) -> Fields:
    """The members of a nested object; none if it is anything else."""
    try:
        return _fields_decoder.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}


def _asked_for(fields: Fields) -> Fields:
    """The request for a ticket, if kv_transfer_params says no more than one does; else nothing."""
    asked = _inner(bytes(fields.get(TICKET_FIELD, b"")))
    said = {name: bytes(value) for name, value in asked.items() if bytes(value) not in {b"null", b"false"}}
    raw_pairing = said.pop(PAIRING_FIELD, None)
    if said != {"do_remote_decode": b"true"}:
        return {}
    if raw_pairing is None:
        return _ASK
    pairing = decode_pairing(raw_pairing)
    return {} if pairing is None else _ask_as(pairing)


def _is_true(fields: Fields, name: str) -> bool:
    value = fields.get(name)
    return value is not None and bytes(value) == b"true"


def _is_set(fields: Fields, name: str) -> bool:
    value = fields.get(name)
    return value is not None and bytes(value) not in {b"null", b"false"}


def _unsplittable(api: Api, fields: Fields) -> str:
    """The field that keeps a call on one engine; empty if none does."""
    for name in ONE_ENGINE_COUNTS:
        count = fields.get(name)
        if count is not None and bytes(count) not in {b"null", b"1"}:
            return name
    for name in ONE_ENGINE_FLAGS:
        if _is_set(fields, name):
            return name
    if api.path == "/v1/completions" and _has_many_prompts(fields):
        return "prompt"
    return ""


def _has_many_prompts(fields: Fields) -> bool:
    value = bytes(fields.get("prompt", msgspec.Raw(b"null")))
    if not value.startswith(b"["):
        return not value.startswith(b'"')
    try:
        items = msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return True
    is_one_prompt_of_ids = bool(items) and isinstance(items[0], int)
    return not is_one_prompt_of_ids and len(items) != 1
