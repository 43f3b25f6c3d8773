"""Cache salts: what keeps the prefixes of those who do not trust each other apart in an engine's cache; pure.

An engine reuses KV for equal prompts under equal salts. A salt that others can find out lets them ask, by how
long an answer takes, whether a prompt was seen before; so it is a keyed hash that no client knows.

vLLM 0.32 takes `cache_salt` of 1 to 128 characters, without slashes and @, in every call of SALTED_PATHS.
SGLang 0.5.23 takes it in chats, completions and responses, puts it before a client's own `extra_key`, and
ignores it elsewhere.
"""

import base64
import hashlib
import hmac

from pdcoord.protocol.openai import APIS

SALT_SECRET_BYTES_MIN = 32
SALTED_PATHS = frozenset(APIS) - {"/tokenize", "/detokenize"}
"""Calls that leave KV behind; the others read no cache."""
_PURPOSE = b"pdcoord cache_salt 1"


def tenant_group(tenant: str) -> str:
    """The group of a tenant that shares its cache with nobody; no named group is equal to one."""
    return f"tenant {tenant}"


def named_group(name: str) -> str:
    """The group of all keys that name it, whatever their tenants."""
    return f"group {name}"


def cache_salt(secret: bytes, group: str, own: str) -> str:
    """The salt of a call: 43 characters of base64url.

    Equal wherever and whenever the secret is, so that replicas and restarts agree on what is cached.

    Args:
        secret: at least SALT_SECRET_BYTES_MIN random bytes.
        group: of the key; see `tenant_group` and `named_group`.
        own: the client's own `cache_salt`, "" for none: it parts a tenant's cache further.
    """
    parts = (_PURPOSE, group.encode(), own.encode("utf-8", "surrogatepass"))
    message = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    digest = hmac.digest(secret, message, hashlib.sha256)
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
