"""Reads what was passed on of a stream of /v1/completions or /v1/chat/completions when it must be continued.

Shapes: OpenAI API reference (2026-11), vLLM 0.32, SGLang 0.5.23; vLLM adds token ids and continuous usage.
"""

from dataclasses import dataclass, field

import msgspec

from pdcoord.resume.errors import UnreadableError
from pdcoord.resume.sse import DONE, data_of, whole_events
from pdcoord.resume.unresumable import Unresumable

Fields = dict[str, msgspec.Raw]

_UNSET = msgspec.Raw()
_NULL = msgspec.Raw(b"null")


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    function_call: msgspec.Raw = _NULL
    audio: msgspec.Raw = _NULL


class _Entry(msgspec.Struct):
    token: str


class _Logprobs(msgspec.Struct):
    tokens: list[str] | None = None
    text_offset: list[int] | None = None
    content: list[_Entry] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    delta: _Delta | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    id: msgspec.Raw = _UNSET
    object: msgspec.Raw = _UNSET
    created: msgspec.Raw = _UNSET
    model: msgspec.Raw = _UNSET
    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    prompt_token_ids: list[int] | None = None
    error: msgspec.Raw = _NULL


_chunk_decoder = msgspec.json.Decoder(_Chunk)
HEAD_FIELDS = ("id", "object", "created", "model")
"""Members that every chunk of one stream has alike."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How much was out by the end of an event that brought text.

    Attributes:
        chars: of text.
        events: that brought output.
        usage_tokens: completion_tokens of continuous usage; None where the event had none.
        is_merged: the event had several tokens, so that its last may be the beginning of a character of which
            the text has nothing yet.
    """

    chars: int = 0
    ids: int = 0
    entries: int = 0
    events: int = 0
    usage_tokens: int | None = 0
    is_merged: bool = False


START = Mark()


@dataclass(slots=True)
class Passed:
    """What the client has of one stream.

    Attributes:
        head: the members that every chunk has alike; empty if no chunk was passed on.
        marks: one for each event that brought text, in order.
        ids: output token ids, as far as the engine returned them.
        entries: the token of each logprobs entry.
        next_offset: what text_offset the next logprobs entry of a completion has, after each entry.
        prompt_tokens: the engine's own count; None where no usage said so.
        has_all_ids: every event with text had its ids; likewise the other two.
        silent_at: characters before the newest event that brought a token and no text, as far as none that
            brought text followed it.
        lost_at: characters before the first token that has no text and others behind it, as far as events
            tell: one before a character beyond ASCII may have been the beginning of that.
        is_parsed: a chat event had ids and no content: the engine keeps part of its output to a parser.
        why_not: what in the stream forbids that it goes on elsewhere, if something does.
    """

    head: Fields = field(default_factory=dict)
    text: str = ""
    marks: list[Mark] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)
    next_offset: list[int] = field(default_factory=list)
    events: int = 0
    prompt_ids: list[int] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    has_role: bool = False
    has_usage_event: bool = False
    has_all_ids: bool = True
    has_all_usage: bool = True
    has_all_entries: bool = True
    silent_at: int | None = None
    lost_at: int | None = None
    is_parsed: bool = False
    is_done: bool = False
    why_not: Unresumable | None = None

    @property
    def has_output(self) -> bool:
        return bool(self.text or self.ids or self.entries or self.why_not)

    def tokens_at(self, mark: Mark) -> tuple[int, bool]:
        """Output tokens by a mark, and whether that is exact.

        Else it is the number of events: fewer than tokens where an engine put several into one.
        """
        if mark is START:
            return 0, True
        if self.has_all_ids:
            return mark.ids, True
        if self.has_all_usage and mark.usage_tokens is not None:
            return mark.usage_tokens, True
        if self.has_all_entries:
            return mark.entries, True
        return mark.events, False

    def offset_at(self, mark: Mark) -> int:
        """The text_offset that the first logprobs entry after a mark has in a completion."""
        return self.next_offset[mark.entries - 1] if 0 < mark.entries <= len(self.next_offset) else 0


