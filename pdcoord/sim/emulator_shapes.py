"""What an emulated engine's answers to chat and completion calls look like, as vLLM 0.32 writes them."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

DONE_EVENT = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Choice:
    """One answer, as far as it has come.

    Attributes:
        finish: "stop", "length" or "abort" once it has ended.
    """

    index: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call; cached ones were computed before, wherever."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int

    def body(self) -> dict[str, Any]:
        """As chat and completions write it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
            "completion_tokens": self.output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Answering:
    """What a shape needs to know of its call.

    Attributes:
        id: without the API's prefix.
        prompt_ids: of every prompt, where the client wants them back.
    """

    id: str
    model: str
    created: int
    prompt_ids: tuple[tuple[int, ...], ...] | None = None
    choices_each: int = 1


class Shape(Protocol):
    """How one API writes an answer, whole or event by event.

    Attributes:
        opens_at_once: whether the opening goes out before anything is computed; else with the first token.
    """

    opens_at_once: bool

    def whole(self, choices: list[Choice], usage: Usage, ticket: dict[str, Any] | None) -> dict[str, Any]: ...

    def opening(self, choice_count: int, usage: Usage | None) -> list[bytes]:
        """Events before the first token."""

    def delta(self, choice: Choice, text: str, ids: list[int], usage: Usage | None) -> list[bytes]:
        """Events for a piece of one choice; its last piece if `choice.finish` is set."""

    def closing(self, choices: list[Choice], usage: Usage, *, wants_usage: bool) -> list[bytes]:
        """Events after the last token."""

    def error(self, body: bytes) -> bytes:
        """How the API answers an engine's error, which is given as chat answers it."""

    def failing(self, body: bytes) -> list[bytes] | None:
        """Events that end a stream whose engine failed; None where it breaks off instead.

        Args:
            body: the error as chat answers it.
        """


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


class ChatShape:
    """/v1/chat/completions."""

    opens_at_once = False

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._id = f"chatcmpl-{answering.id}"

    def whole(self, choices: list[Choice], usage: Usage, ticket: dict[str, Any] | None) -> dict[str, Any]:
        wants_ids = self._answering.prompt_ids is not None
        return {
            **self._head("chat.completion"),
            "choices": [
                {
                    "index": choice.index,
                    "message": {
                        "role": "assistant",
                        "content": choice.text,
                        "refusal": None,
                        "tool_calls": [],
                    },
                    "logprobs": None,
                    "finish_reason": choice.finish,
                    "stop_reason": None,
                    "token_ids": choice.ids if wants_ids else None,
                }
                for choice in choices
            ],
            "usage": usage.body(),
            "prompt_token_ids": self._prompt_ids(),
            "kv_transfer_params": ticket,
        }

    def opening(self, choice_count: int, usage: Usage | None) -> list[bytes]:
        return [
            event(
                {
                    **self._head("chat.completion.chunk"),
                    "choices": [
                        {
                            "index": index,
                            "delta": {"role": "assistant", "content": ""},
                            "logprobs": None,
                            "finish_reason": None,
                        }
                    ],
                    "prompt_token_ids": self._prompt_ids(),
                    **_usage_field(usage),
                }
            )
            for index in range(choice_count)
        ]

    def delta(self, choice: Choice, text: str, ids: list[int], usage: Usage | None) -> list[bytes]:
        entry: dict[str, Any] = {
            "index": choice.index,
            "delta": {"content": text},
            "logprobs": None,
            "finish_reason": choice.finish,
        }
        if self._answering.prompt_ids is not None:
            entry["token_ids"] = ids
        head = self._head("chat.completion.chunk")
        return [event({**head, "choices": [entry], **_usage_field(usage)})]

    def closing(self, choices: list[Choice], usage: Usage, *, wants_usage: bool) -> list[bytes]:  # noqa: ARG002  # of the Protocol
        events = [DONE_EVENT]
        if wants_usage:
            head = self._head("chat.completion.chunk")
            events.insert(0, event({**head, "choices": [], "usage": usage.body()}))
        return events

    def error(self, body: bytes) -> bytes:
        return body

    def failing(self, body: bytes) -> list[bytes] | None:
        return _failing(body)

    def _head(self, kind: str) -> dict[str, Any]:
        answering = self._answering
        return {"id": self._id, "object": kind, "created": answering.created, "model": answering.model}

    def _prompt_ids(self) -> tuple[int, ...] | None:
        ids = self._answering.prompt_ids
        return None if ids is None else ids[0]


class CompletionShape:
    """/v1/completions."""

    opens_at_once = False

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._head = {
            "id": f"cmpl-{answering.id}",
            "object": "text_completion",
            "created": answering.created,
            "model": answering.model,
        }

    def whole(self, choices: list[Choice], usage: Usage, ticket: dict[str, Any] | None) -> dict[str, Any]:
        wants_ids = self._answering.prompt_ids is not None
        return {
            **self._head,
            "choices": [
                {
                    **self._entry(choice, choice.text),
                    "token_ids": choice.ids if wants_ids else None,
                    "prompt_token_ids": self._prompt_ids(choice),
                }
                for choice in choices
            ],
            "usage": usage.body(),
            "kv_transfer_params": ticket,
        }

    def opening(self, choice_count: int, usage: Usage | None) -> list[bytes]:  # noqa: ARG002  # of the Protocol
        return []

    def delta(self, choice: Choice, text: str, ids: list[int], usage: Usage | None) -> list[bytes]:
        entry = self._entry(choice, text)
        if self._answering.prompt_ids is not None:
            entry["token_ids"] = ids
            is_first = len(choice.ids) == len(ids)
            entry["prompt_token_ids"] = self._prompt_ids(choice) if is_first else None
        return [event({**self._head, "choices": [entry], **_usage_field(usage)})]

    def closing(self, choices: list[Choice], usage: Usage, *, wants_usage: bool) -> list[bytes]:  # noqa: ARG002  # of the Protocol
        events = [DONE_EVENT]
        if wants_usage:
            events.insert(0, event({**self._head, "choices": [], "usage": usage.body()}))
        return events

    def error(self, body: bytes) -> bytes:
        return body

    def failing(self, body: bytes) -> list[bytes] | None:
        return _failing(body)

    @staticmethod
    def _entry(choice: Choice, text: str) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": text,
            "logprobs": None,
            "finish_reason": choice.finish,
            "stop_reason": None,
        }

    def _prompt_ids(self, choice: Choice) -> tuple[int, ...] | None:
        ids = self._answering.prompt_ids
        return None if ids is None else ids[choice.index // self._answering.choices_each]


def _failing(body: bytes) -> list[bytes]:
    return [b"data: " + body + b"\n\n", DONE_EVENT]


def _usage_field(usage: Usage | None) -> dict[str, Any]:
    return {} if usage is None else {"usage": usage.body()}


def error_body(status: int, kind: str, message: str, param: str | None, *, is_sglang: bool) -> bytes:
    """An error as vLLM or SGLang words it."""
    if is_sglang:
        return msgspec.json.encode(
            {"object": "error", "message": message, "type": kind, "param": param, "code": status}
        )
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": status}})
