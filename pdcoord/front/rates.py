"""Rates of an API key: token buckets that hold one minute's worth; pure, time comes in as `now_s`."""

from dataclasses import dataclass
from enum import StrEnum

_MINUTE_S = 60.0
SLACK_S = 1e-6
"""Rounding must not have whoever waited as long as told wait again."""


class RateKind(StrEnum):
    """What a rate is of; closed, a label of metrics."""

    REQUESTS = "requests"
    TOKENS = "tokens"


@dataclass(slots=True)
class Bucket:
    """How much of a rate is used up.

    In any t minutes no more than (1 + t) times the rate is let through, and what a single charge had beyond a
    whole bucket: that is a debt, paid before anything else is let through.

    Attributes:
        per_minute: at least 1; may be changed at any time, what is used stays used.
        used: of the bucket, as of `at_s`.
    """

    per_minute: int
    used: float = 0.0
    at_s: float = 0.0

    def wait_s(self, cost: float, now_s: float) -> float:
        """How long until `cost` fits, if nobody else takes of it; 0.0 if it does.

        What is more than a whole bucket fits an untouched one.
        """
        self._refill(now_s)
        excess = self.used + min(cost, float(self.per_minute)) - self.per_minute
        wait_s = excess * _MINUTE_S / self.per_minute
        return wait_s if wait_s > SLACK_S else 0.0

    def charge(self, cost: float, now_s: float) -> None:
        """Take `cost`, whether it fits or not."""
        self._refill(now_s)
        self.used += cost

    def validate(self) -> None:
        """Assert what holds between calls."""
        assert self.used >= 0.0, "more is left than a bucket holds"
        assert self.per_minute >= 1, "a rate of nothing would never let anything through"

    def _refill(self, now_s: float) -> None:
        passed_s = max(now_s - self.at_s, 0.0)
        self.used = max(self.used - passed_s * self.per_minute / _MINUTE_S, 0.0)
        self.at_s = max(now_s, self.at_s)


class KeyRates:
    """Both rates of one key; either may be None for no limit."""

    __slots__ = ("requests", "tokens")

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.set(requests_per_minute, tokens_per_minute)

    def set(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        """Other rates from now on."""
        self.requests = _with_rate(self.requests, requests_per_minute)
        self.tokens = _with_rate(self.tokens, tokens_per_minute)

    def take_request(self, now_s: float) -> float:
        """Count one request, unless it must wait: then how long, and it does not count."""
        if self.requests is None:
            return 0.0
        wait_s = self.requests.wait_s(1.0, now_s)
        if not wait_s:
            self.requests.charge(1.0, now_s)
        return wait_s

    def take_tokens(self, count: int, now_s: float) -> float:
        """Count a prompt, unless it must wait: then how long until it and its request fit."""
        if self.tokens is None:
            return 0.0
        wait_s = self.tokens.wait_s(float(count), now_s)
        if not wait_s:
            self.tokens.charge(float(count), now_s)
            return 0.0
        return max(wait_s, self.requests.wait_s(1.0, now_s) if self.requests is not None else 0.0)

    def charge_tokens(self, count: int, now_s: float) -> None:
        """Count tokens that are there already."""
        if self.tokens is not None:
            self.tokens.charge(float(count), now_s)


def _with_rate(bucket: Bucket | None, per_minute: int | None) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute)
    bucket.per_minute = per_minute
    return bucket
