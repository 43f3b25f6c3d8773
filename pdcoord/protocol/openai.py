"""What each OpenAI-compatible call looks like, as far as routing and splitting need to know it.

Field names: OpenAI API reference (2026-11), Anthropic Messages (2023-06-01), vLLM 0.32 for
/tokenize, /detokenize, /rerank and /score.
"""

import struct
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from pdcoord.protocol.errors import Refusal, RefusedError, RefuseReason
from pdcoord.protocol.headers import CACHE_SALT_FIELD

Body = dict[str, Any]
T = TypeVar("T")
TOKEN_ID_MAX = 2**31 - 1
CHOICE_COUNT_MAX = 1_024
TOKEN_IDS_MAX = 1 << 20
"""Token ids in one call: past it reading them would hold up every stream, and no engine takes as many."""

ONE_ENGINE_COUNTS = ("n", "best_of")
ONE_ENGINE_FLAGS = (
    "use_beam_search",
    "prompt_logprobs",
    "echo",
    "prompt_embeds",
    "background",
    "previous_response_id",
    "previous_input_messages",
)
"""Fields that keep a call on one engine: more than one answer, something returned for prompt tokens, or
state of an engine's own. A ticket stands for one prompt and one answer."""

ROOM_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Calls on which SGLang 0.5.23 takes a bootstrap room; all others stay on one engine there."""
SHOWN_CHARS_MAX = 32
"""A longer number is described, not repeated: JSON bounds no number's length."""


@dataclass(frozen=True, slots=True)
class Api:
    """One call of the API.

    Attributes:
        path: as the client sends it.
        is_generative: whether it has a decode phase; only such calls can be split.
        prompt_fields: body fields whose content is the prompt, in the order an engine renders them.
        token_limit_fields: body fields that bound the output; a prefill leg sets each it names to 1.
        required: fields without which the call is malformed; one of each inner tuple must be there.
    """

    path: str
    is_generative: bool
    prompt_fields: tuple[str, ...]
    token_limit_fields: tuple[str, ...] = ()
    required: tuple[tuple[str, ...], ...] = ()


_CHAT_LIMITS = ("max_tokens", "max_completion_tokens", "min_tokens")

APIS: dict[str, Api] = {
    api.path: api
    for api in (
        Api("/v1/chat/completions", True, ("tools", "messages"), _CHAT_LIMITS, (("messages",),)),
        Api("/v1/completions", True, ("prompt",), _CHAT_LIMITS, (("prompt", "prompt_embeds"),)),
        Api("/v1/responses", True, ("tools", "instructions", "input"), ("max_output_tokens",), (("input",),)),
        Api("/v1/messages", True, ("tools", "system", "messages"), ("max_tokens",), (("messages",),)),
        Api("/v1/embeddings", False, ("input", "messages"), (), (("input", "messages"),)),
        Api("/v1/rerank", False, ("query", "documents"), (), (("query",), ("documents",))),
        Api("/v1/score", False, ("queries", "documents", "text_1", "text_2", "data_1", "data_2"), (), ()),
        Api("/tokenize", False, ("tools", "messages", "prompt"), (), (("prompt", "messages"),)),
        Api("/detokenize", False, ("tokens",), (), (("tokens",),)),
    )
}
"""Calls by path. /tokenize and /detokenize are vLLM's and carry no version prefix."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call that was read and found well-formed; the body is the client's own, not changed.

    Attributes:
        prompt: the rendered prompt bytes, for prefix hashing and size only.
        choice_count: `n`, or the number of prompts of a completions call with a list of them.
        one_engine_field: the field that keeps this call on one engine; empty if none does.
        output_tokens_max: the client's own limit, if it gave one.
        prompt_token_count: exact count when the prompt was given as token ids, else None.
    """

    api: Api
    body: Body
    model: str
    is_stream: bool
    choice_count: int
    one_engine_field: str
    output_tokens_max: int | None
    cache_salt: str
    prompt: bytes
    prompt_token_count: int | None


def _refuse(reason: RefuseReason, message: str, param: str | None = None) -> RefusedError:
    return RefusedError(Refusal(reason, message, param))


def _field(body: Body, name: str, kind: type[T], default: T, expected: str) -> T:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _refuse(
            RefuseReason.INVALID_FIELD,
            f"'{name}' is {_shown(value)}, expected {expected}.",
            name,
        )
    return value


def _shown(value: object) -> str:
    """A value as a message may show it: its kind, and the value only where it cannot hold a prompt."""
    if isinstance(value, bool | int | float) or value is None:
        shown = repr(value)
        return shown if len(shown) <= SHOWN_CHARS_MAX else f"a number of {len(shown)} characters"
    return f"a {type(value).__name__}"


