"""Turns the stream of the engine that goes on into the rest of the stream that broke off."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from pdcoord.resume.errors import DivergedError, TornError
from pdcoord.resume.passed import Fields
from pdcoord.resume.sse import DONE, data_of, other_lines, whole_events

EVENT_BYTES_MAX = 16 << 20
"""Of one event: what is longer is not held until its end comes."""

_NULL = msgspec.Raw(b"null")
_CHAT_CHUNK = msgspec.Raw(b'"chat.completion.chunk"')
_USAGE_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")

_NOTHING = frozenset({b"null", b'""', b"[]"})
_REASONING = ("reasoning", "reasoning_content")
_OTHER_OUTPUT = ("tool_calls", "reasoning", "reasoning_content", "function_call", "refusal", "audio")


class _Entry(msgspec.Struct):
    token: str


_fields_decoder = msgspec.json.Decoder(Fields)
_choices_decoder = msgspec.json.Decoder(list[Fields])


@dataclass(slots=True)
class Overlap:
    """What the client already has past the point from which the continuing engine generates.

    It must come again, and is then left out: an engine that takes over inside a character, a held back stop
    string or white space that a chat template trims could not go on faithfully. Tokens that are drawn may
    come out otherwise; what follows them was then drawn from another beginning.

    Attributes:
        text: what must be generated first.
        ids: token ids that must be returned first.
        entries: tokens of the logprobs that must be returned first.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.ids or self.entries)


@dataclass(frozen=True, slots=True)
class Seam:
    """How two streams join.

    Attributes:
        head: members that every chunk gets in place of its own; empty where the client has no chunk yet.
        has_role: the client was told the role.
        has_begun: the client has a chunk, and in it what is told once: the prompt's token ids.
        is_chat_of_completion: chunks of a completion become those of a chat.
        done_tokens: output tokens of the first stream that are prompt of the second.
        told_tokens: what continuous usage has told the client; an event without output that tells no more is
            one that the client has.
        prompt_tokens: what the prompt had in the first stream; None where the second's, less done_tokens.
        is_answer: of a chat whose answer has begun: nothing is reasoned behind that.
        offset: text_offset of the first logprobs entry that the second stream has, in a completion.
    """

    head: Fields = field(default_factory=dict)
    has_role: bool = False
    has_begun: bool = False
    is_chat_of_completion: bool = False
    done_tokens: int = 0
    told_tokens: int = 0
    prompt_tokens: int | None = None
    is_answer: bool = False
    offset: int = 0


class Splice:
    """A relay's Change: raw bytes of the continuing stream in, however they are cut; whole events out.

    Events that say that the engine failed pass through as they are, for the tape to find; comments too.
    """

    __slots__ = ("_overlap", "_pending", "_seam")

    def __init__(self, seam: Seam, overlap: Overlap | None = None) -> None:
        self._seam = seam
        self._overlap = overlap or Overlap()
        self._pending = b""

    def __call__(self, part: bytes) -> bytes:
        """What the client gets of a part; b"" while there is nothing new.

        Raises:
            DivergedError: if the overlap does not come again as it was, or an answer that had begun goes on
                with reasoning.
            TornError: if an event cannot be read.
        """
        events, self._pending = whole_events(self._pending + part)
        if len(self._pending) > EVENT_BYTES_MAX:
            raise TornError(why=f"an event of the continuing stream is over {EVENT_BYTES_MAX} bytes long")
        return b"".join(map(self._changed, events))

    def _changed(self, event: bytes) -> bytes:
        data = data_of(event)
        if data is None or data.strip() == DONE:
            return event
        try:
            fields = _fields_decoder.decode(data)
            if bytes(fields.get("error", _NULL)) != b"null":
                return event
            kept = self._rewrite(fields)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise TornError(why="an event of the continuing stream cannot be read") from error
        if not kept:
            return b""
        return other_lines(event) + b"data: " + msgspec.json.encode(fields) + b"\n\n"

    def _rewrite(self, fields: Fields) -> bool:
        """Change a chunk's members; False if nothing of it is new to the client."""
        seam = self._seam
        fields.update({name: value for name, value in seam.head.items() if name in fields})
        if seam.is_chat_of_completion:
            fields["object"] = _CHAT_CHUNK
        is_told = 0 < self._fix_usage(fields) <= seam.told_tokens
        choices = _choices_decoder.decode(fields.get("choices", b"[]"))
        if not choices:
            return True
        choice = choices[0]
        if seam.is_chat_of_completion:
            choice = _as_chat(choice)
        is_new = self._fix_choice(fields, choice, is_told=is_told)
        fields["choices"] = _encoded([choice])
        return is_new

    def _fix_choice(self, fields: Fields, choice: Fields, *, is_told: bool) -> bool:
        if self._seam.is_answer and _reasons(choice):
            raise DivergedError(why="a continuation reasons behind the answer that had begun")
        is_taken_from = self._drop_told(fields, choice) or bool(self._overlap) or is_told
        if self._overlap:
            self._drop_overlap(choice)
        if self._seam.offset:
            _shift_offsets(choice, self._seam.offset)
        is_over = bytes(choice.get("finish_reason", _NULL)) != b"null"
        if is_over and self._overlap:
            raise DivergedError(why="a continuation ended before it had come to where the stream was")
        # An event from which nothing was taken is the engine's own, empty or not.
        return is_over or not is_taken_from or _holds(choice)

    def _drop_told(self, fields: Fields, choice: Fields) -> bool:
        """Take out what the client is told once in a stream; True if the role was in it."""
        seam = self._seam
        if not seam.has_begun:
            return False
        for name in ("prompt_token_ids", "prompt_text"):
            if name in fields:
                fields[name] = _NULL
        if "prompt_token_ids" in choice:
            choice["prompt_token_ids"] = _NULL
        delta = _members(choice.get("delta"))
        if not seam.has_role or bytes(delta.get("role", _NULL)) == b"null":
            return False
        del delta["role"]
        choice["delta"] = _encoded(delta)
        return True

    def _drop_overlap(self, choice: Fields) -> None:
        overlap = self._overlap
        text, ids = _text_of(choice), _ids_of(choice)
        count = _common(overlap.text, text)
        if count:
            overlap.text, text = overlap.text[count:], text[count:]
            _put_text(choice, text)
        count = _common(overlap.ids, ids)
        if count:
            overlap.ids = overlap.ids[count:]
            choice["token_ids"] = _encoded(ids[count:])
        logprobs = _members(choice.get("logprobs"))
        count = _common(overlap.entries, _entries_of(logprobs))
        if count:
            overlap.entries = overlap.entries[count:]
            _cut_entries(logprobs, count)
            choice["logprobs"] = _encoded(logprobs)
        if text and overlap:
            raise DivergedError(why="a continuation says less of its tokens than the stream had said")

    def _fix_usage(self, fields: Fields) -> int:
        """Make a chunk's usage that of both streams; returns its completion_tokens, 0 if it has none."""
        seam = self._seam
        usage = _members(fields.get("usage"))
        counts = {name: _whole(usage.get(name)) for name in _USAGE_COUNTS}
        if not usage or (not seam.done_tokens and seam.prompt_tokens is None):
            return counts["completion_tokens"]
        prompt = seam.prompt_tokens
        if prompt is None:
            prompt = max(0, counts["prompt_tokens"] - seam.done_tokens)
        completion = counts["completion_tokens"] + seam.done_tokens
        fixed = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        usage.update({name: _encoded(value) for name, value in fixed.items()})
        details = _members(usage.get("prompt_tokens_details"))
        if _whole(details.get("cached_tokens")) > prompt:
            # What was generated before counts as cached prompt, and is none.
            details["cached_tokens"] = _encoded(prompt)
            usage["prompt_tokens_details"] = _encoded(details)
        fields["usage"] = _encoded(usage)
        return completion


