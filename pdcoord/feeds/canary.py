"""Carries out canaries: one prompt served by one engine alone, then split, and both answers held together.

The reference comes first, and both have a `cache_salt` of their own. Without salts neither order would be
safe: had the reference put the prompt in the decode engine's prefix cache, nothing would be pulled and the
split answer would be right whatever the path does; had the split answer come first, wrong KV would lie in
that cache under the right hash, and the reference would be as wrong.
"""

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from pdcoord.core.canary import CanaryBegan, CanaryJudged
from pdcoord.core.fleet import Endpoint
from pdcoord.core.likeness import CanaryOutcome, Finding, GreedyAnswer, compare
from pdcoord.core.ports import Handler
from pdcoord.core.trials import CanaryOrder
from pdcoord.front.upstream import Sign, served_of, steering_headers
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import CACHE_SALT_FIELD, SERVED
from pdcoord.protocol.plans import Mode, PlanHeader, PlannedLoad, PrefillTarget, ServedHeader
from pdcoord.wire.client import Client
from pdcoord.wire.errors import WireError
from pdcoord.wire.heads import Headers
from transfer.verdict import Connector

LOOK_S = 0.25
"""Time between two looks for orders that are due."""
ANSWER_BYTES_MAX = 1 << 20
_UNPROVEN = (
    "the answers are equal, and no sidecar of ours has spoken at the decode endpoint: nothing proves that "
    "the prompt was split, so the pair is observed only"
)
TOP_LOGPROBS = 5
"""Alternatives asked for at each place; a tie is seen only where the other engine's token is among them."""
_PATH = "/v1/completions"
_OK = 200

# What a leg that was given up says of the path. What is not here is load or an endpoint that is away, which
# breakers, probes and health see by themselves: the canary says nothing then.
_FAULTS = frozenset(
    {
        RungReason.TRANSFER_FAILED,
        RungReason.TRANSFER_TIMEOUT,
        RungReason.PREFILL_ERROR,
        RungReason.PREFILL_NO_TICKET,
    }
)

Told = Callable[[CanaryOrder, Finding], None]
"""Hears of each canary that ended, for metrics and the log."""


class _Logprobs(msgspec.Struct):
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]


_decoder = msgspec.json.Decoder(_Answer)


class _Untold(Exception):  # noqa: N818  # not an error: the canary says nothing
    """Why a canary says nothing of the path."""


class _Failed(Exception):  # noqa: N818  # not an error: the canary found something
    """The split request was given up for the path's own fault."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.detail)
        self.finding = finding


@dataclass(slots=True)
class CanaryFeed:
    """Looks for orders that are due and carries each out.

    Attributes:
        due: orders to carry out now; asked several times a second.
        told: for metrics and the log.
        sign: signs plans; None where they are not signed.
        authorization: what engines ask for besides, as headers.
        nonce: a word that was in no canary before.
    """

    handler: Handler
    due: Callable[[], Iterable[CanaryOrder]]
    client: Client
    told: Told
    sign: Sign | None = None
    authorization: Callable[[], Headers] = list
    nonce: Callable[[], str] = field(default=lambda: secrets.token_hex(8))

    async def run(self) -> None:
        """Look and carry out until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                for order in self.due():
                    self.handler.handle(CanaryBegan(order))
                    group.create_task(self._carry_out(order))
                await asyncio.sleep(LOOK_S)

    async def _carry_out(self, order: CanaryOrder) -> None:
        try:
            finding = await self._try(order)
        except _Failed as failed:
            finding = failed.finding
        except (_Untold, WireError, TimeoutError) as why:
            finding = Finding(CanaryOutcome.INCONCLUSIVE, str(why) or "no answer in time")
        self.handler.handle(CanaryJudged(order, finding))
        self.told(order, finding)

    async def _try(self, order: CanaryOrder) -> Finding:
        nonce = self.nonce()
        prompt = canary_prompt(nonce, round(_prompt_tokens(order) * order.bytes_per_token))
        body = _body(order, prompt)
        salt, where = {CACHE_SALT_FIELD: f"{nonce}-alone"}, order.reference
        alone, told = await self._ask(order, where, body | salt, None)
        split, served = await self._ask(
            order, order.decode, body | {CACHE_SALT_FIELD: f"{nonce}-split"}, order.prefill
        )
        found = compare(alone, split, order.rules.logprob_tolerance)
        if served is None and not found.outcome.is_failure:
            # Wrong is wrong whoever prefilled; right may be the decode engine's own doing.
            is_foreign = told is None or where.id != order.decode.id
            if is_foreign and not order.has_sidecar:
                return Finding(CanaryOutcome.UNPROVEN, _UNPROVEN)
            raise _Untold("the answers are equal, but no sidecar of ours says that the prompt was split")
        if served is not None and not _is_split_over(served, order):
            raise _Untold(f"served otherwise: {_way_of(served)}")
        return found

    async def _ask(
        self, order: CanaryOrder, where: Endpoint, body: dict[str, object], prefill: Endpoint | None
    ) -> tuple[GreedyAnswer, ServedHeader | None]:
        """One answer, and how its sidecar says it was served."""
        timeout_s = order.rules.timeout_s
        request_id = f"canary-{secrets.token_hex(8)}".encode()
        headers = steering_headers(_plan(order, prefill), request_id, _PATH, self.sign)
        async with asyncio.timeout(timeout_s):
            response = await self.client.request(
                "POST",
                where.address,
                _PATH,
                headers=[(b"content-type", b"application/json"), *headers, *self.authorization()],
                body=msgspec.json.encode(body),
                head_timeout_s=timeout_s,
            )
            async with response:
                raw = await response.read_all(timeout_s=timeout_s, bytes_max=ANSWER_BYTES_MAX)
        served = served_of(response.header(SERVED))
        if response.status != _OK:
            _give_up(order, where, prefill, response.status, served)
        try:
            return _answer(_decoder.decode(raw)), served
        except (msgspec.DecodeError, UnicodeDecodeError, IndexError) as error:
            raise _Untold(f"{where.id} answered with no completion: {type(error).__name__}") from error


