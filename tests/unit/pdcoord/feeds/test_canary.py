"""The canary's edge: what is sent, in which order, and what each kind of answer comes to."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.canary import CanaryBegan, CanaryJudged
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import Action, Event
from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.likeness import CanaryOutcome, Finding
from pdcoord.core.model import CanaryRules
from pdcoord.core.trials import CanaryOrder
from pdcoord.feeds.canary import CanaryFeed, canary_prompt
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import (
    DialectName,
    Mode,
    RungKind,
    RungTaken,
    ServedHeader,
    decode_plan,
    encode_served,
)
from pdcoord.wire.client import Client
from pdcoord.wire.errors import ConnectError
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

FAST = Pool(
    PoolName("fast"),
    ModelName("m"),
    Role.PREFILL,
    "nvidia",
    EngineKind.VLLM,
    Side(Connector.PDCOORD, KvLayout(16)),
    SpeedFigures(0.01, 1e-4, 0.01),
    1_000,
    1e10,
)
WIDE = replace(FAST, name=PoolName("wide"), role=Role.DECODE, vendor="gaudi")
PREFILL = Endpoint(EndpointId("fast/0"), FAST, HostPort("fast:80"), kv_port=7)
DECODE = Endpoint(EndpointId("wide/0"), WIDE, HostPort("wide:80"))
ORDER = CanaryOrder(
    0,
    ModelName("m"),
    PREFILL,
    DECODE,
    DECODE,
    CanaryRules(),
    DialectName.NIXLV2,
    prompt_tokens_min=40,
    bytes_per_token=4.0,
)
SPLIT = ServedHeader(mode=Mode.SPLIT, prefill=PREFILL.address)
ALONE = ServedHeader(mode=Mode.COLOCATED)


def body_of(text: str, **more: Any) -> bytes:
    return msgspec.json.encode({"choices": [{"text": text, "index": 0, **more}]})


def logprobs(words: str, *values: float) -> dict[str, Any]:
    tops = [{word: value} for word, value in zip(words, values, strict=True)]
    return {"tokens": list(words), "token_logprobs": list(values), "top_logprobs": tops}


@dataclass
class Reply:
    body: bytes = b""
    status: int = 200
    served: ServedHeader | None = SPLIT

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def read_all(self, *, timeout_s: float, bytes_max: int) -> bytes:
        assert timeout_s > 0.0
        assert len(self.body) <= bytes_max
        return self.body

    def header(self, name: bytes) -> bytes | None:
        assert name == b"x-pdcoord-served"
        return None if self.served is None else encode_served(self.served)


@dataclass
class ScriptedClient:
    """Answers in turn, and keeps what it was asked."""

    replies: list[Reply | Exception]
    asked: list[tuple[HostPort, dict[bytes, bytes], dict[str, Any]]] = field(default_factory=list)

    async def request(
        self,
        method: str,
        address: HostPort,
        target: str,
        *,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes,
        head_timeout_s: float,
    ) -> Reply:
        assert (method, target) == ("POST", "/v1/completions")
        assert head_timeout_s == ORDER.rules.timeout_s
        self.asked.append((address, dict(headers), msgspec.json.decode(body)))
        reply = self.replies[len(self.asked) - 1]
        if isinstance(reply, Exception):
            raise reply
        return reply


async def carried_out(
    *replies: Reply | Exception, order: CanaryOrder = ORDER, **more: Any
) -> tuple[Finding, ScriptedClient]:
    """What one order came to."""
    client = ScriptedClient(list(replies))
    due, told = [order], asyncio.Queue[Finding]()
    events: list[Event] = []

    class Handling:
        def handle(self, event: Event) -> list[Action]:
            events.append(event)
            return []

    def take() -> list[CanaryOrder]:
        taken = due[:]
        due.clear()
        return taken

    feed = CanaryFeed(
        Handling(), take, cast("Client", client), lambda _order, finding: told.put_nowait(finding), **more
    )
    async with asyncio.TaskGroup() as group:
        running = group.create_task(feed.run())
        finding = await told.get()
        running.cancel()
    assert events == [CanaryBegan(order), CanaryJudged(order, finding)]
    return finding, client


async def test_the_reference_comes_first_and_neither_may_find_the_other_in_a_cache() -> None:
    same = Reply(body_of("abc", token_ids=[1, 2, 3]))
    finding, client = await carried_out(replace(same, served=ALONE), same)
    assert finding == Finding(CanaryOutcome.PASSED)
    (first, alone_headers, alone), (second, split_headers, split) = client.asked
    assert (first, second) == (DECODE.address, DECODE.address)
    assert alone.pop("cache_salt") != split.pop("cache_salt")
    assert alone == split
    assert (alone["temperature"], alone["max_tokens"], alone["ignore_eos"]) == (0, 16, True)
    # By their text several tokens may have one name.
    assert (alone["return_token_ids"], alone["return_tokens_as_token_ids"]) == (True, True)
    assert decode_plan(alone_headers[b"x-pdcoord-plan"]).prefills == ()
    plan = decode_plan(split_headers[b"x-pdcoord-plan"])
    (target,) = plan.prefills
    assert (target.address, target.kv_port, plan.is_colocated_allowed) == (PREFILL.address, 7, False)
    assert plan.load is not None
    # Of no replica, so that every replica books it as a request of another's.
    assert (plan.load.replica, plan.load.model) == ("", "m")
    assert split_headers[b"x-prefiller-host-port"] == b"fast:80"
    assert alone_headers[b"x-request-id"] != split_headers[b"x-request-id"]


async def test_canaries_have_prompts_of_their_own() -> None:
    prompts = set()
    for _ in range(3):
        _, client = await carried_out(Reply(body_of("a"), served=ALONE), Reply(body_of("a")))
        prompts.add(client.asked[0][2]["prompt"])
    assert len(prompts) == 3


async def test_requests_are_signed_and_carry_what_engines_ask_for() -> None:
    signed: list[bytes] = []

    def sign(what: Any) -> list[tuple[bytes, bytes]]:
        signed.append(what.request_id)
        return [(b"x-pdcoord-plan-signature", b"s")]

    reply = Reply(body_of("a"))
    _, client = await carried_out(reply, reply, sign=sign, authorization=lambda: [(b"authorization", b"k")])
    assert signed == [headers[b"x-request-id"] for _, headers, _ in client.asked]
    assert all(headers[b"authorization"] == b"k" for _, headers, _ in client.asked)
    assert all(headers[b"x-pdcoord-plan-signature"] == b"s" for _, headers, _ in client.asked)


async def test_other_tokens_fail_and_a_tie_does_not() -> None:
    alone = body_of("ab", logprobs=logprobs("ab", -0.1, -0.7))
    split = body_of("ax", logprobs=logprobs("ax", -0.1, -0.7))
    finding, _ = await carried_out(Reply(alone), Reply(split))
    assert (finding.outcome, finding.position) == (CanaryOutcome.TOKENS, 1)
    tie = {"tokens": ["a", "b"], "token_logprobs": [-0.1, -0.7], "top_logprobs": [{}, {"b": -0.7, "x": -0.8}]}
    other = {**tie, "tokens": ["a", "x"], "token_logprobs": [-0.1, -0.6]}
    finding, _ = await carried_out(
        Reply(body_of("ab", logprobs=tie)), Reply(body_of("ax", logprobs=other)), order=ORDER
    )
    assert (finding.outcome, finding.position) == (CanaryOutcome.PASSED, 1)


@pytest.mark.parametrize(
    ("served", "text", "outcome"),
    [
        (ALONE, "same", CanaryOutcome.INCONCLUSIVE),
        (ALONE, "other", CanaryOutcome.INCONCLUSIVE),
        (ServedHeader(mode=Mode.SPLIT, prefill=HostPort("else:80")), "other", CanaryOutcome.INCONCLUSIVE),
        (None, "same", CanaryOutcome.INCONCLUSIVE),
        (None, "other", CanaryOutcome.TOKENS),
    ],
)
async def test_only_what_went_over_the_path_speaks_of_it(
    served: ServedHeader | None, text: str, outcome: CanaryOutcome
) -> None:
    finding, _ = await carried_out(Reply(body_of("same")), Reply(body_of(text), served=served))
    assert finding.outcome is outcome


async def test_behind_a_foreign_sidecar_a_right_answer_is_unproven() -> None:
    mute, right = Reply(body_of("a"), served=None), CanaryOutcome.UNPROVEN
    assert (await carried_out(mute, mute))[0].outcome is right
    wrong = await carried_out(mute, Reply(body_of("b"), served=None))
    assert wrong[0].outcome is CanaryOutcome.TOKENS
    spoken = await carried_out(mute, mute, order=replace(ORDER, has_sidecar=True))
    assert spoken[0].outcome is CanaryOutcome.INCONCLUSIVE
    # What another endpoint's sidecar says of the reference says nothing of the decode endpoint's.
    other = replace(DECODE, id=EndpointId("wide/1"), address=HostPort("other:80"))
    elsewhere = await carried_out(
        Reply(body_of("a"), served=ALONE), mute, order=replace(ORDER, reference=other)
    )
    assert elsewhere[0].outcome is right


def failed(reason: RungReason, status: int = 503) -> Reply:
    rung = RungTaken(rung=RungKind.REFUSE, reason=reason, target=PREFILL.address)
    return Reply(b"{}", status, ServedHeader(mode=Mode.COLOCATED, rungs=(rung,)))


@pytest.mark.parametrize(
    ("reason", "connector", "outcome"),
    [
        (RungReason.TRANSFER_FAILED, Connector.PDCOORD, CanaryOutcome.DIGEST),
        (RungReason.TRANSFER_FAILED, Connector.NIXL, CanaryOutcome.ERROR),
        (RungReason.TRANSFER_TIMEOUT, Connector.PDCOORD, CanaryOutcome.ERROR),
        (RungReason.PREFILL_NO_TICKET, Connector.NIXL, CanaryOutcome.ERROR),
        (RungReason.PREFILL_ERROR, Connector.NIXL, CanaryOutcome.ERROR),
        (RungReason.PREFILL_UNREACHABLE, Connector.PDCOORD, CanaryOutcome.INCONCLUSIVE),
        (RungReason.PREFILL_OVERLOADED, Connector.PDCOORD, CanaryOutcome.INCONCLUSIVE),
        (RungReason.TARGET_NOT_ALLOWED, Connector.PDCOORD, CanaryOutcome.INCONCLUSIVE),
    ],
)
async def test_a_leg_that_was_given_up_says_what_it_says(
    reason: RungReason, connector: Connector, outcome: CanaryOutcome
) -> None:
    pool = replace(WIDE, side=Side(connector, KvLayout(16)))
    order = replace(ORDER, decode=replace(DECODE, pool=pool))
    finding, _ = await carried_out(Reply(body_of("a")), failed(reason), order=order)
    assert finding.outcome is outcome


@pytest.mark.parametrize(
    "replies",
    [
        (ConnectError("refused"),),
        (TimeoutError(),),
        (Reply(b"{}", 400, None),),
        (Reply(b"not json"),),
        (Reply(b'{"choices": []}'),),
        (Reply(body_of("a")), ConnectError("refused")),
        (Reply(body_of("a")), Reply(b"{}", 429, None)),
        (failed(RungReason.TRANSFER_FAILED),),
    ],
)
async def test_what_could_not_be_asked_says_nothing(replies: tuple[Reply | Exception, ...]) -> None:
    finding, client = await carried_out(*replies)
    assert finding.outcome is CanaryOutcome.INCONCLUSIVE
    assert finding.detail
    assert len(client.asked) == len(replies)


async def test_an_answer_never_stands_in_a_finding() -> None:
    finding, _ = await carried_out(
        Reply(body_of("hidden", token_ids=[4, 5])), Reply(body_of("shown", token_ids=[4, 6]))
    )
    assert "hidden" not in finding.detail
    assert "shown" not in finding.detail


async def test_lists_that_do_not_go_with_the_tokens_are_left_out() -> None:
    odd = {"tokens": ["a"], "token_logprobs": [None, -0.5], "top_logprobs": [None]}
    reply = Reply(body_of("ab", token_ids=[1, 2], logprobs=odd))
    finding, _ = await carried_out(reply, reply)
    assert finding.outcome is CanaryOutcome.PASSED


@given(st.text("0123456789abcdef", min_size=1, max_size=16), st.integers(1, 4_000))
def test_a_prompt_is_about_as_long_as_asked_and_ends_in_a_question(nonce: str, byte_count: int) -> None:
    prompt = canary_prompt(nonce, byte_count)
    assert prompt == canary_prompt(nonce, byte_count)
    assert byte_count <= len(prompt.encode()) <= byte_count + 300
    last = prompt.rpartition("\n")[2]
    assert f"\n{last} " in prompt  # the line that it asks for is in the list


def test_the_last_block_is_filled_differently_each_time() -> None:
    lengths = [len(canary_prompt(f"{index:x}", 1_600)) for index in range(40)]
    assert len({length % 128 for length in lengths}) > 15
