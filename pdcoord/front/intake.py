"""From a client's call to the core's request: identity, size, checks and block keys; pure."""

import math
from collections.abc import Sequence

from pdcoord.core.blocks import block_keys, token_keys
from pdcoord.core.fleet import EngineKind
from pdcoord.core.model import Model
from pdcoord.core.request import BlockKey, Request, RequestId
from pdcoord.front.asked import NOTHING_ASKED, Asked
from pdcoord.front.keys import shows_key
from pdcoord.protocol.errors import Refusal, RefusedError, RefuseReason
from pdcoord.protocol.headers import REQUEST_ID, is_request_id
from pdcoord.protocol.openai import ROOM_PATHS, Body, Call
from pdcoord.protocol.tickets import NESTED_DEPTH_MAX, NESTED_FIELDS, TICKET_FIELD, is_steering

_TOKEN_ID_BYTES = 4
_MODEL_SHOWN_MAX = 128

RESERVED_FIELDS = (
    TICKET_FIELD,
    "ec_transfer_params",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
)
"""The steering fields that engines have today; `tickets.is_steering` says which names are."""


def client_request_id(headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """The client's own x-request-id if it is fit to be passed on and logged; else None.

    One with a key in it is not: logs, decisions and engines have it.
    """
    for name, value in headers:
        if name == REQUEST_ID and is_request_id(value):
            return None if shows_key(value, headers) else value.decode("ascii")
    return None


def check_reserved(call: Call) -> None:
    """Refuse a body that tries to steer KV transfers.

    Raises:
        RefusedError: 400 naming the field.
    """
    name = _steering_field(call.body, 0)
    if name is not None:
        message = f"'{name}' is reserved for transfers inside the fleet; remove it."
        raise RefusedError(Refusal(RefuseReason.INVALID_FIELD, message, name))


def _steering_field(body: Body, depth: int) -> str | None:
    for name, value in body.items():
        if value is not None and is_steering(name):
            return name
        if name in NESTED_FIELDS and depth < NESTED_DEPTH_MAX and isinstance(value, dict):
            inner = _steering_field(value, depth + 1)
            if inner is not None:
                return f"{name}.{inner}"
    return None


def model_unknown(name: str) -> Refusal:
    shown = name if len(name) <= _MODEL_SHOWN_MAX else f"{name[:_MODEL_SHOWN_MAX]}..."
    message = f"The model '{shown}' does not exist; GET /v1/models lists those that do."
    return Refusal(RefuseReason.MODEL_UNKNOWN, message, "model")


def build_request(
    request_id: RequestId,
    call: Call,
    model: Model,
    token_ids: Sequence[int] | None = None,
    asked: Asked = NOTHING_ASKED,
) -> Request:
    """What routing needs to know of a call.

    Prompt tokens are exact where the prompt came as token ids, else estimated from its bytes. Only a
    generative call has block keys: no other one leaves a prefix behind that could be reused.

    Args:
        token_ids: the prompt's, where they are known: then its length is exact and it has token keys.
    """
    is_exact = call.prompt_token_count is not None
    block_bytes = model.prefix_block_tokens * _TOKEN_ID_BYTES if is_exact else model.prefix_block_bytes
    salt, adapter = call.cache_salt, model.adapter_of(call.model)
    keys: tuple[BlockKey, ...] = ()
    if call.api.is_generative:
        keys = block_keys(
            call.prompt, model=model.name, cache_salt=salt, lora=adapter, block_bytes=block_bytes
        )
    grain = model.precise_block_tokens
    exact: tuple[BlockKey, ...] = ()
    if token_ids is not None:
        exact = token_keys(token_ids, model=model.name, cache_salt=salt, lora=adapter, block_tokens=grain)
    has_rooms = any(pool.engine is EngineKind.SGLANG for pool in model.pools)
    is_carried = call.api.path in ROOM_PATHS or not has_rooms
    return Request(
        id=request_id,
        model=model.name,
        prompt_tokens=_prompt_tokens(call, model, token_ids),
        block_keys=keys,
        block_tokens=model.prefix_block_tokens,
        output_tokens_max=call.output_tokens_max,
        choice_count=call.choice_count,
        is_splittable=is_carried and not call.one_engine_field,
        is_generative=call.api.is_generative,
        is_streamed=call.is_stream,
        is_prompt_counted=is_exact or token_ids is not None,
        tenant=asked.tenant,
        priority=asked.priority(model),
        slo=asked.slo,
        token_keys=exact,
        token_block_tokens=grain,
        adapter=adapter,
    )


def _prompt_tokens(call: Call, model: Model, token_ids: Sequence[int] | None) -> int:
    if token_ids is not None:
        return len(token_ids)
    if call.prompt_token_count is not None:
        return call.prompt_token_count
    return math.ceil(len(call.prompt) / model.bytes_per_token)