def read_passed(raw: bytes) -> Passed:
    """Read the events that a client was given.

    Raises:
        UnreadableError: if they are not chunks of a completion or chat completion.
    """
    seen = Passed()
    events, rest = whole_events(raw)
    if rest.strip():
        raise UnreadableError("the stream ends inside an event")
    texts: list[str] = []
    for event in events:
        data = data_of(event)
        if data is None:
            continue
        if data.strip() == DONE:
            seen.is_done = True
            continue
        try:
            chunk = _chunk_decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UnreadableError("an event is not a chunk of a completion") from error
        _add(seen, chunk, texts)
    seen.text = "".join(texts)
    return seen


def _add(seen: Passed, chunk: _Chunk, texts: list[str]) -> None:
    if bytes(chunk.error) != b"null" or not bytes(chunk.id) or seen.is_done:
        raise UnreadableError("an event is not a chunk of a completion, or comes after the last")
    if not seen.head:
        values = {name: getattr(chunk, name) for name in HEAD_FIELDS}
        seen.head = {name: msgspec.Raw(bytes(value)) for name, value in values.items() if bytes(value)}
    if seen.prompt_ids is None:
        seen.prompt_ids = chunk.prompt_token_ids
    if not chunk.choices:
        seen.has_usage_event = seen.has_usage_event or chunk.usage is not None
    elif len(chunk.choices) > 1 or chunk.choices[0].index != 0:
        seen.why_not = Unresumable.MANY_CHOICES
    else:
        _add_choice(seen, chunk.choices[0], chunk.usage, texts)
    if chunk.usage is not None:
        seen.prompt_tokens = chunk.usage.prompt_tokens
        seen.completion_tokens = chunk.usage.completion_tokens


def _add_choice(seen: Passed, choice: _Choice, usage: _Usage | None, texts: list[str]) -> None:
    delta = choice.delta or _Delta()
    seen.has_role = seen.has_role or delta.role is not None
    seen.why_not = seen.why_not or _why_not(delta)
    seen.finish_reason = choice.finish_reason or seen.finish_reason
    if seen.prompt_ids is None:
        seen.prompt_ids = choice.prompt_token_ids
    if choice.token_ids and choice.delta is not None and delta.content is None:
        seen.is_parsed = True
    seen.ids.extend(choice.token_ids or ())
    entry_count = _add_entries(seen, choice.logprobs or _Logprobs())
    text = choice.text or delta.content or ""
    # An event without any of them may have come again after a break.
    if text or choice.token_ids or entry_count:
        seen.events += 1
    if not text:
        _note_silence(seen, choice, delta, usage)
        return
    if seen.silent_at is not None and text[0].isascii() and seen.lost_at is None:
        seen.lost_at = seen.silent_at
    seen.silent_at = None
    texts.append(text)
    seen.has_all_ids = seen.has_all_ids and bool(choice.token_ids)
    usage_tokens = None if usage is None else usage.completion_tokens
    seen.has_all_usage = seen.has_all_usage and usage_tokens is not None
    seen.has_all_entries = seen.has_all_entries and entry_count > 0
    last = seen.marks[-1] if seen.marks else START
    chars = last.chars + len(text)
    came = len(choice.token_ids or ()) or entry_count
    if not came and usage_tokens is not None:
        came = usage_tokens - (last.usage_tokens or 0)
    mark = Mark(chars, len(seen.ids), len(seen.entries), seen.events, usage_tokens, is_merged=came > 1)
    seen.marks.append(mark)


def _note_silence(seen: Passed, choice: _Choice, delta: _Delta, usage: _Usage | None) -> None:
    """Note an event without text, unless what it has or where it stands says that it brought no token."""
    if not seen.marks or choice.finish_reason is not None or delta.role is not None:
        return
    if usage is None or usage.completion_tokens != seen.completion_tokens:
        seen.silent_at = seen.marks[-1].chars


def _add_entries(seen: Passed, logprobs: _Logprobs) -> int:
    if logprobs.content is not None:
        tokens = [entry.token for entry in logprobs.content]
    else:
        tokens = logprobs.tokens or []
        offsets = logprobs.text_offset or []
        seen.next_offset.extend(at + len(token) for at, token in zip(offsets, tokens, strict=False))
    seen.entries.extend(tokens)
    return len(tokens)


def _why_not(delta: _Delta) -> Unresumable | None:
    if delta.tool_calls or bytes(delta.function_call) != b"null":
        return Unresumable.TOOL_CALLS
    if delta.reasoning or delta.reasoning_content:
        return Unresumable.REASONING
    if delta.refusal or bytes(delta.audio) != b"null":
        return Unresumable.UNKNOWN_FIELD
    return None
