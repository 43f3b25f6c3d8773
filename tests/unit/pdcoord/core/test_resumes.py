"""Whether a stream that broke off may go on, who is blamed for it, and what is left of its request."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import (
    SAID_DRAINING,
    Endpoint,
    EndpointId,
    EndpointSeen,
    EngineKind,
    Fleet,
    Health,
    ModelName,
    Pool,
    PoolName,
    Role,
    Sample,
    SampleFailed,
    SampleTaken,
)
from pdcoord.core.ledger import Load
from pdcoord.core.model import Fallback, Model, Slo
from pdcoord.core.request import Request, RequestId
from pdcoord.core.resumes import RESUMES_MAX, STALL_STEPS, blamed, failed_with, grown, silence_s_max, why_not
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import RungKind
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M, R = ModelName("m"), RequestId("r")
D = Pool(
    name=PoolName("d"),
    model=M,
    role=Role.DECODE,
    vendor="v",
    engine=EngineKind.VLLM,
    side=Side(Connector.PDCOORD, KvLayout(16)),
    speed=SpeedFigures(0.01, 1e-3, 0.01),
    kv_bytes_per_token=1_000,
    link_bytes_per_s=1e10,
)
MODEL = Model(M, (D,))
ENDPOINT = Endpoint(EndpointId("d/0"), D, HostPort("d-0:80"))


def test_only_the_process_that_failed_a_request_is_noted() -> None:
    fleet, decode, error = Fleet(), ENDPOINT, RungReason.DECODE_ERROR
    fleet.handle(EndpointSeen(decode))
    state = fleet.get(decode.id)
    assert state is not None
    assert failed_with(frozenset(), decode, state, error) == {(decode.id, state.life)}
    assert not failed_with(frozenset(), decode, state, RungReason.DECODE_DRAINING)
    assert not failed_with(frozenset(), replace(decode, address=HostPort("before:80")), state, error)
    assert not failed_with(frozenset(), decode, None, error)


# Silence.


@given(
    step_s=st.floats(1e-4, 2.0),
    tpot_s=st.none() | st.floats(1e-3, 2.0),
    pending_us=st.integers(0, 10**8),
    least_s=st.floats(0.1, 600.0),
)
def test_nobody_is_called_stalled_for_less_than_any_of_the_bounds(
    step_s: float, tpot_s: float | None, pending_us: int, least_s: float
) -> None:
    model = replace(MODEL, slo=Slo(tpot_s=tpot_s), fallback=Fallback(resume_stall_s_min=least_s))
    load = Load(prefills={R: pending_us}, prefill_us=pending_us)
    allowed_s = silence_s_max(model, step_s, load, 0.0)
    assert allowed_s >= least_s
    assert allowed_s >= STALL_STEPS * max(step_s, tpot_s or 0.0)
    assert allowed_s >= pending_us / 1e6


# Rules.


@given(st.integers(0, 10_000), st.none() | st.integers(1, 20_000))
def test_a_grown_request_has_its_answer_as_prompt_and_less_to_generate(
    tokens: int, limit: int | None
) -> None:
    request = grown(Request(R, M, prompt_tokens=7, output_tokens_max=limit), tokens)
    assert request.prompt_tokens == 7 + tokens
    assert request.is_resumed
    assert request.output_tokens_max == (None if limit is None else max(1, limit - tokens))


@given(tries=st.integers(0, 9), age_s=st.floats(0.0, 1_000.0), has_rung=st.booleans())
def test_a_stream_may_go_on_within_tries_and_age(tries: int, age_s: float, *, has_rung: bool) -> None:
    rules = Fallback(rungs=(RungKind.RESUME,) if has_rung else (), resume_tries_max=3, resume_age_s_max=100.0)
    is_allowed = has_rung and tries < 3 and age_s <= 100.0
    model = replace(MODEL, fallback=rules)
    assert (why_not(model, tries, age_s) == "") == is_allowed
    assert (why_not(model, tries, age_s, is_drain=True) == "") == has_rung
    assert why_not(model, tries, age_s, moves=RESUMES_MAX - tries, is_drain=True)


def test_an_endpoint_that_says_itself_that_it_goes_away_is_not_blamed_for_what_it_gives_back() -> None:
    fleet = Fleet()
    seen = ENDPOINT
    fleet.handle(EndpointSeen(seen))
    fleet.handle(SampleTaken(seen.id, Sample(0, 0, 0.0, 0.0)))
    assert blamed(fleet.get(seen.id), RungReason.DECODE_ERROR) is RungReason.DECODE_ERROR
    fleet.handle(SampleFailed(seen.id, SAID_DRAINING))
    state = fleet.get(seen.id)
    assert state is not None
    assert state.health is Health.UNREACHABLE
    assert blamed(state, RungReason.DECODE_ERROR) is RungReason.DECODE_DRAINING
    fleet.handle(SampleTaken(seen.id, Sample(0, 0, 0.0, 1.0)))
    assert blamed(fleet.get(seen.id), RungReason.DECODE_ERROR) is RungReason.DECODE_ERROR
    fleet.validate()
