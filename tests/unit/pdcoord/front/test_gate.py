"""The gate lets in by key, and what it lets in is bound by the key: models, tenant, salt and rates."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pdcoord.core.events import Outcome
from pdcoord.core.model import AdmissionRules, Model, Slo
from pdcoord.core.request import Request, RequestId
from pdcoord.front.asked import Asked, asked_of
from pdcoord.front.fields import DROPPED
from pdcoord.front.gate import Gate, Visa
from pdcoord.front.intake import build_request
from pdcoord.front.keys import KEY_RANDOM_BYTES, ApiKey, KeyFault, KeyRing, digest_of, make_key
from pdcoord.front.ports import CallRecord
from pdcoord.front.rates import RateKind
from pdcoord.front.salt import named_group, tenant_group
from pdcoord.protocol.errors import RefusedError, RefuseReason
from pdcoord.protocol.openai import APIS, Call, parse_call

KEYS = {name: make_key(name.encode() * KEY_RANDOM_BYTES) for name in "abc"}
SECRET = bytes(range(32))
FAIRNESS = b"x-llm-d-inference-fairness-id"


@dataclass
class Bench:
    """A gate with a clock that tests move, and what it told."""

    now_s: float = 1_000.0
    unix_s: float = 1_700_000_000.0
    refused: list[KeyFault] = field(default_factory=list)
    limited: list[tuple[str, RateKind]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate = Gate(clock=lambda: self.now_s, wall=lambda: self.unix_s, observer=self)

    def key_refused(self, fault: KeyFault) -> None:
        self.refused.append(fault)

    def rate_limited(self, key: str, kind: RateKind) -> None:
        self.limited.append((key, kind))

    def use(self, *keys: ApiKey) -> None:
        self.gate.use(KeyRing(keys, SECRET))

    def admit(self, name: str) -> Visa:
        return self.enter(bearer(KEYS[name]))

    def enter(self, headers: list[tuple[bytes, bytes]]) -> Visa:
        """As a front lets a call in."""
        visa = self.gate.identify(headers)
        visa.take_request()
        return visa


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + key.encode())]


def api_key(name: str, **fields: Any) -> ApiKey:
    tenant = fields.pop("tenant", f"team-{name}")
    group = fields.pop("salt_group", tenant_group(tenant))
    return ApiKey(name, digest_of(KEYS[name].encode()), tenant, group, **fields)


def parse(path: str = "/v1/completions", **body: Any) -> Call:
    return parse_call(APIS[path], json.dumps({"model": "org/model", "prompt": "x" * 400} | body).encode())


def request_of(model: Model, **body: Any) -> Request:
    return build_request(RequestId("r"), parse(**body), model)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_an_open_gate_passes_everything_on(bench: Bench, model: Model, plan: Any) -> None:
    client = [*bearer("sk-1"), (FAIRNESS, b"me")]
    visa = bench.enter(client)
    assert (visa.headers(client), visa.key_name, bench.gate.is_open) == (client, None, True)
    call, raw = parse(cache_salt="own"), b"{ }"
    assert visa.salted(call) is call
    assert visa.body(raw, call, model) is raw
    visa.check_model(model, "org/model")
    visa.take_prompt(request_of(model))
    visa.sent(plan("r"))
    visa.settle(ended(10**9))
    asked = Asked(objective="gold", slo=Slo(1.0, 9.0))
    assert visa.granted(asked, ranked(model)) is asked
    bench.enter([])


@pytest.mark.parametrize(
    ("headers", "fault"),
    [
        ([], KeyFault.MISSING),
        (bearer("x"), KeyFault.UNKNOWN),
        (bearer(KEYS["c"]), KeyFault.UNKNOWN),
        (bearer(KEYS["b"]), KeyFault.EXPIRED),
        ([*bearer(KEYS["a"]), (b"x-api-key", KEYS["b"].encode())], KeyFault.AMBIGUOUS),
    ],
)
def test_whoever_is_not_let_in_is_told_the_same(bench: Bench, headers: Any, fault: KeyFault) -> None:
    bench.use(api_key("a"), api_key("b", expires_unix_s=bench.unix_s))
    with pytest.raises(RefusedError) as refused:
        bench.enter(headers)
    with pytest.raises(RefusedError) as missing:
        bench.enter([])
    refusal = refused.value.refusal
    assert refusal == missing.value.refusal
    assert (refusal.status, refusal.reason) == (401, RefuseReason.UNAUTHORIZED)
    assert (b"www-authenticate", b"Bearer") in refusal.headers()
    assert "pdc_" not in refusal.message
    assert bench.refused == [fault, KeyFault.MISSING]


def test_the_key_says_whose_call_it_is_and_goes_nowhere(bench: Bench) -> None:
    bench.use(api_key("a"))
    client = [
        (b"accept", b"x"),
        (FAIRNESS, b"team-b"),
        (b"x-gateway-inference-fairness-id", b"team-b"),
        (b"x-api-key", KEYS["a"].encode()),
        *((name, b"other") for name in (b"x-session-id", b"x-smg-routing-key", b"x-custom-labels")),
        *bearer(KEYS["a"]),
    ]
    visa = bench.enter(client)
    assert visa.headers(client) == [(b"accept", b"x"), (FAIRNESS, b"team-a")]
    assert {name for name, _ in client[1:]} == visa.removed()
    bench.gate.engine_key = b"engine"
    assert visa.headers(client) == [
        (b"accept", b"x"),
        (FAIRNESS, b"team-a"),
        (b"authorization", b"Bearer engine"),
    ]


def test_an_open_gate_sends_engines_their_own_key_and_not_the_clients(bench: Bench) -> None:
    bench.gate.engine_key = b"engine"
    client = [*bearer("sk-1"), (b"accept", b"x")]
    visa = bench.enter(client)
    assert visa.headers(client) == [(b"accept", b"x"), (b"authorization", b"Bearer engine")]
    assert visa.removed() == {b"authorization"}


@pytest.mark.parametrize(
    ("models", "allowed"),
    [
        (None, {"org/model", "alias", "sql", "law"}),
        ({"alias"}, {"org/model", "alias", "sql", "law"}),
        ({"org/model"}, {"org/model", "alias", "sql", "law"}),
        ({"sql", "x"}, {"sql"}),
        ({"x"}, set()),
    ],
)
def test_a_key_is_for_its_models(
    bench: Bench, model: Model, models: set[str] | None, allowed: set[str]
) -> None:
    model = replace(model, adapters=("sql", "law"))
    bench.use(api_key("a", models=None if models is None else frozenset(models)))
    visa = bench.admit("a")
    assert {name for name in model.names if visa.may_use(model, name)} == allowed
    for name in model.names:
        if name in allowed:
            visa.check_model(model, name)
            continue
        with pytest.raises(RefusedError) as refused:
            visa.check_model(model, name)
        refusal = refused.value.refusal
        assert (refusal.status, refusal.reason) == (403, RefuseReason.MODEL_FORBIDDEN)
        assert f"'{'org/model' if name == 'alias' else name}'" in refusal.message


def test_an_adapter_keeps_its_name_upstream(bench: Bench, model: Model) -> None:
    model = replace(model, adapters=("sql",))
    visa = bench.enter([])
    for name, sent in (("sql", "sql"), ("alias", "org/model"), ("org/model", "org/model")):
        raw = json.dumps({"model": name, "prompt": "x"}).encode()
        body = visa.body(raw, parse(model=name), model)
        assert json.loads(body)["model"] == sent


def salts(bench: Bench, *names: str, **body: Any) -> list[str]:
    return [bench.admit(name).salted(parse(**body)).cache_salt for name in names]


def test_tenants_have_salts_of_their_own_and_may_share_one(bench: Bench) -> None:
    bench.use(api_key("a"), api_key("b"), api_key("c", tenant="team-a"))
    one, other, same = salts(bench, "a", "b", "c")
    assert one == same != other
    bench.use(*(api_key(name, salt_group=named_group("friends")) for name in "ab"), api_key("c"))
    one, other, apart = salts(bench, "a", "b", "c")
    assert one == other != apart
    assert salts(bench, "a", cache_salt="mine") == salts(bench, "b", cache_salt="mine") != [one]


def test_another_replica_makes_the_same_salt(bench: Bench) -> None:
    replica = Bench()
    for each in (bench, replica):
        each.use(api_key("a"))
    assert salts(bench, "a", cache_salt="s") == salts(replica, "a", cache_salt="s")


@pytest.mark.parametrize("path", sorted(APIS))
def test_the_body_carries_the_salt_and_the_keys_of_blocks_are_made_with_it(
    bench: Bench, model: Model, path: str
) -> None:
    bench.use(api_key("a"))
    fields = {"prompt": "p", "messages": [{"role": "user", "content": "p"}], "input": "p", "query": "p"}
    body = {"model": "alias", "documents": ["p"], "tokens": [1], "cache_salt": "own"} | fields
    visa, raw = bench.admit("a"), json.dumps(body).encode()
    call = visa.salted(parse_call(APIS[path], raw))
    sent = json.loads(visa.body(raw, call, model))
    is_salted = path not in {"/tokenize", "/detokenize"}
    assert sent == body | {"model": "org/model", "cache_salt": call.cache_salt}
    assert (call.cache_salt == "own") is not is_salted
    plain = build_request(RequestId("r"), parse_call(APIS[path], raw), model)
    assert (build_request(RequestId("r"), call, model).block_keys == plain.block_keys) is (
        not is_salted or not plain.block_keys
    )


def test_media_that_are_named_by_an_id_are_refused_where_tenants_are_told_apart(bench: Bench) -> None:
    part = {"type": "image_url", "image_url": None, "uuid": "sku-1"}
    for path in ("/v1/chat/completions", "/tokenize"):
        call = parse(path, messages=[{"role": "user", "content": [part]}])
        assert bench.gate.is_open
        assert bench.enter([]).salted(call) is call
        bench.use(api_key("a"))
        with pytest.raises(RefusedError, match=r"'messages\[0\]\.content\[0\]\.uuid' names media") as caught:
            bench.admit("a").salted(call)
        assert caught.value.refusal.param == "messages[0].content[0].uuid"
        assert "sku-1" not in str(caught.value)
        bench = Bench()


def test_with_a_key_nothing_in_the_body_says_who_goes_first(bench: Bench, model: Model) -> None:
    fields = dict.fromkeys(DROPPED, 1)
    for path in ("/v1/completions", "/tokenize"):
        raw = json.dumps({"model": model.name, "prompt": "x", "top_k": 3} | fields).encode()
        call = parse_call(APIS[path], raw)
        open_gate = Bench()
        assert open_gate.enter([]).body(raw, call, model) is raw
        bench.use(api_key("a"))
        visa = bench.admit("a")
        sent = json.loads(visa.body(raw, visa.salted(call), model))
        assert sent.keys() - {"cache_salt"} == {"model", "prompt", "top_k"}


def test_a_second_cache_salt_in_the_body_does_not_get_past(bench: Bench, model: Model) -> None:
    bench.use(api_key("a"))
    visa = bench.admit("a")
    raw = b'{"model":"org/model","prompt":"p","cache_salt":"x","cache_salt":"y"}'
    call = visa.salted(parse_call(APIS["/v1/completions"], raw))
    sent = visa.body(raw, call, model)
    assert sent.count(b"cache_salt") == 1
    assert json.loads(sent)["cache_salt"] == call.cache_salt


def test_only_a_key_whose_tokens_are_limited_has_them_sent_one_by_one(bench: Bench, model: Model) -> None:
    bench.use(api_key("a"), api_key("b", tokens_per_minute=9))
    raw = b'{"model":"org/model","prompt":"x","stream_interval":500}'
    call = parse_call(APIS["/v1/completions"], raw)
    sent = {name: json.loads(bench.admit(name).body(raw, call, model)) for name in "ab"}
    assert ["stream_interval" in body for body in sent.values()] == [True, False]


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_key_reaches_no_adapter_and_nothing_that_is_kept(bench: Bench, path: str) -> None:
    call = parse(path, lora_path="secret-adapter")
    assert bench.enter([]).salted(call) is call
    bench.use(api_key("a"))
    with pytest.raises(RefusedError, match="'lora_path' chooses an adapter") as caught:
        bench.admit("a").salted(call)
    refusal = caught.value.refusal
    assert (refusal.status, refusal.reason, refusal.param) == (400, RefuseReason.INVALID_FIELD, "lora_path")
    assert "secret" not in refusal.message


def ranked(model: Model) -> Model:
    rules = AdmissionRules(objectives={"gold": 7, "silver": 3, "usual": 0, "batch": -1})
    return replace(model, admission=rules, slo=Slo(1.0, 0.05))


@pytest.mark.parametrize(
    ("objectives", "granted"),
    [
        ((), {"gold": 0, "silver": 0, "usual": 0, "batch": -1}),
        (("silver", "batch"), {"gold": 0, "silver": 3, "usual": 0, "batch": -1}),
        (("*",), {"gold": 7, "silver": 3, "usual": 0, "batch": -1}),
    ],
)
def test_a_key_goes_before_others_only_by_its_own_objectives(
    bench: Bench, model: Model, objectives: tuple[str, ...], granted: dict[str, int]
) -> None:
    bench.use(api_key("a", objectives=frozenset(objectives)))
    visa, model = bench.admit("a"), ranked(model)
    for name, priority in granted.items():
        client = [(b"x-llm-d-inference-objective", name.encode()), *bearer(KEYS["a"])]
        asked = visa.granted(asked_of(visa.headers(client)), model)
        request = build_request(RequestId("r"), parse(), model, None, asked)
        assert (asked.priority(model), request.priority) == (priority, priority)
        # Who is not given what was asked for is counted as who asks for what there is not.
        assert asked.has_unknown_objective(model) is (priority == 0 and name != "usual")
        assert asked.tenant == "team-a"


@pytest.mark.parametrize(("own_s", "granted_s"), [(None, None), (0.02, 0.02), (0.05, 0.05), (9.0, None)])
def test_a_pace_laxer_than_the_policys_counts_as_none(
    bench: Bench, model: Model, own_s: float | None, granted_s: float | None
) -> None:
    bench.use(api_key("a"))
    asked = Asked(slo=Slo(2.0, own_s))
    visa = bench.admit("a")
    assert visa.granted(asked, ranked(model)).slo == Slo(2.0, granted_s)
    assert visa.granted(asked, model) is asked, "a policy without a pace has none to go by"


def ended(output_tokens: int | None, **fields: Any) -> CallRecord:
    """A call whose answer began, unless said otherwise."""
    record = CallRecord(RequestId("r"), "/v1/completions", 0.0, outcome=Outcome.OK, first_byte_s=0.0)
    return replace(record, output_tokens=output_tokens, **fields)


def used_tokens(visa: Visa) -> float:
    assert visa._rates is not None
    assert visa._rates.tokens is not None
    return visa._rates.tokens.used


def limited(error: RefusedError) -> tuple[int, str, int | None]:
    return error.refusal.status, error.refusal.reason, error.refusal.retry_after_s


def test_requests_are_counted_once_each_and_refused_with_a_true_time(bench: Bench) -> None:
    bench.use(api_key("a", requests_per_minute=2), api_key("b"))
    bench.admit("a")
    bench.now_s += 10.0
    bench.admit("a")
    for _ in range(3):
        with pytest.raises(RefusedError) as refused:
            bench.admit("a")
        assert limited(refused.value) == (429, "rate-limited", 20)
    assert bench.limited == [("a", RateKind.REQUESTS)] * 3
    bench.gate.identify(bearer(KEYS["a"]))
    bench.admit("b")
    bench.now_s += 20.0
    bench.admit("a")


def test_tokens_of_prompt_and_answer_count_together(bench: Bench, model: Model) -> None:
    bench.use(api_key("a", tokens_per_minute=600))
    visa = bench.admit("a")
    visa.take_prompt(request_of(model, prompt=[1] * 100))
    visa.settle(ended(500))
    with pytest.raises(RefusedError) as refused:
        bench.admit("a").take_prompt(request_of(model, prompt=[1] * 10))
    assert limited(refused.value) == (429, "rate-limited", 1)
    assert bench.limited == [("a", RateKind.TOKENS)]
    bench.now_s += 1.0
    bench.admit("a").take_prompt(request_of(model, prompt=[1] * 10))


@pytest.mark.parametrize(
    ("output_tokens", "has_begun", "counted"),
    [(30, True, 30), (None, True, 400), (None, False, 0), (0, True, 0)],
)
def test_an_answer_that_cannot_be_counted_counts_as_what_was_allowed(
    bench: Bench, model: Model, output_tokens: int | None, has_begun: bool, counted: int
) -> None:
    bench.use(api_key("a", tokens_per_minute=60_000))
    visa = bench.admit("a")
    visa.take_prompt(request_of(model, prompt=[1], max_tokens=200, n=2))
    visa.settle(ended(output_tokens) if has_begun else ended(output_tokens, first_byte_s=None))
    visa.settle(ended(None))  # What was allowed counts once.
    assert used_tokens(visa) == 1 + counted


LEFT = {"first_byte_s": None, "outcome": Outcome.CLIENT_GONE}
LATE = {
    "first_byte_s": None,
    "outcome": Outcome.UPSTREAM_ERROR,
    "reason": RefuseReason.UPSTREAM_TIMEOUT,
}


@pytest.mark.parametrize(
    ("body", "passed_s", "fields", "counted"),
    [
        ({"max_tokens": 200}, 0.05, LEFT, 0),
        ({"max_tokens": 200}, 0.918, LEFT, 100),
        ({"max_tokens": 200, "n": 2}, 0.918, LEFT, 200),
        ({"max_tokens": 200}, 60.0, LEFT, 200),
        ({}, 0.918, LEFT, 100),
        ({}, 0.918, LATE, 100),
        # The head of an answer came, and nobody waited for its usage.
        ({}, 60.0, {"outcome": Outcome.CLIENT_GONE, "first_byte_s": 1_000.918}, 100),
        ({}, 0.918, {"outcome": Outcome.CLIENT_GONE, "is_stream": True}, 100),
        # What is no fault of the client costs it nothing.
        ({}, 60.0, LEFT | {"outcome": Outcome.UPSTREAM_ERROR}, 0),
        ({}, 60.0, LEFT | {"outcome": Outcome.REFUSED}, 0),
    ],
)
def test_an_answer_that_nobody_waited_for_counts_as_what_was_made_of_it(
    bench: Bench, plan: Any, model: Model, body: dict[str, int], passed_s: float, fields: Any, counted: int
) -> None:
    bench.use(api_key("a", tokens_per_minute=1_000_000_000))
    bench.now_s = 900.0
    visa = bench.admit("a")
    visa.take_prompt(request_of(model, prompt=[1], **body))
    bench.now_s = 1_000.0  # The wait for its turn costs nothing, and the prompt is paid for by now.
    visa.sent(plan("r"))
    bench.now_s += passed_s / 2
    visa.sent(plan("r", attempt=1))
    bench.now_s = 1_000.0 + passed_s
    visa.settle(ended(None, **fields))
    assert used_tokens(visa) == counted


def test_a_call_that_was_sent_to_no_engine_costs_its_prompt_alone(bench: Bench, model: Model) -> None:
    bench.use(api_key("a", tokens_per_minute=60))
    visa = bench.admit("a")
    visa.take_prompt(request_of(model, prompt=[1], max_tokens=200))
    bench.now_s += 0.5
    visa.settle(ended(None, **LEFT))
    assert used_tokens(visa) == 0.5


def test_what_a_key_has_used_outlives_a_change_of_the_file(bench: Bench) -> None:
    bench.use(api_key("a", requests_per_minute=1))
    bench.admit("a")
    bench.use(api_key("a", requests_per_minute=1, models=frozenset({"x"})), api_key("b"))
    with pytest.raises(RefusedError):
        bench.admit("a")
    bench.admit("b")
    bench.use(api_key("b"))
    with pytest.raises(RefusedError) as refused:
        bench.admit("a")
    assert refused.value.refusal.reason is RefuseReason.UNAUTHORIZED


def test_a_call_under_way_ends_after_its_key_is_gone(bench: Bench, model: Model) -> None:
    bench.use(api_key("a", tokens_per_minute=100))
    visa = bench.admit("a")
    visa.take_prompt(request_of(model, prompt=[1]))
    bench.use()
    visa.settle(ended(5))
    assert bench.refused == []
