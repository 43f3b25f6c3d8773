"""The JSON of KV hand-over: what a prefill leg asks, what it answers, what a decode leg is given.

nixlv2: vLLM 0.32 NixlConnector, `kv_transfer_params` (connector version 14), as llm-d's sidecar
(llm-d-router ebab6879) speaks it. sglang: SGLang 0.5.23 bootstrap fields.
"""

from typing import Any, NewType

import msgspec

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