def _give_up(
    order: CanaryOrder, where: Endpoint, prefill: Endpoint | None, status: int, served: ServedHeader | None
) -> None:
    """Raise what an answer other than 200 says."""
    reason = served.rungs[-1].reason if served is not None and served.rungs else None
    if prefill is None or reason not in _FAULTS:
        alone = "alone" if prefill is None else "split"
        raise _Untold(f"{where.id} did not serve it {alone}: HTTP {status}{f', {reason}' if reason else ''}")
    is_verified = order.decode.pool.side.connector is Connector.PDCOORD
    if reason is RungReason.TRANSFER_FAILED and is_verified:
        detail = "the connector gave the KV up: a digest that is wrong, or a transfer that failed"
        raise _Failed(Finding(CanaryOutcome.DIGEST, detail))
    raise _Failed(Finding(CanaryOutcome.ERROR, f"the split request failed: {reason}"))


def _plan(order: CanaryOrder, prefill: Endpoint | None) -> PlanHeader:
    """The plan of either request. Booked as another's, by all replicas, so that it disturbs no lesson."""
    tokens = _prompt_tokens(order)
    moved = tokens * prefill.pool.kv_bytes_per_token if prefill is not None else 0
    targets = [
        PrefillTarget(address=each.address, bootstrap_port=each.bootstrap_port, kv_port=each.kv_port)
        for each in (prefill,)
        if each is not None
    ]
    return PlanHeader(
        prefills=tuple(targets),
        dialect=order.dialect,
        is_colocated_allowed=prefill is None,
        prefill_deadline_ms=order.rules.timeout_s * 1e3,
        transfer_deadline_ms=order.rules.timeout_s * 1e3,
        load=PlannedLoad(
            model=order.model,
            prefill_us=round((prefill or order.decode).pool.speed.prefill_s(tokens) * 1e6),
            prompt_tokens=tokens,
            landing_tokens=tokens,
            transfer_bytes=moved,
        ),
    )


def _prompt_tokens(order: CanaryOrder) -> int:
    return max(order.rules.prompt_tokens, order.prompt_tokens_min)


def _body(order: CanaryOrder, prompt: str) -> dict[str, object]:
    return {
        "model": order.model,
        "prompt": prompt,
        "max_tokens": order.rules.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": TOP_LOGPROBS,
        "return_token_ids": True,
        # Else alternatives go by their text, which several tokens share where a token is part of a character.
        "return_tokens_as_token_ids": True,
        "stream": False,
    }


def _is_split_over(served: ServedHeader, order: CanaryOrder) -> bool:
    return served.mode is Mode.SPLIT and served.prefill == order.prefill.address


def _way_of(served: ServedHeader) -> str:
    reason = f" after {served.rungs[-1].reason}" if served.rungs else ""
    return f"{served.mode}{reason}"


def _answer(answer: _Answer) -> GreedyAnswer:
    choice = answer.choices[0]
    told = choice.logprobs or _Logprobs()
    words, ids = told.tokens or [], choice.token_ids or []
    tokens: list[int] | list[str] = ids or words
    count = len(tokens)
    # What does not go with the tokens place by place is as good as not told.
    words = words if len(words) == count else []
    chosen = [value for value in told.token_logprobs or [] if value is not None]
    tops = [top or {} for top in told.top_logprobs or []]
    return GreedyAnswer(
        tokens=tuple(tokens),
        words=tuple(words),
        logprobs=tuple(chosen) if len(chosen) == count else (),
        tops=tuple(tops) if len(tops) == count else (),
        text=choice.text,
    )


def canary_prompt(nonce: str, byte_count: int) -> str:
    """About so many bytes of text whose continuation hangs on the beginning as well as on the end.

    A list of numbers drawn from the nonce, and the request to go on with it from one of its lines on. Its
    length changes with the nonce, so that the last block of either side is seldom full.
    """
    drawn = hashlib.sha256(nonce.encode()).digest()
    head, filler = f"List {nonce}:\n", "so " * (drawn[0] % 61)
    lines: list[str] = []
    size = len(head)
    while size < byte_count or not lines:
        number = int.from_bytes(hashlib.sha256(f"{nonce} {len(lines)}".encode()).digest()[:4], "big")
        lines.append(f"item {len(lines):03}: {10_000 + number % 90_000}\n")
        size += len(lines[-1])
    place = drawn[1] % len(lines)
    return f"{head}{''.join(lines)}And {filler}the same list from item {place:03} on:\nitem {place:03}:"
