"""Cache salts: what keeps the prefixes of those who do not trust each other apart in an engine's cache; pure.

An engine reuses KV for equal prompts under equal salts. A salt that others can find out lets them ask, by how
long an answer takes, whether a prompt was seen before; so it is a keyed hash that no client knows.

vLLM 0.32 takes `cache_salt` of 1 to 128 characters, without slashes and @, in every call of SALTED_PATHS.
SGLang 0.5.23 takes it in chats, completions and responses, puts it before a client's own `extra_key`, and
ignores it elsewhere.

Media have caches of their own. vLLM 0.32 finds an image, audio or video there by its content or, without
looking at that, by the `uuid` that its content part may have, which no salt is mixed into.
"""

import base64
import hashlib
import hmac

from pdcoord.protocol.openai import APIS, Call

SALT_SECRET_BYTES_MIN = 32
SALTED_PATHS = frozenset(APIS) - {"/tokenize", "/detokenize"}
"""Calls that leave KV behind; the others read no cache."""
_PURPOSE = b"pdcoord cache_salt 1"
# vLLM 0.32 takes media in these too, at /v1/score and /v1/responses.
_MORE_FIELDS = ("items", "previous_input_messages")
_OF_MESSAGES = frozenset({"messages", "input", "previous_input_messages"})
_OF_PARTS = ("content", "output")


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


def media_id_field(call: Call) -> str | None:
    """Where a call names media by an id that its sender chose, such as `messages[0].content[1].uuid`.

    By such an id one tenant would be given what another had put there, or another be given what one had.
    A message may have a `uuid`: only a content part's means anything to an engine.
    """
    names = [name for name in (*call.api.prompt_fields, *_MORE_FIELDS) if name != "tools"]
    left: list[tuple[str, object, bool]] = [
        (name, call.body.get(name), name not in _OF_MESSAGES) for name in names
    ]
    while left:
        where, value, is_part = left.pop()
        if isinstance(value, list):
            inner = ((at, each) for at, each in enumerate(value) if isinstance(each, dict | list))
            left.extend((f"{where}[{at}]", each, is_part) for at, each in inner)
        elif isinstance(value, dict):
            if is_part and value.get("uuid") is not None:
                return f"{where}.uuid"
            left.extend((f"{where}.{name}", value.get(name), True) for name in _OF_PARTS)
    return None
