"""What to send so that a stream that broke off in its middle goes on elsewhere, or why that cannot be."""

from dataclasses import dataclass

import msgspec

from pdcoord.resume.call import CHAT, CHAT_ONLY, COMPLETIONS, Call, read_call, why_not
from pdcoord.resume.ending import ending
from pdcoord.resume.errors import UnreadableError
from pdcoord.resume.passed import Fields, Passed, read_passed
from pdcoord.resume.proof import Proof
from pdcoord.resume.splice import Seam, Splice
from pdcoord.resume.takeover import Takeover, find_takeover
from pdcoord.resume.unresumable import Unresumable

__all__ = ["Continuation", "Finished", "Unresumable", "continue_stream", "count_request"]

_TRUE = msgspec.Raw(b"true")
_FALSE = msgspec.Raw(b"false")
_NULL = msgspec.Raw(b"null")
# Of what opens and closes reasoning in text, for the models that vLLM 0.32 has parsers for.
_REASONING_TAGS = ("<think", "</think", "think>", "<|channel", "THINK]", "_THINKING|>", "think\u25b7")


@dataclass(frozen=True, slots=True)
class Continuation:
    """A call whose stream is the rest of one that broke off.

    Attributes:
        path: where it goes; a chat whose token ids are known goes on as a completion.
        splice: what the answer's bytes go through on their way to the client, from their first on.
        prompt_tokens_more: how much longer than the first call's its prompt is, as far as that was counted.
        proof: what has to hold of the engine that it goes to, else it is Unresumable.TEMPLATE; None where
            that is known.
    """

    path: str
    body: bytes
    splice: Splice
    prompt_tokens_more: int | None
    proof: Proof | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """Nothing is left to generate.

    Attributes:
        rest: ends the stream at the client; b"" where it has everything.
    """

    rest: bytes


@dataclass(frozen=True, slots=True)
class _Begun:
    """A stream that can go on."""

    call: Call
    seen: Passed
    from_ids: bool
    takeover: Takeover


def continue_stream(
    path: str,
    body: bytes,
    passed: bytes,
    *,
    counted_tokens: int | None = None,
    context_tokens_max: int | None = None,
    appends_itself: bool = False,
) -> Continuation | Finished | Unresumable:
    """How a stream goes on elsewhere.

    Token ids are the truth where the engine returned them (return_token_ids); else the text is, and what the
    tokenizer makes of it. A seed draws other tokens of the same distribution.

    Args:
        path: of the call, without a query.
        body: the client's call as it went upstream.
        passed: what the client was given so far, of all engines; whole events.
        counted_tokens: what /tokenize answered to `count_request`; without it the tokens of a text of which
            nobody said how many they are count as its events, and max_tokens may be exceeded by those that
            an engine merged.
        context_tokens_max: prompt and output together, of the model. A chat without a limit goes on from
            token ids only where this is known, since a completion without one ends after 16 tokens.
        appends_itself: whether the engine puts a partial answer behind what its chat template makes of the
            chat without it, as SGLang 0.5.23 does; of any other one it has to be proved.
    """
    try:
        begun = _read(path, body, passed, context_tokens_max)
        if not isinstance(begun, _Begun):
            return begun
        return _go_on(begun, counted_tokens, context_tokens_max, appends_itself=appends_itself)
    except UnreadableError:
        return Unresumable.UNREADABLE


def count_request(path: str, body: bytes, passed: bytes) -> bytes | None:
    """A body for POST /tokenize of which the answer's `count` is `counted_tokens`.

    None where it would change nothing: the count is exact already, or neither a limit nor a usage needs it.
    Where there is a proof to be asked for, its first question is this one.
    """
    try:
        begun = _read(path, body, passed, None)
        if not isinstance(begun, _Begun):
            return None
        call, takeover = begun.call, begun.takeover
        is_needed = call.limit is not None or call.is_set("min_tokens") or call.wants_usage
        if takeover.is_exact or takeover.is_start or not is_needed:
            return None
        named = {name: call.fields[name] for name in ("model",) if name in call.fields}
        text = _encoded(takeover.text)
        return msgspec.json.encode(named | {"prompt": text, "add_special_tokens": _FALSE})
    except UnreadableError:
        return None