def parse_call(api: Api, raw: bytes) -> Call:
    """Read and check a request body.

    Raises:
        RefusedError: 400 naming the field, its value and what is expected; prompts are never quoted.
    """
    body = _decode_object(raw)
    model = _field(body, "model", str, "", "a string naming a model")
    if not model:
        raise _refuse(
            RefuseReason.INVALID_FIELD, "'model' is missing or empty; name one of GET /v1/models.", "model"
        )
    for alternatives in api.required:
        if all(body.get(name) is None for name in alternatives):
            names = " or ".join(f"'{name}'" for name in alternatives)
            raise _refuse(RefuseReason.INVALID_FIELD, f"{names} is required for {api.path}.", alternatives[0])
    choice_count = _field(body, "n", int, 1, "a whole number of at least 1")
    if not 1 <= choice_count <= CHOICE_COUNT_MAX:
        raise _refuse(
            RefuseReason.INVALID_FIELD, f"'n' is {_shown(choice_count)}, expected 1..{CHOICE_COUNT_MAX}.", "n"
        )
    prompt, token_count, prompt_count = _render(api, body)
    return Call(
        api=api,
        body=body,
        model=model,
        is_stream=_field(body, "stream", bool, False, "true or false"),
        choice_count=choice_count * prompt_count,
        one_engine_field=_one_engine_field(body),
        output_tokens_max=_output_tokens_max(api, body),
        cache_salt=_field(body, CACHE_SALT_FIELD, str, "", "a string"),
        prompt=prompt,
        prompt_token_count=token_count,
    )


def _one_engine_field(body: Body) -> str:
    for name in ONE_ENGINE_COUNTS:
        if body.get(name) not in (None, 1):
            return name
    return next((name for name in ONE_ENGINE_FLAGS if body.get(name) not in (None, False)), "")


def _decode_object(raw: bytes) -> Body:
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        position = "" if isinstance(error, RecursionError) else f" ({error})"
        raise _refuse(RefuseReason.MALFORMED_JSON, f"The body is not valid JSON{position}.") from error
    if not isinstance(body, dict):
        raise _refuse(RefuseReason.INVALID_FIELD, f"The body is {_shown(body)}, expected a JSON object.")
    return body


def _output_tokens_max(api: Api, body: Body) -> int | None:
    limits = []
    for name in api.token_limit_fields:
        value = _field(body, name, int, -1, "a whole number")
        if body.get(name) is None or name == "min_tokens":
            continue
        if value < 0:
            raise _refuse(
                RefuseReason.INVALID_FIELD, f"'{name}' is {_shown(value)}, expected at least 0.", name
            )
        limits.append(value)
    return min(limits, default=None)


def _render(api: Api, body: Body) -> tuple[bytes, int | None, int]:
    """The prompt's bytes, its token count where it was given as ids, and how many prompts there are."""
    if api.path == "/v1/completions":
        return _render_completion(body.get("prompt"))
    parts: list[bytes] = []
    for name in api.prompt_fields:
        value = body.get(name)
        if value is None:
            continue
        if name == "messages":
            parts.extend(_render_messages(value))
        elif isinstance(value, str):
            parts.append(value.encode("utf-8", "surrogatepass"))
        else:
            parts.append(msgspec.json.encode(value))
    return b"\0".join(parts), None, 1


def _render_messages(messages: object) -> list[bytes]:
    if not isinstance(messages, list) or not messages:
        shown = "an empty list" if messages == [] else _shown(messages)
        raise _refuse(
            RefuseReason.INVALID_FIELD, f"'messages' is {shown}, expected a list of messages.", "messages"
        )
    parts: list[bytes] = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _refuse(
                RefuseReason.INVALID_FIELD,
                f"'messages[{index}]' is {_shown(message)}, expected an object with role and content.",
                "messages",
            )
        role, content = message.get("role"), message.get("content")
        parts.append(role.encode("utf-8", "surrogatepass") if isinstance(role, str) else b"")
        if isinstance(content, str) and len(message) == 2:
            parts.append(content.encode("utf-8", "surrogatepass"))
        else:
            parts.append(msgspec.json.encode(message))
    return parts


def _render_completion(prompt: Any) -> tuple[bytes, int | None, int]:
    match prompt:
        case None:  # prompt_embeds: opaque to us, so one prompt of unknown length.
            return b"", None, 1
        case str():
            return prompt.encode("utf-8", "surrogatepass"), None, 1
        case []:
            return b"", 0, 1
        case [int(), *_]:
            ids = _token_ids(prompt)
            return struct.pack(f"<{len(ids)}I", *ids), len(ids), 1
        case [str(), *_] if all(isinstance(item, str) for item in prompt):
            return b"\0".join(p.encode("utf-8", "surrogatepass") for p in prompt), None, len(prompt)
        case [list(), *_] if all(isinstance(item, list) for item in prompt):
            lists = [_token_ids(item) for item in prompt]
            packed = b"".join(struct.pack(f"<{len(ids)}I", *ids) for ids in lists)
            return packed, sum(map(len, lists)), len(prompt)
        case _:
            raise _refuse(
                RefuseReason.INVALID_FIELD,
                f"'prompt' is {_shown(prompt)}, expected a string, token ids, or a list of either.",
                "prompt",
            )


def _token_ids(items: list[Any]) -> list[int]:
    if len(items) > TOKEN_IDS_MAX:
        raise _refuse(
            RefuseReason.CONTEXT_TOO_LONG,
            f"'prompt' holds {len(items)} token ids, expected at most {TOKEN_IDS_MAX}.",
            "prompt",
        )
    for item in items:
        if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item <= TOKEN_ID_MAX:
            raise _refuse(
                RefuseReason.INVALID_FIELD,
                f"'prompt' holds {_shown(item)}, expected token ids in 0..{TOKEN_ID_MAX}.",
                "prompt",
            )
    return items
