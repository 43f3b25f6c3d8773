"""The file of API keys: what a person writes into it, checked and made into the keys that fronts know."""

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pdcoord.feeds.keyfile import refused
from pdcoord.front.keys import ApiKey, KeyRing, without_keys
from pdcoord.front.salt import SALT_SECRET_BYTES_MIN, named_group, tenant_group
from pdcoord.policy.errors import PolicyError, Problem, quote
from pdcoord.policy.expect import EXPECTED
from pdcoord.policy.schema import ObjectiveName
from pdcoord.policy.values import ApiVersion, Metadata, Name, ServedName, Spec
from pdcoord.policy.yamltext import Document, parse_documents, show, validate

KEYS_MAX = 4_096
"""Keys in one file; each has metrics of its own."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


def _digest(value: object) -> object:
    """Refuse what is no hash without repeating it: it may be the key itself."""
    if not isinstance(value, str) or _DIGEST.fullmatch(value) is None:
        raise ValueError(
            "is not the SHA-256 of a key in 64 digits of 0-9a-f; `pdcoord keys make` prints it (in quotes)"
        )
    return value


def _secret(value: object) -> object:
    """Refuse what is no secret without repeating it."""
    if not isinstance(value, str) or len(_decode_secret(value)) < SALT_SECRET_BYTES_MIN:
        raise ValueError(
            f"is not {SALT_SECRET_BYTES_MIN} bytes or more in base64; `openssl rand -base64 32` prints such"
        )
    return value


def _moment(value: object) -> object:
    """Refuse what is no moment, and a bare year, which pydantic would take for seconds since 1970."""
    try:
        is_aware = datetime.fromisoformat(value).tzinfo is not None if isinstance(value, str) else False
    except ValueError:
        is_aware = False
    if not is_aware:
        raise ValueError(f"is {show(value)}, expected a time with its zone, such as 2027-06-30T00:00:00Z")
    return value


def _decode_secret(text: str) -> bytes:
    """The bytes of base64 or base64url; none where it is neither."""
    try:
        return base64.b64decode(
            text + "=" * (-len(text) % 4), altchars=b"-_" if {*text} & {"-", "_"} else None
        )
    except (binascii.Error, ValueError):
        return b""


Digest = Annotated[str, BeforeValidator(_digest), Field(json_schema_extra={EXPECTED: "64 digits of 0-9a-f"})]
SaltSecret = Annotated[
    str, BeforeValidator(_secret), Field(json_schema_extra={EXPECTED: "32 bytes or more in base64"})
]
Tenant = Annotated[
    str,
    Field(
        pattern=r"^[!-~]+$",
        max_length=128,
        json_schema_extra={EXPECTED: "up to 128 visible ASCII characters without a space"},
    ),
]
Moment = Annotated[
    str,
    BeforeValidator(_moment),
    Field(json_schema_extra={EXPECTED: "a time with its zone, such as 2027-06-30T00:00:00Z"}),
]
PerMinute = Annotated[int, Field(ge=1, le=1_000_000_000)]


class KeySpec(Spec):
    """One key and what it allows."""

    name: Name = Field(description="Name in logs and metrics, unique in the file.")
    sha256: Digest = Field(description="SHA-256 of the key, as `pdcoord keys make` prints it.")
    tenant: Tenant = Field(description="Whose calls these are: for fairness, and for what caches share.")
    salt_group: Name | None = Field(
        default=None,
        description="Keys of one group share prefix caches, whatever their tenants; else a tenant's keys do.",
    )
    models: Annotated[tuple[ServedName, ...], Field(min_length=1, max_length=256)] | None = Field(
        default=None,
        description="Models that may be asked, by name or alias, or adapters alone; all if not set.",
    )
    objectives: Annotated[tuple[ObjectiveName, ...], Field(min_length=1, max_length=64)] | None = Field(
        default=None,
        description="Objectives above priority 0 that may be asked for, or * for all; none if not set.",
    )
    requests_per_minute: PerMinute | None = Field(default=None, description="No limit if not set.")
    tokens_per_minute: PerMinute | None = Field(
        default=None, description="Tokens of prompts and answers together; no limit if not set."
    )
    expires_at: Moment | None = Field(
        default=None, description="From when it is not taken; never if not set."
    )


class KeysSpec(Spec):
    """All keys that are let in."""

    api_version: ApiVersion
    kind: Literal["ApiKeys"] = Field(description="Always ApiKeys.")
    metadata: Metadata | None = Field(default=None, description="What the document is called.")
    cache_salt_secret: SaltSecret = Field(description="What tenants' cache salts are made with.")
    keys: Annotated[tuple[KeySpec, ...], Field(max_length=KEYS_MAX)] | None = Field(
        description="The keys; none is allowed, and lets nobody in."
    )


def parse_keys(raw: bytes, file: str) -> KeyRing:
    """Read a file of keys; `file` is how problems name it.

    Raises:
        PolicyError: with everything that is wrong, no key or secret in it; nothing of the file is used.
    """
    try:
        return _parse(raw, file)
    except PolicyError as error:
        masked = map(_masked, error.problems)
    raise PolicyError(masked)


def _masked(problem: Problem) -> Problem:
    """A problem without what may be a key, wherever somebody has put it."""
    path = tuple(without_keys(part) if isinstance(part, str) else part for part in problem.key_path)
    return replace(problem, key_path=path, message=without_keys(problem.message))


def _parse(raw: bytes, file: str) -> KeyRing:
    documents = parse_documents(raw, file)
    if len(documents) > 1:
        raise refused(file, f"holds {len(documents)} documents, expected one")
    spec = validate(documents[0], KeysSpec)
    problems = list(_repeats(documents[0], spec))
    if problems:
        raise PolicyError(problems)
    return KeyRing(map(_compile, spec.keys or ()), _decode_secret(spec.cache_salt_secret))


def _repeats(document: Document, spec: KeysSpec) -> Iterator[Problem]:
    """Names and hashes that a file has twice."""
    places: dict[tuple[str, str], str] = {}
    for index, key in enumerate(spec.keys or ()):
        for field, text in (("name", key.name), ("sha256", key.sha256)):
            path = ("keys", index, field)
            if (field, text) in places:
                yield document.problem(
                    path, f"is {quote(text)}, which {places[field, text]} already has; change one"
                )
            places.setdefault((field, text), document.place_of(path))


def _compile(spec: KeySpec) -> ApiKey:
    return ApiKey(
        name=spec.name,
        digest=bytes.fromhex(spec.sha256),
        tenant=spec.tenant,
        salt_group=tenant_group(spec.tenant) if spec.salt_group is None else named_group(spec.salt_group),
        models=None if spec.models is None else frozenset(spec.models),
        requests_per_minute=spec.requests_per_minute,
        tokens_per_minute=spec.tokens_per_minute,
        expires_unix_s=None
        if spec.expires_at is None
        else datetime.fromisoformat(spec.expires_at).timestamp(),
        objectives=frozenset(spec.objectives or ()),
    )