def _read(
    path: str, body: bytes, passed: bytes, context_tokens_max: int | None
) -> _Begun | Continuation | Finished | Unresumable:
    """What is to be continued; or already the answer, where it is no continuation of what was output."""
    if path not in {CHAT, COMPLETIONS}:
        return Unresumable.API
    call = read_call(path, body)
    if call.value("stream") is not True:
        return Unresumable.API
    seen = read_passed(passed)
    if seen.why_not is Unresumable.MANY_CHOICES or call.has_many_answers:
        return Unresumable.MANY_CHOICES
    if seen.is_done or seen.finish_reason is not None:
        tokens = _all_tokens(call, seen, context_tokens_max)
        return Finished(b"" if seen.is_done else ending(call, seen, tokens, _prompt_tokens(call, seen)))
    if not seen.has_output:
        return Continuation(path, body, Splice(_seam(call, seen, 0)), 0)
    from_ids = _may_go_from_ids(call, seen, context_tokens_max)
    forbidden = seen.why_not or why_not(call) or (None if from_ids else _why_no_text(call, seen))
    takeover = forbidden or find_takeover(call, seen, from_ids=from_ids)
    return takeover if isinstance(takeover, Unresumable) else _Begun(call, seen, from_ids, takeover)


def _go_on(
    begun: _Begun, counted_tokens: int | None, context_tokens_max: int | None, *, appends_itself: bool
) -> Continuation | Finished:
    call, seen, takeover = begun.call, begun.seen, begun.takeover
    if takeover.is_start:
        splice = Splice(_seam(call, seen, 0), takeover.overlap)
        return Continuation(call.path, call.raw, splice, 0)
    done = takeover.tokens if takeover.is_exact else max(takeover.tokens, counted_tokens or 0)
    if call.limit is not None and done >= call.limit:
        return Finished(ending(call, seen, call.limit, _prompt_tokens(call, seen)))
    as_completion = call.is_chat and begun.from_ids
    seam = _seam(call, seen, done, offset=takeover.offset, as_completion=as_completion)
    proof = None
    if begun.from_ids:
        path, fields = COMPLETIONS, _from_ids(call, seen, takeover, context_tokens_max)
    elif call.is_chat:
        path, fields = CHAT, _chat_from_text(call, takeover.text)
        proof = None if appends_itself else Proof(call.fields, dict(fields), takeover.text)
    else:
        path, fields = COMPLETIONS, _completion_from_text(call, takeover.text)
    _lessen(fields, done)
    if not call.is_chat and call.limit is not None:
        fields["max_tokens"] = _encoded(call.limit - done)
    return Continuation(path, msgspec.json.encode(fields), Splice(seam, takeover.overlap), done, proof)


def _seam(call: Call, seen: Passed, done: int, *, offset: int = 0, as_completion: bool = False) -> Seam:
    return Seam(
        head=seen.head,
        has_role=seen.has_role,
        has_begun=bool(seen.head),
        is_chat_of_completion=as_completion,
        done_tokens=done,
        told_tokens=seen.completion_tokens or 0,
        prompt_tokens=_prompt_tokens(call, seen),
        is_answer=call.is_chat and bool(seen.text),
        offset=offset,
    )


def _may_go_from_ids(call: Call, seen: Passed, context_tokens_max: int | None) -> bool:
    """Whether ids are there for everything, and a completion from them is what the first stream was."""
    if not seen.ids or not seen.has_all_ids or _prompt_ids(call, seen) is None:
        return False
    if not call.is_chat:
        return True
    # A chat's logprobs look otherwise; a parser of tools or reasoning would not see what is generated; and
    # the ids of a prompt with media stand for no text.
    is_parsed = seen.is_parsed or call.may_call_tools or call.is_set("logprobs") or call.has_media()
    return not is_parsed and (call.limit is not None or context_tokens_max is not None)


def _prompt_ids(call: Call, seen: Passed) -> list[int] | None:
    return seen.prompt_ids or call.prompt_ids


