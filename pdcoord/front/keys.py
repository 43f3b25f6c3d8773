"""API keys as the fronts know them: found by the hash of what a client sends, never kept themselves; pure.

A key is `pdc_` and 43 characters of base64url: 256 random bits, so a plain SHA-256 of it cannot be undone and
needs neither a salt nor a slow hash. Nothing else is taken for a key, whatever hash a file holds.
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

KEY_PREFIX = "pdc_"
KEY_RANDOM_BYTES = 32
KEY_IN_TEXT = re.compile(r"pdc_[A-Za-z0-9_-]{8,}")
"""What may be a key, or a good part of one, in text that somebody will see."""
ANY_OBJECTIVE = "*"
"""In place of an objective's name: all of them."""
_FOREIGN_KEY = re.compile(rb"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{16,}")
"""A key as OpenAI's and Anthropic's clients have it for other places than this."""
_CREDENTIAL_BYTES_MIN = 8
"""Less is no secret, but what clients put where a key is asked for and none is needed."""
_KEY = re.compile(rb"pdc_[A-Za-z0-9_-]{43}")
_PRESENTED_BYTES_MAX = 512
"""More than any key has; what is longer is cut, so that hashing it costs no more."""
_BLANKS = b" \t"

AUTHORIZATION = b"authorization"
API_KEY = b"x-api-key"
"""Where Anthropic's clients put their key."""
_BEARER = b"bearer"


class KeyFault(StrEnum):
    """Why nobody is let in by what a call brought; closed, a label of metrics."""

    MISSING = "missing"
    AMBIGUOUS = "ambiguous"
    """Two keys that differ: whose call would it be?"""
    UNKNOWN = "unknown"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What a key allows.

    Attributes:
        name: in logs and metrics; unique.
        digest: SHA-256 of the key.
        salt_group: keys of one group share prefix caches.
        models: names or aliases of the models it is for, or names of adapters; None for all.
        requests_per_minute, tokens_per_minute: None for no limit.
        expires_unix_s: None for never.
        objectives: names of those above priority 0 that may be asked for; ANY_OBJECTIVE for all.
    """

    name: str
    digest: bytes
    tenant: str
    salt_group: str
    models: frozenset[str] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    expires_unix_s: float | None = None
    objectives: frozenset[str] = frozenset()

    def is_for(self, names: Iterable[str]) -> bool:
        """Whether a model of these names may be asked."""
        return self.models is None or not self.models.isdisjoint(names)

    def may_ask_for(self, objective: str, priority: int) -> bool:
        """Whether an objective of that priority may be asked for; everybody may go behind the usual."""
        return priority <= 0 or not self.objectives.isdisjoint({objective, ANY_OBJECTIVE})


class KeyRing:
    """All keys in force.

    Args:
        keys: names and digests are unique.
        salt_secret: what cache salts are made with; equal on every replica.
    """

    def __init__(self, keys: Iterable[ApiKey], salt_secret: bytes) -> None:
        self.keys = tuple(keys)
        self.salt_secret = salt_secret
        self._by_digest = {key.digest: key for key in self.keys}

    def find(self, presented: bytes, unix_s: float) -> ApiKey | KeyFault:
        """The key of that text, as of now.

        A text that no key could be takes the same steps as a key that is not known. What the look-up compares
        are hashes, which nobody can choose by their beginnings.
        """
        presented = presented[:_PRESENTED_BYTES_MAX]
        digest = digest_of(presented)
        key = self._by_digest.get(digest)
        is_equal = hmac.compare_digest(digest, key.digest if key is not None else bytes(len(digest)))
        is_key = _KEY.fullmatch(presented) is not None
        if key is None or not (is_equal and is_key):
            return KeyFault.UNKNOWN
        if key.expires_unix_s is not None and unix_s >= key.expires_unix_s:
            return KeyFault.EXPIRED
        return key


def presented_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | KeyFault:
    """What a call's headers bring as its key: `Authorization: Bearer KEY`, or `x-api-key: KEY`.

    Both may stand there, and more than once, if they say the same.
    """
    found: set[bytes] = set()
    for name, value in headers:
        if name == AUTHORIZATION:
            scheme, _, credentials = value.strip(_BLANKS).partition(b" ")
            if scheme.lower() == _BEARER:
                found.add(credentials.strip(_BLANKS))
        elif name == API_KEY:
            found.add(value.strip(_BLANKS))
    if len(found) > 1:
        return KeyFault.AMBIGUOUS
    return next(iter(found), b"") or KeyFault.MISSING


def shows_key(text: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a text that people will read has a key in it: the one that a call brought, or another."""
    if KEY_IN_TEXT.search(text.decode("latin-1")) is not None or _FOREIGN_KEY.search(text) is not None:
        return True
    brought = (value.strip(_BLANKS) for name, value in headers if name in (AUTHORIZATION, API_KEY))
    credentials = (value.rpartition(b" ")[2] for value in brought)
    return any(len(each) >= _CREDENTIAL_BYTES_MIN and each in text for each in credentials)


def make_key(random_bytes: bytes) -> str:
    """A new key.

    Args:
        random_bytes: KEY_RANDOM_BYTES of them, from the system's own source.
    """
    assert len(random_bytes) == KEY_RANDOM_BYTES, "a key is made of 256 random bits"
    return KEY_PREFIX + base64.urlsafe_b64encode(random_bytes).rstrip(b"=").decode()


def digest_of(key: bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key).digest()


def without_keys(text: str) -> str:
    """A text for people, with whatever may be a key in it cut short."""
    return KEY_IN_TEXT.sub(f"{KEY_PREFIX}...", text)
