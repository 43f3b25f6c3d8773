"""Who may come in, and what for: API keys with their models, rates, tenants and cache salts."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from pdcoord.core.events import Outcome
from pdcoord.core.model import Model
from pdcoord.core.plan import Figures, Plan
from pdcoord.core.request import Request
from pdcoord.front.asked import Asked
from pdcoord.front.fields import DROPPED, UNCOUNTED, refused_field
from pdcoord.front.keys import (
    API_KEY,
    AUTHORIZATION,
    ApiKey,
    KeyFault,
    KeyRing,
    presented_key,
)
from pdcoord.front.ports import CallRecord
from pdcoord.front.rates import SLACK_S, KeyRates, RateKind
from pdcoord.front.salt import SALTED_PATHS, cache_salt, media_id_field
from pdcoord.front.upstream import with_fields
from pdcoord.protocol.errors import Refusal, RefusedError, RefuseReason
from pdcoord.protocol.headers import CACHE_SALT_FIELD, FAIRNESS_ID
from pdcoord.protocol.openai import Call

Headers = list[tuple[bytes, bytes]]

_ENGINES_OWN = frozenset({b"x-session-id", b"x-smg-routing-key", b"x-custom-labels"})
"""By these vLLM 0.32 and SGLang 0.5.23 tell callers apart: what is kept, who goes first, who is counted."""

_OF_KEY = frozenset({AUTHORIZATION, API_KEY, *FAIRNESS_ID}) | _ENGINES_OWN
"""Headers that the key decides: they say who a client is, and none of them goes to an engine."""

_STEP_S_MIN = 1e-4
"""No engine's token takes less: what a prediction of nothing would be divided by."""


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

    __slots__ = (
        "_choice_count",
        "_gate",
        "_key",
        "_output_tokens_max",
        "_rates",
        "_secret",
        "_sent",
        "key_name",
    )

    def __init__(
        self, gate: Gate, key: ApiKey | None = None, secret: bytes = b"", rates: KeyRates | None = None
    ) -> None:
        self._gate = gate
        self._key = key
        self._secret = secret
        self._rates = rates
        self._choice_count = 0
        self._output_tokens_max: int | None = None
        self._sent: tuple[float, Figures] | None = None
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

    def may_use(self, model: Model, name: str) -> bool:
        """Whether the key is for what this name of the model asks for.

        A key for the model, by whichever name, is for its adapters too; one for an adapter is for no other.
        """
        if self._key is None or self._key.is_for((model.name, *model.aliases)):
            return True
        return self._key.is_for((name,)) and model.adapter_of(name) == name

    def check_model(self, model: Model, name: str) -> None:
        """Refuse a name of a model that the key is not for.

        Raises:
            RefusedError: 403.
        """
        if not self.may_use(model, name):
            shown = model.adapter_of(name) or model.name
            message = f"This API key is not for the model '{shown}'; GET /v1/models lists those it is for."
            raise RefusedError(Refusal(RefuseReason.MODEL_FORBIDDEN, message, "model"))

    def granted(self, asked: Asked, model: Model) -> Asked:
        """What admission is asked for, without what would put the call before those of others.

        An objective that is not for the key counts as none. So does a pace that is laxer than the policy's,
        which would let the call into a batch of others that is to be no slower.
        """
        if self._key is None:
            return asked
        if not self._key.may_ask_for(asked.objective, asked.priority(model)):
            asked = replace(asked, is_lowered=True)
        own_s, usual_s = asked.slo.tpot_s, model.slo.tpot_s
        if own_s is not None and usual_s is not None and own_s > usual_s:
            asked = replace(asked, slo=replace(asked.slo, tpot_s=None))
        return asked

    def salted(self, call: Call) -> Call:
        """The call with the salt under which engines cache its prefix in place of the client's own.

        Raises:
            RefusedError: 400 for media that are named by an id, which no salt keeps apart, and for whatever
                else chooses an adapter or reaches what another key left in an engine.
        """
        if self._key is None:
            return call
        refused = refused_field(call)
        if refused is not None:
            name, why = refused
            raise RefusedError(Refusal(RefuseReason.INVALID_FIELD, f"'{name}' {why}.", name))
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

        Then it has the salt, and nothing by which its sender would go before others or uncounted.
        """
        texts: dict[str, str] = {}
        dropped = self._dropped & call.body.keys()
        name = model.adapter_of(call.model) or model.name
        if call.model != name:
            texts["model"] = name
        if self._key is not None and call.api.path in SALTED_PATHS:
            texts[CACHE_SALT_FIELD] = call.cache_salt
        return with_fields(raw, texts, dropped) if texts or dropped else raw

    @property
    def _dropped(self) -> frozenset[str]:
        if self._key is None:
            return frozenset()
        return DROPPED if self._key.tokens_per_minute is None else DROPPED | UNCOUNTED

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
            self._choice_count = request.choice_count if request.is_generative else 0
            self._output_tokens_max = request.output_tokens_max

    def sent(self, plan: Plan) -> None:
        """An engine is asked; of several attempts the first counts."""
        if self._rates is not None and self._sent is None:
            self._sent = self._gate.clock(), plan.chosen.figures

    def settle(self, record: CallRecord) -> None:
        """Count the answer's tokens, once the call has ended.

        Where they cannot be counted in an answer that began, as many as the call allowed count; without a
        limit, and where nothing had begun when the client left or time ran out, as many as the engine is
        predicted to have made by then. What an engine failed at before that costs nothing.
        """
        if self._rates is None:
            return
        now_s = self._gate.clock()
        if record.output_tokens is not None:
            count = record.output_tokens
        elif record.first_byte_s is not None:
            made_s = now_s if record.is_stream else record.first_byte_s
            count = self._made(made_s) if self._allowed is None else self._allowed
        elif record.outcome is Outcome.CLIENT_GONE or record.reason is RefuseReason.UPSTREAM_TIMEOUT:
            count = self._made(now_s)
        else:
            count = 0
        self._choice_count = 0
        self._rates.charge_tokens(count, now_s)

    @property
    def _allowed(self) -> int | None:
        """Output tokens of all choices; None without a limit."""
        if not self._choice_count:
            return 0
        return None if self._output_tokens_max is None else self._output_tokens_max * self._choice_count

    def _made(self, now_s: float) -> int:
        """Output tokens that an engine is predicted to have made by then, within what is allowed."""
        if self._sent is None:
            return 0
        sent_s, figures = self._sent
        # The first one is there after `ttft_s`, and each takes one step.
        passed_s = max(now_s - sent_s - figures.ttft_s, 0.0)
        made = math.ceil(passed_s / max(figures.step_s, _STEP_S_MIN)) * self._choice_count
        return made if self._allowed is None else min(made, self._allowed)

    def _check(self, kind: RateKind, wait_s: float) -> None:
        if wait_s and self._key is not None:
            raise self._gate.limited(self._key.name, kind, wait_s)


_UNAUTHORIZED = Refusal(
    RefuseReason.UNAUTHORIZED,
    "No API key that is in force came with this call; send one as Authorization: Bearer KEY or in x-api-key.",
)
