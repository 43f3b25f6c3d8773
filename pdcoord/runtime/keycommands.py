"""`pdcoord keys init`, `pdcoord keys make` and `pdcoord keys check`."""

import base64
import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from pdcoord.feeds.keyfile import SecretFile
from pdcoord.feeds.keys import parse_keys
from pdcoord.front.keys import ANY_OBJECTIVE, KEY_RANDOM_BYTES, ApiKey, KeyRing, digest_of, make_key
from pdcoord.front.salt import SALT_SECRET_BYTES_MIN
from pdcoord.policy.errors import PolicyError, format_key_path
from pdcoord.policy.summary import table

GOOD = 0
BAD = 1


def init(out: TextIO | None = None) -> int:
    """Print a keys file without keys, with a secret of its own."""
    stream = sys.stdout if out is None else out
    secret = secrets.token_bytes(SALT_SECRET_BYTES_MIN)
    hint = "# What `pdcoord keys make` prints goes below; while nothing does, nobody is let in."
    stream.write(f"{_head(secret)}{hint}\nkeys:\n")
    return GOOD


def make(
    name: str, wanted: Mapping[str, object], out: TextIO | None = None, err: TextIO | None = None
) -> int:
    """Make a key and print it with its entry; the exit status: 0 made, 1 the entry would not be taken.

    Args:
        wanted: what else the entry holds, by field of the file; those that are None are left out.
    """
    entry_out, secret_out = sys.stdout if out is None else out, sys.stderr if err is None else err
    key = make_key(secrets.token_bytes(KEY_RANDOM_BYTES))
    fields: dict[str, object] = {"name": name, "sha256": digest_of(key.encode()).hex(), **wanted}
    # JSON is YAML: what a shell passes stays text, whatever it looks like.
    lines = [f"{field}: {json.dumps(value)}" for field, value in fields.items() if value is not None]
    entry = "".join(f"  {'- ' if index == 0 else '  '}{line}\n" for index, line in enumerate(lines))
    try:
        parse_keys(f"{_head(bytes(SALT_SECRET_BYTES_MIN))}keys:\n{entry}".encode(), "")
    except PolicyError as error:
        for problem in error.problems:
            where = format_key_path(problem.key_path).removeprefix("keys[0].")
            secret_out.write(f"pdcoord keys make: {where} {problem.message}\n")
        return BAD
    secret_out.write(f"{key}\nThis is shown once: only its hash goes into the keys file.\n")
    entry_out.write(entry)
    return GOOD


def check(paths: Sequence[Path], out: TextIO | None = None) -> int:
    """Say what is wrong with files, or what they allow; the exit status: 0 all are good, 1 not."""
    stream = sys.stdout if out is None else out
    status = GOOD
    for path in paths:
        try:
            ring = SecretFile(path, "keys", parse_keys).load_first()
        except PolicyError as error:
            status = BAD
            stream.write(f"{error}\n")
            continue
        stream.writelines(f"{line}\n" for line in _describe(path, ring, datetime.now(UTC)))
    return status


def _head(secret: bytes) -> str:
    return (
        "apiVersion: pdcoord.io/v1alpha1\nkind: ApiKeys\n"
        f"cache_salt_secret: {base64.b64encode(secret).decode()}\n"
    )


def _describe(path: Path, ring: KeyRing, now: datetime) -> Sequence[str]:
    count = len(ring.keys)
    head = f"{path}: ok, {count} {'key' if count == 1 else 'keys'}"
    if not count:
        return [f"{head}: nobody is let in"]
    titles = [
        "key",
        "tenant",
        "shares caches as",
        "models",
        "objectives",
        "requests/min",
        "tokens/min",
        "expires",
    ]
    return [head, *table(titles, [_row(key, now) for key in ring.keys])]


def _objectives(key: ApiKey) -> str:
    """Of those above priority 0; the others are everybody's."""
    return "all" if ANY_OBJECTIVE in key.objectives else ", ".join(sorted(key.objectives)) or "-"


def _row(key: ApiKey, now: datetime) -> list[str]:
    expires = "never"
    if key.expires_unix_s is not None:
        at = datetime.fromtimestamp(key.expires_unix_s, UTC)
        expires = f"{at:%Y-%m-%dT%H:%M:%SZ}{'' if now < at else ' (expired)'}"
    return [
        key.name,
        key.tenant,
        key.salt_group,
        "all" if key.models is None else ", ".join(sorted(key.models)),
        _objectives(key),
        "-" if key.requests_per_minute is None else str(key.requests_per_minute),
        "-" if key.tokens_per_minute is None else str(key.tokens_per_minute),
        expires,
    ]
