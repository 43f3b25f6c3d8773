"""The JSON of KV hand-over: what a prefill leg asks, what it answers, what a decode leg is given.

nixlv2: vLLM 0.32 NixlConnector, `kv_transfer_params` (connector version 14), as llm-d's sidecar
(llm-d-router ebab6879) speaks it. pdcoord: the same names and one member more, `pdcoord`, version 1.
sglang: SGLang 0.5.23 bootstrap fields.
"""

import re
from dataclasses import dataclass, field
from typing import Any, NewType

import msgspec

from pdcoord.protocol.headers import format_host_port

Ticket = NewType("Ticket", bytes)
"""An engine's `kv_transfer_params` as raw JSON: passed on to the byte, never looked into."""

TICKET_FIELD = "kv_transfer_params"

PREFILL_TICKET: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What a nixlv2 prefill leg carries in place of a ticket."""

PAIRING_FIELD = "pdcoord"
PAIRING_VERSION = 1
PAIRING_ID_BITS = 128
_PAIRING_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Pairing:
    """What pairs the two legs of one attempt where both are sent at once; drawn anew for each attempt.

    Attributes:
        transfer: names the transfer, 32 hex digits.
        nonce: proves to the producer that a consumer may have it, 32 hex digits; never logged.
    """

    transfer: str
    nonce: str = field(repr=False)

    def asked(self) -> dict[str, Any]:
        """What the prefill leg carries in place of a ticket."""
        return {**PREFILL_TICKET, PAIRING_FIELD: self._member()}

    def told(self, host: str, kv_port: int) -> dict[str, Any]:
        """What the decode leg carries: where to fetch what the prefill leg is computing.

        Args:
            host: of the prefill engine; an IPv6 address without brackets.
        """
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_host": host,
            "remote_port": kv_port,
            PAIRING_FIELD: {**self._member(), "address": format_host_port(host, kv_port)},
        }

    def _member(self) -> dict[str, Any]:
        return {"version": PAIRING_VERSION, "transfer": self.transfer, "nonce": self.nonce}


class _PairingBody(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    transfer: str
    nonce: str


_pairing_decoder = msgspec.json.Decoder(_PairingBody)


def decode_pairing(raw: bytes) -> Pairing | None:
    """The pairing of a prefill leg's `kv_transfer_params`; None if it is not exactly one of this version."""
    try:
        body = _pairing_decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    is_sound = body.version == PAIRING_VERSION and all(
        map(_PAIRING_ID.fullmatch, (body.transfer, body.nonce))
    )
    return Pairing(body.transfer, body.nonce) if is_sound else None


_STEERING_FIELDS = frozenset({TICKET_FIELD, "ec_transfer_params"})
_STEERING_PREFIX = "bootstrap_"

NESTED_FIELDS = ("vllm_xargs", "sampling_params", "extra_args")
"""Members in which vLLM 0.32 looks for further parameters; the last two of /inference/v1/generate."""
NESTED_DEPTH_MAX = 2


def is_steering(field: str) -> bool:
    """Whether a body field tells an engine where to fetch KV from.

    From a client it could make an engine connect anywhere, read another request's KV, or end: vLLM 0.32
    dies of some malformed tickets. Only a sidecar may set one.
    """
    return field in _STEERING_FIELDS or field.startswith(_STEERING_PREFIX)


ROOM_MAX = 2**63 - 1
"""SGLang keeps `bootstrap_room` in a signed 64-bit integer."""


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens_details: _PromptDetails | None = None
    input_tokens_details: _PromptDetails | None = None
    cache_read_input_tokens: int | None = None


class _PrefillAnswer(msgspec.Struct):
    # Raw alone: in a union with None msgspec would take null only.
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")
    usage: _Usage | None = None


class PrefillAnswer(msgspec.Struct, frozen=True):
    """What matters of a prefill leg's 200 body.

    Attributes:
        ticket: None if the engine gave none or an empty one, which must not pass as success.
        cached_tokens: prompt tokens the prefill engine had cached, if it says.
    """

    ticket: Ticket | None
    cached_tokens: int | None


_JSON_SPACE = b" \t\r\n"
_answer_decoder = msgspec.json.Decoder(_PrefillAnswer)


def decode_prefill_answer(raw: bytes) -> PrefillAnswer:
    """Read a prefill leg's body.

    Raises:
        ValueError: if it is not the JSON object an engine answers with.
    """
    try:
        answer = _answer_decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"prefill answer: {error}") from error
    ticket = bytes(answer.kv_transfer_params).strip(_JSON_SPACE)
    if ticket != b"null" and not ticket.startswith(b"{"):
        raise ValueError("prefill answer: kv_transfer_params is neither an object nor null")
    has_ticket = ticket != b"null" and ticket[1:-1].strip(_JSON_SPACE) != b""
    return PrefillAnswer(
        ticket=Ticket(ticket) if has_ticket else None,
        cached_tokens=_cached_tokens(answer.usage),
    )


def _cached_tokens(usage: _Usage | None) -> int | None:
    if usage is None:
        return None
    for details in (usage.prompt_tokens_details, usage.input_tokens_details):
        if details is not None and details.cached_tokens is not None:
            return details.cached_tokens
    return usage.cache_read_input_tokens