def _as_chat(choice: Fields) -> Fields:
    """A choice of a completion's chunk as vLLM 0.32 writes one of a chat's."""
    is_over = bytes(choice.get("finish_reason", _NULL)) != b"null"
    made: Fields = {
        "index": choice.get("index", _encoded(0)),
        "delta": _encoded({"content": choice.get("text", _encoded(""))}),
        "logprobs": _NULL,
        "finish_reason": choice.get("finish_reason", _NULL),
    }
    if is_over:
        made["stop_reason"] = choice.get("stop_reason", _NULL)
    made["token_ids"] = choice.get("token_ids", _NULL)
    return made


def _holds(choice: Fields) -> bool:
    """Whether a choice has output."""
    delta = _members(choice.get("delta"))
    return bool(
        _text_of(choice)
        or _ids_of(choice)
        or _entries_of(_members(choice.get("logprobs")))
        or any(bytes(delta.get(name, _NULL)) not in _NOTHING for name in _OTHER_OUTPUT)
    )


def _reasons(choice: Fields) -> bool:
    delta = _members(choice.get("delta"))
    return any(bytes(delta.get(name, _NULL)) not in _NOTHING for name in _REASONING)


def _text_of(choice: Fields) -> str:
    if "delta" in choice:
        choice = _members(choice["delta"])
        return msgspec.json.decode(choice.get("content", _NULL), type=str | None) or ""
    return msgspec.json.decode(choice.get("text", _NULL), type=str | None) or ""


def _put_text(choice: Fields, text: str) -> None:
    if "delta" in choice:
        choice["delta"] = _encoded(_members(choice["delta"]) | {"content": _encoded(text)})
    else:
        choice["text"] = _encoded(text)


def _ids_of(choice: Fields) -> list[int]:
    return msgspec.json.decode(choice.get("token_ids", _NULL), type=list[int] | None) or []


def _entries_of(logprobs: Fields) -> list[str]:
    """The token of each entry, of a chat's or a completion's logprobs."""
    if "content" in logprobs:
        entries = msgspec.json.decode(logprobs["content"], type=list[_Entry] | None) or []
        return [entry.token for entry in entries]
    return msgspec.json.decode(logprobs.get("tokens", _NULL), type=list[str] | None) or []


def _cut_entries(logprobs: Fields, count: int) -> None:
    """Take the first entries out."""
    for name in ("content", "tokens", "token_logprobs", "top_logprobs", "text_offset"):
        values = msgspec.json.decode(logprobs.get(name, _NULL), type=list[msgspec.Raw] | None)
        if values is not None:
            logprobs[name] = _encoded(values[count:])


def _shift_offsets(choice: Fields, offset: int) -> None:
    logprobs = _members(choice.get("logprobs"))
    offsets = msgspec.json.decode(logprobs.get("text_offset", _NULL), type=list[int] | None)
    if offsets:
        logprobs["text_offset"] = _encoded([at + offset for at in offsets])
        choice["logprobs"] = _encoded(logprobs)


def _common(expected: Sequence[object], came: Sequence[object]) -> int:
    """How much of what is expected came.

    Raises:
        DivergedError: if something else came.
    """
    count = min(len(expected), len(came))
    if expected[:count] != came[:count]:
        raise DivergedError(why="a continuation generated other tokens than the stream had")
    return count


def _members(raw: msgspec.Raw | None) -> Fields:
    return {} if raw is None or bytes(raw) == b"null" else _fields_decoder.decode(raw)


def _whole(raw: msgspec.Raw | None) -> int:
    return 0 if raw is None else msgspec.json.decode(raw, type=int | None) or 0


def _encoded(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
