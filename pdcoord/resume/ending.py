"""The last events of a stream to which no engine has anything to add."""

import msgspec

from pdcoord.resume.call import Call
from pdcoord.resume.passed import Fields, Passed
from pdcoord.resume.sse import DONE

_NULL = msgspec.Raw(b"null")
_DONE_EVENT = b"data: " + DONE + b"\n\n"


def ending(call: Call, seen: Passed, tokens: int | None, prompt_tokens: int | None) -> bytes:
    """What the client still lacks: how it finished, the usage that it asked for, [DONE].

    The usage is left out where nobody said how many tokens there are: a wrong one would be worse than none.

    Args:
        tokens: of the whole output, if known.
        prompt_tokens: if known.
    """
    finish = b"" if seen.finish_reason is not None else _event(_finish(call, seen))
    usage = b""
    if call.wants_usage and not seen.has_usage_event and prompt_tokens is not None and tokens is not None:
        counts = {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + tokens,
            "completion_tokens": tokens,
        }
        usage = _event(seen.head | {"choices": msgspec.Raw(b"[]"), "usage": _encoded(counts)})
    return finish + usage + _DONE_EVENT


def _finish(call: Call, seen: Passed) -> Fields:
    """A chunk without text that says that the limit was reached."""
    choice: Fields = {"index": _encoded(0)}
    choice |= {"delta": _encoded({"content": ""})} if call.is_chat else {"text": _encoded("")}
    choice |= {"logprobs": _NULL, "finish_reason": _encoded("length"), "stop_reason": _NULL}
    return seen.head | {"choices": _encoded([choice])}


def _event(fields: Fields) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


def _encoded(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
