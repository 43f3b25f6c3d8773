"""What an emulated engine's answers to /v1/responses and /v1/messages look like.

OpenAI Responses API (2026-11) and Anthropic Messages (2023-06-01), as far as vLLM 0.32 serves them.
"""

from typing import Any

import msgspec

from pdcoord.sim.emulator_shapes import Answering, Choice, Usage, event

_HARMONY = "gpt-oss"


class ResponsesShape:
    """/v1/responses: one choice, events with names and sequence numbers.

    vLLM 0.32 ends every stream that does not fail with response.completed, and calls an aborted answer
    completed, except one of a gpt-oss, whose answers it reads through Harmony.
    """

    opens_at_once = True

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._item_id = f"msg_{answering.id}"
        self._is_harmony = _HARMONY in answering.model
        self._sequence = 0

    def whole(self, choices: list[Choice], usage: Usage, ticket: dict[str, Any] | None) -> dict[str, Any]:
        choice = choices[0]
        is_cut = choice.finish == "length"
        is_cancelled = self._is_harmony and choice.finish == "abort"
        status = "incomplete" if is_cut else "cancelled" if is_cancelled else "completed"
        body = self._response(status, [self._item(choice, "completed")])
        body["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        body["usage"] = _responses_usage(usage)
        if ticket is not None:
            body["kv_transfer_params"] = ticket
        return body

    def opening(self, choice_count: int, usage: Usage | None) -> list[bytes]:  # noqa: ARG002  # of the Protocol
        started = self._response("in_progress", [])
        item = {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        return [
            self._event("response.created", {"response": started}),
            self._event("response.in_progress", {"response": started}),
            self._event("response.output_item.added", {"output_index": 0, "item": item}),
            self._event("response.content_part.added", {**self._place(), "part": _part("")}),
        ]

    def delta(self, choice: Choice, text: str, ids: list[int], usage: Usage | None) -> list[bytes]:  # noqa: ARG002  # of the Protocol
        return [self._event("response.output_text.delta", {**self._place(), "delta": text, "logprobs": []})]

    def closing(self, choices: list[Choice], usage: Usage, *, wants_usage: bool) -> list[bytes]:  # noqa: ARG002  # of the Protocol
        text, item = choices[0].text, self._item(choices[0], "completed")
        whole = self.whole(choices, usage, None)
        return [
            self._event("response.output_text.done", {**self._place(), "text": text, "logprobs": []}),
            self._event("response.content_part.done", {**self._place(), "part": _part(text)}),
            self._event("response.output_item.done", {"output_index": 0, "item": item}),
            self._event("response.completed", {"response": whole}),
        ]

    def error(self, body: bytes) -> bytes:
        return body

    def failing(self, body: bytes) -> list[bytes] | None:  # noqa: ARG002  # of the Protocol
        return None

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"resp_{self._answering.id}",
            "object": "response",
            "created_at": self._answering.created,
            "model": self._answering.model,
            "status": status,
            "output": output,
            "incomplete_details": None,
            "instructions": None,
            "metadata": None,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "temperature": None,
            "top_p": None,
            "usage": None,
        }

    def _item(self, choice: Choice, status: str) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_part(choice.text)],
        }

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        sequence, self._sequence = self._sequence, self._sequence + 1
        return event({"type": name, "sequence_number": sequence, **fields}, name)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}


def _responses_usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
    }


class MessagesShape:
    """/v1/messages: one choice, events with names."""

    opens_at_once = False

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    def whole(self, choices: list[Choice], usage: Usage, ticket: dict[str, Any] | None) -> dict[str, Any]:
        choice = choices[0]
        body = self._message([{"type": "text", "text": choice.text}], _messages_usage(usage))
        body["stop_reason"] = _stop_reason(choice)
        if ticket is not None:
            body["kv_transfer_params"] = ticket
        return {name: value for name, value in body.items() if value is not None}

    def opening(self, choice_count: int, usage: Usage | None) -> list[bytes]:  # noqa: ARG002  # of the Protocol
        message = self._message([], {"input_tokens": 0, "output_tokens": 0})
        block = {"type": "text", "text": ""}
        return [
            _named("message_start", {"message": message}),
            _named("content_block_start", {"index": 0, "content_block": block}),
        ]

    def delta(self, choice: Choice, text: str, ids: list[int], usage: Usage | None) -> list[bytes]:  # noqa: ARG002  # of the Protocol
        return [_named("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": text}})]

    def closing(self, choices: list[Choice], usage: Usage, *, wants_usage: bool) -> list[bytes]:  # noqa: ARG002  # of the Protocol
        delta = {"stop_reason": _stop_reason(choices[0]), "stop_sequence": None}
        return [
            _named("content_block_stop", {"index": 0}),
            _named("message_delta", {"delta": delta, "usage": _messages_usage(usage)}),
            _named("message_stop", {}),
        ]

    def error(self, body: bytes) -> bytes:
        fields = msgspec.json.decode(body)
        error = fields.get("error", fields)
        return _error({"type": error["type"], "message": error["message"]})

    def failing(self, body: bytes) -> list[bytes] | None:  # noqa: ARG002  # of the Protocol
        # What vLLM 0.32 says is that it could not read its own error event.
        message = "2 validation errors for ChatCompletionStreamResponse"
        return [b"event: error\ndata: " + _error({"type": "internal_error", "message": message}) + b"\n\n"]

    def _message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._answering.id}",
            "type": "message",
            "role": "assistant",
            "model": self._answering.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }


def _named(name: str, fields: dict[str, Any]) -> bytes:
    return event({"type": name, **fields}, name)


def _error(error: dict[str, str]) -> bytes:
    return msgspec.json.encode({"type": "error", "error": error})


def _stop_reason(choice: Choice) -> str | None:
    if choice.finish == "abort":
        return None
    return "max_tokens" if choice.finish == "length" else "end_turn"


def _messages_usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.output_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
    }
