"""Puts the prefill engine's count of cached prompt tokens into the usage that the decode engine reports.

A decode engine that pulled KV calls every pulled token cached. Only the number is replaced, all other
bytes stay; in an answer's text the same words stand escaped, so a bytes search finds real members only.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Pattern:
    """How an API reports cached tokens.

    Attributes:
        opener: what every match begins with.
        whole: the match, and one byte that ends its last number.
        begun: fullmatches whatever, from an opener to the end of the data, may still become a match.
        span: no match is longer.
    """

    opener: bytes
    whole: re.Pattern[bytes]
    begun: re.Pattern[bytes]
    span: int


# usage.prompt_tokens_details (chat, completions), usage.input_tokens_details (responses).
_DETAILS = _Pattern(
    opener=b'"cached_tokens":',
    whole=re.compile(rb'("cached_tokens": {0,4})([0-9]{1,15})(?=[\s,}])'),
    begun=re.compile(rb'"cached_tokens": {0,4}[0-9]{0,15}'),
    span=64,
)
# Anthropic's usage (vLLM 0.32 AnthropicUsage): input_tokens leaves out what was read from the cache, so
# both numbers change and their sum stays.
_MESSAGES = _Pattern(
    opener=b'"input_tokens":',
    whole=re.compile(
        rb'("input_tokens": {0,4})([0-9]{1,15})(,[^{}]{0,160}?"cache_read_input_tokens": {0,4})'
        rb"([0-9]{1,15})(?=[\s,}])"
    ),
    begun=re.compile(rb'"input_tokens": {0,4}[0-9]{0,15}(?:,[^{}]{0,220})?'),
    span=280,
)
_PATTERNS = {"/v1/messages": _MESSAGES}


class UsageRewriter:
    """Rewrites one answer, whole or chunk by chunk; how it is cut does not change what comes out."""

    __slots__ = ("_cached_tokens", "_held", "_pattern")

    def __init__(self, api_path: str, cached_tokens: int) -> None:
        self._pattern = _PATTERNS.get(api_path, _DETAILS)
        self._cached_tokens = cached_tokens
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """What may be sent on; up to `span` bytes are held back until the next call."""
        pattern = self._pattern
        # No match has a line end where an opener could be cut.
        if not self._held and chunk.endswith(b"\n") and pattern.opener not in chunk:
            return chunk
        data = pattern.whole.sub(self._replace, self._held + chunk)
        cut = _cut(pattern, data)
        self._held = data[cut:]
        return data[:cut]

    def finish(self) -> bytes:
        """What was held back at the end of the body."""
        held, self._held = self._held, b""
        return held

    def _replace(self, match: re.Match[bytes]) -> bytes:
        if self._pattern is _DETAILS:
            return b"%b%d" % (match[1], self._cached_tokens)
        total = int(match[2]) + int(match[4])
        cached = min(self._cached_tokens, total)
        return b"%b%d%b%d" % (match[1], total - cached, match[3], cached)


def _cut(pattern: _Pattern, data: bytes) -> int:
    """Where what must be held back begins; the length of the data if nothing must."""
    start = data.find(b'"', max(0, len(data) - pattern.span))
    while start >= 0:
        tail = data[start:]
        if pattern.opener.startswith(tail) or pattern.begun.fullmatch(tail) is not None:
            return start
        start = data.find(b'"', start + 1)
    return len(data)