def _prompt_tokens(call: Call, seen: Passed) -> int | None:
    if seen.prompt_tokens is not None:
        return seen.prompt_tokens
    ids = _prompt_ids(call, seen)
    return None if ids is None else len(ids)


def _all_tokens(call: Call, seen: Passed, context_tokens_max: int | None) -> int | None:
    """Of a stream that has finished; None where nobody said: its last token may have no text.

    One that ended for its length has as many as it might have, unless the context was full before: vLLM 0.32
    and SGLang 0.5.23 say "length" of both.
    """
    if seen.ids and seen.has_all_ids:
        return len(seen.ids)
    if seen.completion_tokens is not None:
        return seen.completion_tokens
    if seen.entries and seen.has_all_entries:
        return len(seen.entries)
    if call.limit is None or seen.finish_reason != "length":
        return None
    prompt_tokens = _prompt_tokens(call, seen)
    is_known = None not in (prompt_tokens, context_tokens_max)
    has_room = is_known and (prompt_tokens or 0) + call.limit <= (context_tokens_max or 0)
    # Each event has at least one.
    return call.limit if has_room or seen.events >= call.limit else None


def _why_no_text(call: Call, seen: Passed) -> Unresumable | None:
    """What forbids that a chat's partial answer goes back as a message.

    Reasoning that no parser took out is one: templates drop it from messages, or write it anew. Where the
    template itself opens it, the text shows nothing of that until it is closed.
    """
    if not call.is_chat:
        return None
    if any(tag in text for text in (seen.text, *call.rendered_texts()) for tag in _REASONING_TAGS):
        return Unresumable.REASONING
    return None if _may_append(call) else Unresumable.TEMPLATE


def _may_append(call: Call) -> bool:
    """Whether a chat's prompt ends where an assistant's message begins or is open."""
    is_open = call.is_set("continue_final_message")
    if not is_open:
        return call.value("add_generation_prompt") is not False
    messages = call.messages()
    last = messages[-1] if messages else {}
    is_assistant = bytes(last.get("role", _NULL)) == b'"assistant"'
    return is_assistant and bytes(last.get("content", _NULL)).startswith(b'"')


def _from_ids(call: Call, seen: Passed, takeover: Takeover, context_tokens_max: int | None) -> Fields:
    fields = dict(call.fields)
    prompt = [*(_prompt_ids(call, seen) or ()), *takeover.ids]
    if call.is_chat:
        fields = {name: raw for name, raw in fields.items() if name not in CHAT_ONLY}
        limit = call.limit
        if limit is None:
            limit = max(1, (context_tokens_max or 0) - len(prompt) + takeover.tokens)
        fields["max_tokens"] = _encoded(limit)
    return fields | {"prompt": _encoded(prompt)}


def _completion_from_text(call: Call, text: str) -> Fields:
    raw = bytes(call.fields.get("prompt", _NULL)).strip()
    if raw.startswith(b"["):  # A list of one string.
        raw = raw[1:-1].strip()
    return call.fields | {"prompt": _longer(raw, text)}


def _chat_from_text(call: Call, text: str) -> Fields:
    messages = call.messages()
    if call.is_set("continue_final_message"):
        messages[-1]["content"] = _longer(bytes(messages[-1]["content"]), text)
    else:
        messages.append({"role": _encoded("assistant"), "content": _encoded(text)})
    return call.fields | {
        "messages": _encoded(messages),
        "continue_final_message": _TRUE,
        "add_generation_prompt": _FALSE,
    }


def _longer(raw: bytes, text: str) -> msgspec.Raw:
    """A JSON string with a text appended, its own bytes as they are."""
    if not raw.startswith(b'"'):
        raise UnreadableError("the prompt is no text")
    return msgspec.Raw(raw[:-1] + msgspec.json.encode(text)[1:])


def _lessen(fields: Fields, done: int) -> None:
    """Take what was generated off the bounds of what may be."""
    for name, least in (("max_tokens", 1), ("max_completion_tokens", 1), ("min_tokens", 0)):
        value = msgspec.json.decode(fields.get(name, _NULL))
        if isinstance(value, int):
            fields[name] = _encoded(max(least, value - done))


def _encoded(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
