"""Signatures of what steers a sidecar: HMAC-SHA256 under keys that rotate; pure.

`x-pdcoord-plan-signature: v1;kid=NAME;ts=UNIX_SECONDS;mac=64_HEX_DIGITS`. The code is taken over the
version, the key's name, the time, the method, the target, the request's id, the plan, the prefill targets for
a foreign sidecar and the leg, each behind its length in bytes as ASCII digits and a colon.
"""

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from pdcoord.protocol.headers import PREFIX

PLAN_SIGNATURE = PREFIX + b"plan-signature"
"""Gateway to sidecar, and sidecar to the sidecar of a prefill pod."""

SKEW_S_MAX = 60
"""How far the clocks of who signs and who verifies may lie apart, the way included."""
KEYS_MAX = 16
SECRET_BYTES_MIN = 32
SECRET_BYTES_MAX = 4_096
SIGNATURE_BYTES_MAX = 256

_VERSION = b"v1"
_KEY_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SIGNATURE = re.compile(rb"v1;kid=([A-Za-z0-9._-]{1,64});ts=([0-9]{1,12});mac=([0-9a-f]{64})")


class KeysError(ValueError):
    """A list of keys that cannot be used; never says what a secret is."""


class Doubt(StrEnum):
    """Why a signature does not count; the closed list of a metric's label."""

    MISSING = "missing"
    MALFORMED = "malformed"
    KEY_UNKNOWN = "key-unknown"
    WRONG = "wrong"
    TOO_OLD = "too-old"


@dataclass(frozen=True, slots=True)
class Steering:
    """What a signature stands for: which call it is, and all that a sidecar takes from headers.

    Attributes:
        method: as it is sent; the target likewise: the path and, unless it is empty, `?` and the query.
        plan: value of x-pdcoord-plan, empty for none; the others likewise.
        prefills: value of x-prefiller-host-port.
        leg: value of x-pdcoord-leg.
    """

    method: bytes
    target: bytes
    request_id: bytes
    plan: bytes = b""
    prefills: bytes = b""
    leg: bytes = b""


class PlanKeys:
    """Secrets by name: the first signs, all verify.

    A rotation adds a key behind the others everywhere, then puts it first, then drops the old one.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        """Take the keys in order.

        Raises:
            KeysError: without a key, with too many, or with a name or a secret out of bounds.
        """
        if not 0 < len(keys) <= KEYS_MAX:
            raise KeysError(f"there are {len(keys)} keys; give 1 to {KEYS_MAX}, one a line as NAME:SECRET")
        for name, secret in keys.items():
            if _KEY_NAME.fullmatch(name) is None:
                raise KeysError(
                    "a key's name is not of 1 to 64 letters, digits and ._-; write NAME:SECRET on each line"
                )
            if not SECRET_BYTES_MIN <= len(secret) <= SECRET_BYTES_MAX:
                raise KeysError(
                    f"the secret of key {name} has {len(secret)} bytes; give {SECRET_BYTES_MIN} to "
                    f"{SECRET_BYTES_MAX}, such as from openssl rand -hex 32"
                )
        # Keyed once: half of what a short code costs is taking in the key.
        self._started = {
            name.encode(): hmac.new(secret, digestmod=hashlib.sha256) for name, secret in keys.items()
        }
        self._first = next(iter(self._started))

    def sign(self, what: Steering, now_s: float) -> bytes:
        """The header's value.

        Args:
            now_s: Unix time in seconds.
        """
        time = b"%d" % int(now_s)
        mac = self._mac(self._first, time, what)
        return b"v1;kid=%b;ts=%b;mac=%b" % (self._first, time, mac)

    def doubt(self, what: Steering, signature: bytes | None, now_s: float) -> Doubt | None:
        """Why a signature does not count; None if it does.

        Args:
            signature: the header's value; None where there is none.
            now_s: Unix time in seconds.
        """
        if signature is None:
            return Doubt.MISSING
        parts = _SIGNATURE.fullmatch(signature) if len(signature) <= SIGNATURE_BYTES_MAX else None
        if parts is None:
            return Doubt.MALFORMED
        name, time, mac = parts.groups()
        if name not in self._started:
            return Doubt.KEY_UNKNOWN
        if not hmac.compare_digest(self._mac(name, time, what), mac):
            return Doubt.WRONG
        # Behind the code: the time is only known to be the signer's once that is right.
        return Doubt.TOO_OLD if abs(now_s - int(time)) > SKEW_S_MAX else None

    def _mac(self, name: bytes, time: bytes, what: Steering) -> bytes:
        code = self._started[name].copy()
        head = (_VERSION, name, time, what.method, what.target)
        parts = (*head, what.request_id, what.plan, what.prefills, what.leg)
        code.update(b"".join([b"%d:%b" % (len(part), part) for part in parts]))
        return code.hexdigest().encode("ascii")


def read_keys(text: str) -> PlanKeys:
    """Keys from a file's text: NAME:SECRET on each line, `#` begins a comment line.

    Raises:
        KeysError: naming the line or the key at fault, never its secret.
    """
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        name, colon, secret = entry.partition(":")
        name = name.strip()
        if not colon:
            raise KeysError(f"line {number} is not NAME:SECRET; write a name, a colon and the secret")
        if name in keys:
            raise KeysError(f"line {number} has the name of an earlier line; give each key its own")
        keys[name] = secret.strip().encode("utf-8")
    return PlanKeys(keys)
