"""Where in a stream that broke off another engine takes over, and what the client has past that point."""

from dataclasses import dataclass

from pdcoord.resume.call import Call
from pdcoord.resume.passed import START, Mark, Passed
from pdcoord.resume.splice import Overlap
from pdcoord.resume.unresumable import Unresumable

DRAWN_EVENTS_MAX = 8
"""Events that may have to come again where tokens are drawn: more will hardly come out the same."""
_NO_CHARACTER = "\ufffd"


@dataclass(frozen=True, slots=True)
class Takeover:
    """A point in a stream.

    Attributes:
        text: what was output before it; it becomes prompt.
        ids: the same as token ids, as far as they were returned.
        tokens: how many they are.
        is_exact: whether tokens is a count, and not a lower bound.
        offset: text_offset of the first logprobs entry after it, in a completion.
        overlap: what the client already has after it.
    """

    text: str
    ids: list[int]
    tokens: int
    is_exact: bool
    offset: int
    overlap: Overlap

    @property
    def is_start(self) -> bool:
        """Whether nothing was output before it, so that the client's own call is sent again."""
        return not self.text and not self.ids


def find_takeover(call: Call, seen: Passed, *, from_ids: bool) -> Takeover | Unresumable:
    """The last point from which an engine goes on as the first would have.

    It is the end of an event that brought text, since there the text ends with a whole character and, as far
    as events tell, a whole token: vLLM 0.32 primes its detokenizer with the prompt, and one that ends inside
    a character comes back whole with the first text. Special tokens that have no text come again too. It is
    also a point

    - where no character was begun: an event of several tokens may have, unless an ASCII one follows;
    - by which the text of all tokens was passed on, where stop strings make the engine hold text back, and
      before a stop string that is kept in the output may have begun, since none is found across a prompt;
    - before any bytes that are no character, before any token of which the text has nothing, as where the
      end of the output is ignored, and in a chat after no white space, where text is sent back:
      where a template trims that, apply_chat_template (transformers 5.19) leaves it out of the prompt.

    Where tokens are drawn, text that was held back gives way: the point is then the end of the text, and the
    first token is drawn from what the tokenizer makes of that.
    """
    limit = len(seen.text) - _begun_stop(call, seen.text)
    if not from_ids:
        lossy_at = _lossy_at(call, seen)
        if lossy_at is not None and not call.is_greedy:
            return Unresumable.LOSSY_TEXT
        limit = limit if lossy_at is None else min(limit, lossy_at)
        if call.prompt_ids is not None:
            if not call.is_greedy:
                return Unresumable.TOKEN_PROMPT
            limit = 0
    is_trimmed = call.is_chat and not from_ids
    is_text_all = not from_ids and not seen.ids and not seen.entries
    counted = mark = _last_mark(call, seen, limit, is_trimmed=is_trimmed)
    if is_text_all and not call.is_greedy:
        # What was begun of a character is in no text: it is drawn anew, and counts once more.
        mark = _last_mark(call, seen, limit, is_trimmed=is_trimmed, may_be_merged=True)
    chars = 0 if mark is START else mark.chars + call.held_chars
    tokens, is_exact = seen.tokens_at(counted)
    is_exact = is_exact and counted is mark
    if is_text_all and call.held_chars and not call.is_greedy:
        kept = seen.text[:limit]
        chars = len(kept.rstrip() if is_trimmed else kept)
        is_exact = False  # The mark is some characters before.
    elif not call.is_greedy and seen.events - mark.events > DRAWN_EVENTS_MAX:
        return Unresumable.HELD_BACK
    return Takeover(
        text=seen.text[:chars],
        ids=seen.ids[: mark.ids],
        tokens=tokens,
        is_exact=is_exact,
        offset=seen.offset_at(mark),
        overlap=Overlap(seen.text[chars:], seen.ids[mark.ids :], seen.entries[mark.entries :]),
    )


def _last_mark(
    call: Call, seen: Passed, limit: int, *, is_trimmed: bool, may_be_merged: bool = False
) -> Mark:
    text = seen.text
    for mark in reversed(seen.marks):
        chars = mark.chars + call.held_chars
        if chars > limit or (is_trimmed and text[chars - 1].isspace()):
            continue
        if not mark.is_merged or may_be_merged or (chars < len(text) and text[chars].isascii()):
            return mark
    return START


def _lossy_at(call: Call, seen: Passed) -> int | None:
    """Up to where the text says all that was generated; None where that is everywhere, as far as it tells.

    Where stop strings make the engine hold text back, an event without any says nothing.
    """
    if call.hides_tokens:
        return 0
    found = seen.text.find(_NO_CHARACTER)
    ends = [found] if found >= 0 else []
    if seen.lost_at is not None and not call.held_chars:
        ends.append(seen.lost_at)
    return min(ends, default=None)


def _begun_stop(call: Call, text: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string.

    Where stop strings are left out of the output the engine has held those back.
    """
    if call.held_chars:
        return 0
    lengths = (len(stop) - 1 for stop in call.stops)
    longest = min(len(text), max(lengths, default=0))
    return next(
        (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in call.stops)), 0
    )
