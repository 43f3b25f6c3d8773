"""Whether an engine that is given a chat's partial answer goes on as the one that lost it would have.

What it makes of that is up to its chat template. Some never read continue_final_message and end the message
(those of DeepSeek V3.2 and V4 in vLLM 0.32), some trim it: the client would get another answer's rest. So the
engine is asked, for each stream anew, what tokens it makes of the chat, of the chat with what was said of the
answer, and of that text alone; the second must be the first and the third, one behind the other. Tokens on
both sides of the seam may have merged: there, what they are spelled as counts.

SGLang 0.5.23 is not asked. Its /tokenize takes no messages, and needs not: it renders the chat without the
partial answer and appends that itself, whatever the template does.

Source: vLLM 0.32, TokenizeChatRequest, TokenizeCompletionRequest and TokenizeResponse.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from pdcoord.resume.passed import Fields

_TRUE = msgspec.Raw(b"true")
_FALSE = msgspec.Raw(b"false")
# What of a chat decides how /tokenize renders it.
_RENDERED = (
    "model",
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "media_io_kwargs",
    "mm_processor_kwargs",
)
_WORD = "\u2581"
"""How SentencePiece spells a space; it may put one before a text that has none."""


class Tokenized(msgspec.Struct):
    """What vLLM 0.32 answers to POST /tokenize, as far as it is read.

    Attributes:
        token_strs: each as its vocabulary spells it; None unless they were asked for.
    """

    count: int
    tokens: list[int] = msgspec.field(default_factory=list)
    token_strs: list[str] | None = None


_decoder = msgspec.json.Decoder(Tokenized)


def read_tokenized(raw: bytes) -> Tokenized | None:
    """Read an answer; None where it is something else."""
    try:
        return _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def text_question(fields: Fields, text: str) -> bytes:
    """A body for POST /tokenize: the tokens of a text alone.

    Args:
        fields: the client's call, for its model.
    """
    named = {"model": fields["model"]} if "model" in fields else {}
    return msgspec.json.encode(
        named | {"prompt": _encoded(text), "add_special_tokens": _FALSE, "return_token_strs": _TRUE}
    )


@dataclass(frozen=True, slots=True)
class Proof:
    """What to ask the engine that would continue a chat from its text, before that is sent.

    Attributes:
        asked: the client's call.
        continued: the call that would be sent.
        text: what was said of the answer.
    """

    asked: Fields
    continued: Fields
    text: str

    def questions(self) -> tuple[bytes, bytes, bytes]:
        """Bodies for POST /tokenize; the first asks for the text alone, whose count is `counted_tokens`."""
        chats = _chat_question(self.asked), _chat_question(self.continued)
        return text_question(self.asked, self.text), *chats

    def holds(self, alone: Tokenized, begun: Tokenized, continued: Tokenized) -> bool:
        """Whether the answers, in order, say that the text is continued and nothing else.

        One that does not spell its tokens proves nothing where they differ.
        """
        whole, before, behind = continued.tokens, begun.tokens, alone.tokens
        has_space_of_its_own = _has_space_of_its_own(alone, self.text)
        head = _common(before, whole)
        # That one token is spelled otherwise there, so that it has to be looked at.
        last = len(behind) - has_space_of_its_own
        tail = _common(behind[len(behind) - last :][::-1], whole[head:][::-1])
        if head == len(before) and tail == len(behind) == len(whole) - head:
            return True
        spelled = _spelled(continued)
        first, rest = _spelled(begun), _spelled(alone)
        if spelled is None or first is None or rest is None:
            return False
        if has_space_of_its_own:
            rest = [rest[0].removeprefix(_WORD), *rest[1:]]
        seam = "".join((*first[head:], *rest[: len(rest) - tail]))
        return "".join(spelled[head : len(spelled) - tail]) == seam


def _chat_question(fields: Fields) -> bytes:
    rendered = {name: fields[name] for name in _RENDERED if name in fields}
    return msgspec.json.encode(rendered | {"return_token_strs": _TRUE})


def _has_space_of_its_own(alone: Tokenized, text: str) -> bool:
    """Whether the tokenizer put a space before a text that has none."""
    strings = alone.token_strs
    return bool(strings and strings[0].startswith(_WORD)) and not text.startswith((" ", _WORD))


def _common(expected: Sequence[int], came: Sequence[int]) -> int:
    """How many are the same, from the first on."""
    pairs = enumerate(zip(expected, came, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(expected), len(came)))


def _spelled(answer: Tokenized) -> list[str] | None:
    strings = answer.token_strs
    return strings if strings is not None and len(strings) == len(answer.tokens) else None


def _encoded(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
