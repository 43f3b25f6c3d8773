"""Questions to a server that knows a model's chat template and tokenizer, and what it answers.

vLLM 0.32: POST /tokenize takes `prompt` or `messages` and answers {"tokens": [...]}; POST <call>/render takes
the call itself and answers {"token_ids": [...]}, or a list of those for completions.
"""

import asyncio
from array import array
from collections.abc import Collection
from typing import Any

import msgspec

from pdcoord.feeds.conversations import Ids
from pdcoord.feeds.scrapes import ScrapeFailure, failure_of
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.openai import TOKEN_IDS_MAX, Body, Call
from pdcoord.wire.client import Client
from pdcoord.wire.errors import WireError

ANSWER_BYTES_MAX = 8 << 20
"""More token ids than any prompt has whose blocks are hashed to the end."""

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
TOKENIZE = "/tokenize"
_CHAT_FIELDS = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
)
_COMPLETION_FIELDS = ("add_special_tokens",)
_TEXT_PARTS = frozenset({None, "text", "input_text", "output_text", "refusal", "thinking", "tool_result"})
_STREAMING = frozenset({"stream", "stream_options"})
_TRUNCATING = ("truncate_prompt_tokens", "truncation")

_Head = tuple[bytes, bytes]
_HEADERS: tuple[_Head, ...] = ((b"content-type", b"application/json"), (b"accept", b"application/json"))


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Rendered(msgspec.Struct):
    token_ids: list[int]


_TOKENS = msgspec.json.Decoder(_Tokens)
_RENDERED = msgspec.json.Decoder(_Rendered | list[_Rendered])


def render_question(call: Call, model: str) -> bytes:
    """The body of POST <call>/render: the call itself, under the model's own name.

    Raises:
        UnicodeError: if it holds half a surrogate pair.
    """
    fields = {name: value for name, value in call.body.items() if name not in _STREAMING}
    return msgspec.json.encode(fields | {"model": model})


def tokenize_question(call: Call, model: str, prompt: str | None) -> bytes | None:
    """The body of POST /tokenize for this call's prompt; None where /tokenize does not take its kind.

    It leaves out `tool_choice` and `response_format`, which few templates show to the model; a render
    server gets the call itself.

    Args:
        prompt: of a completions call.

    Raises:
        UnicodeError: if it holds half a surrogate pair.
    """
    body = call.body
    if call.api.path == COMPLETION:
        fields = {name: body[name] for name in _COMPLETION_FIELDS if body.get(name) is not None}
        return msgspec.json.encode({"model": model, "prompt": prompt, **fields})
    if call.api.path != CHAT:
        return None
    fields = {name: body[name] for name in _CHAT_FIELDS if body.get(name) is not None}
    arguments = _template_arguments(body)
    if arguments:
        fields["chat_template_kwargs"] = arguments
    return msgspec.json.encode({"model": model, **fields})


def _template_arguments(body: Body) -> dict[str, Any]:
    """What vLLM 0.32 hands to a chat's template (ChatCompletionRequest.build_chat_params)."""
    given = body.get("chat_template_kwargs")
    arguments = dict(given) if isinstance(given, dict) else {}
    effort = body.get("reasoning_effort")
    if effort is not None:
        arguments.setdefault("enable_thinking", effort != "none")
        arguments["reasoning_effort"] = effort
    if body.get("documents") is not None:
        arguments["documents"] = body["documents"]
    return arguments


def has_media(call: Call) -> bool:
    """Whether a message holds something that is no text: its tokens do not tell one picture from another."""
    contents = [
        each.get("content")
        for each in _items(call.body.get("messages", call.body.get("input")))
        if isinstance(each, dict)
    ]
    parts = [part for content in contents for part in _items(content)]
    return any(isinstance(part, dict) and not _is_one_of(part.get("type"), _TEXT_PARTS) for part in parts)


def _is_one_of(value: object, known: Collection[str | None]) -> bool:
    """Whether a client's value, which may be anything that JSON has, is one of those."""
    return (value is None or isinstance(value, str)) and value in known


def _items(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def is_truncated(call: Call) -> bool:
    """Whether the engine is asked to cut the prompt, which leaves other blocks than the prompt's own."""
    return not all(_is_one_of(call.body.get(name), {None, "disabled"}) for name in _TRUNCATING)


async def ask(
    client: Client, address: HostPort, target: str, question: bytes, deadline_s: float
) -> Ids | ScrapeFailure:
    """Token ids as a server gives them, or why it gave none."""
    try:
        async with asyncio.timeout(deadline_s):
            response = await client.request(
                "POST", address, target, headers=_HEADERS, body=question, head_timeout_s=deadline_s
            )
            async with response:
                if response.status != 200:
                    return ScrapeFailure.STATUS
                raw = await response.read_all(timeout_s=deadline_s, bytes_max=ANSWER_BYTES_MAX)
    except (TimeoutError, WireError) as error:
        return failure_of(error)
    ids = read_ids(raw, is_rendered=target != TOKENIZE)
    return ids if ids is not None else ScrapeFailure.UNREADABLE


def read_ids(raw: bytes, *, is_rendered: bool) -> Ids | None:
    """The ids of an answer; None if it is not one, or not of one prompt."""
    try:
        if not is_rendered:
            found = _TOKENS.decode(raw).tokens
        else:
            rendered = _RENDERED.decode(raw)
            if isinstance(rendered, list):
                (rendered,) = rendered
            found = rendered.token_ids
        return array("I", found) if len(found) <= TOKEN_IDS_MAX else None
    except (msgspec.DecodeError, ValueError, OverflowError):
        return None
