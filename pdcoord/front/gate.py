"""Who may come in, and what for: API keys with their models, rates, tenants and cache salts."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from pdcoord.core.model import Model
from pdcoord.core.request import Request
from pdcoord.front.keys import (
    API_KEY,
    AUTHORIZATION,
    ApiKey,
    KeyFault,
    KeyRing,
    presented_key,
)
from pdcoord.front.rates import SLACK_S, KeyRates, RateKind
from pdcoord.front.salt import SALTED_PATHS, cache_salt, media_id_field
from pdcoord.front.upstream import with_fields
from pdcoord.protocol.errors import Refusal, RefusedError, RefuseReason
from pdcoord.protocol.headers import CACHE_SALT_FIELD, FAIRNESS_ID
from pdcoord.protocol.openai import Call

Headers = list[tuple[bytes, bytes]]

_OF_KEY = frozenset({AUTHORIZATION, API_KEY, *FAIRNESS_ID})
"""Headers that the key decides: they say who a client is, and none of them goes to an engine."""

_SCHEDULING_FIELDS = frozenset({"priority", "data_parallel_rank", "routed_dp_rank", "request_id", "rid"})
"""Of a body, taken by vLLM 0.32 or SGLang 0.5.23: who goes first, on which rank, and under whose name."""


class GateObserver(Protocol):
    """Hears who was turned away."""

    def key_refused(self, fault: KeyFault) -> None: ...

    def rate_limited(self, key: str, kind: RateKind) -> None:
        """Of a key by its name in the file."""
        ...


class Gate:
    """Lets calls in by their keys; one for the whole process.

    Without keys it is open, and passes on whatever a client sends. Memory is bounded by the keys in force:
    each has two buckets.

    Args:
        clock: monotonic seconds.
        wall: seconds since 1970, which keys expire by.
        observer: None where nobody counts.
    """

    def __init__(
        self, *, clock: Callable[[], float], wall: Callable[[], float], observer: GateObserver | None = None
    ) -> None:
        self.clock = clock
        self._wall = wall
        self._observer = observer
        self._ring: KeyRing | None = None
        self._rates: dict[str, KeyRates] = {}
        self.engine_key: bytes | None = None
        """What engines are sent as their own key; None to leave what the client sent, or nothing."""

    @property
    def is_open(self) -> bool:
        """No key is asked for."""
        return self._ring is None

    def engine_headers(self) -> Headers:
        """What engines are sent so that they let us in."""
        return [] if self.engine_key is None else [(AUTHORIZATION, b"Bearer " + self.engine_key)]

    def use(self, ring: KeyRing) -> None:
        """Let in by these keys from now on; calls under way go on, and what a key has used stays used."""
        rates: dict[str, KeyRates] = {}
        for key in ring.keys:
            own = rates[key.name] = self._rates.get(key.name) or KeyRates(None, None)
            own.set(key.requests_per_minute, key.tokens_per_minute)
        self._ring, self._rates = ring, rates

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> "Visa":
        """Whose call it is; none of its key's rates is touched.

        Raises:
            RefusedError: 401, the same for every fault.
        """
        ring = self._ring
        if ring is None:
            return Visa(self)
        presented = presented_key(headers)
        found = presented if isinstance(presented, KeyFault) else ring.find(presented, self._wall())
        if isinstance(found, KeyFault):
            if self._observer is not None:
                self._observer.key_refused(found)
            raise RefusedError(_UNAUTHORIZED)
        return Visa(self, found, ring.salt_secret, self._rates[found.name])

    def limited(self, key: str, kind: RateKind, wait_s: float) -> RefusedError:
        """What whoever must wait is told."""
        if self._observer is not None:
            self._observer.rate_limited(key, kind)
        retry_after_s = math.ceil(wait_s - SLACK_S)
        message = f"This API key has used up its {kind} per minute; retry after {retry_after_s} s."
        return RefusedError(Refusal(RefuseReason.RATE_LIMITED, message, retry_after_s=retry_after_s))


class Visa:
    """What one call may do; everything where the gate is open.

    Attributes:
        key_name: for the log; None where the gate is open.
    """

    __slots__ = ("_gate", "_key", "_output_tokens_max", "_rates", "_secret", "key_name")

    def __init__(
        self, gate: Gate, key: ApiKey | None = None, secret: bytes = b"", rates: KeyRates | None = None
    ) -> None:
        self._gate = gate
        self._key = key
        self._secret = secret
        self._rates = rates
        self._output_tokens_max = 0
        self.key_name = key.name if key is not None else None

    def headers(self, client: Iterable[tuple[bytes, bytes]]) -> Headers:
        """A client's headers without its key, as the key's tenant, and with the engines' own key."""
        removed = self.removed()
        return [pair for pair in client if pair[0] not in removed] + self.added()

    def removed(self) -> frozenset[bytes]:
        """Names of headers that must not go on as the client sent them."""
        if self._key is not None:
            return _OF_KEY
        return frozenset({AUTHORIZATION}) if self._gate.engine_key is not None else frozenset()

    def added(self) -> Headers:
        """Headers in their place."""
        added: Headers = []
        if self._key is not None:
            added.append((FAIRNESS_ID[0], self._key.tenant.encode("ascii")))
        return added + self._gate.engine_headers()

    def may_use(self, model: Model) -> bool:
        """Whether the key is for this model, by any of its names."""
        return self._key is None or self._key.is_for((model.name, *model.aliases))

    def check_model(self, model: Model) -> None:
        """Refuse a model that the key is not for.

        Raises:
            RefusedError: 403.
        """
        if not self.may_use(model):
            message = (
                f"This API key is not for the model '{model.name}'; GET /v1/models lists those it is for."
            )
            raise RefusedError(Refusal(RefuseReason.MODEL_FORBIDDEN, message, "model"))

    def salted(self, call: Call) -> Call:
        """The call with the salt under which engines cache its prefix in place of the client's own.

        Raises:
            RefusedError: 400 for media that are named by an id, which no salt keeps apart.
        """
        if self._key is None:
            return call
        field = media_id_field(call)
        if field is not None:
            message = (
                f"'{field}' names media in a cache that all API keys share; leave it out and send the media."
            )
            raise RefusedError(Refusal(RefuseReason.INVALID_FIELD, message, field))
        if call.api.path not in SALTED_PATHS:
            return call
        return replace(call, cache_salt=cache_salt(self._secret, self._key.salt_group, call.cache_salt))

    def body(self, raw: bytes, call: Call, model: Model) -> bytes:
        """What goes upstream: `raw` itself, unless its model has another name there or a key was asked for.

        Then it has the salt, and nothing by which its sender would go before others.
        """
        texts: dict[str, str] = {}
        dropped = _SCHEDULING_FIELDS & call.body.keys() if self._key is not None else frozenset()
        if call.model != model.name:
            texts["model"] = model.name
        if self._key is not None and call.api.path in SALTED_PATHS:
            texts[CACHE_SALT_FIELD] = call.cache_salt
        return with_fields(raw, texts, dropped) if texts or dropped else raw

    def take_request(self) -> None:
        """Count the call against the key's requests.

        Raises:
            RefusedError: 429 if there are none left.
        """
        self._check(RateKind.REQUESTS, self._rates.take_request(self._gate.clock()) if self._rates else 0.0)

    def take_prompt(self, request: Request) -> None:
        """Count the prompt against the key's tokens, once, before any work is done for it.

        Raises:
            RefusedError: 429 if there are not enough left.
        """
        if self._rates is not None:
            wait_s = self._rates.take_tokens(request.prompt_tokens, self._gate.clock())
            self._check(RateKind.TOKENS, wait_s)
            self._output_tokens_max = (request.output_tokens_max or 0) if request.is_generative else 0

    def settle(self, output_tokens: int | None, *, has_begun: bool) -> None:
        """Count the answer's tokens, once it has ended.

        Where they cannot be counted in an answer that began, as many as the call allowed count.
        """
        if self._rates is not None:
            unknown = self._output_tokens_max if has_begun else 0
            count = unknown if output_tokens is None else output_tokens
            self._output_tokens_max = 0
            self._rates.charge_tokens(count, self._gate.clock())

    def _check(self, kind: RateKind, wait_s: float) -> None:
        if wait_s and self._key is not None:
            raise self._gate.limited(self._key.name, kind, wait_s)


_UNAUTHORIZED = Refusal(
    RefuseReason.UNAUTHORIZED,
    "No API key that is in force came with this call; send one as Authorization: Bearer KEY or in x-api-key.",
)
