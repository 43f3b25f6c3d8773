"""The accounts of requests under way: opened, carried on under another id, and closed, all at once."""

from dataclasses import replace

import pytest

from pdcoord.core.accounts import Accounts
from pdcoord.core.bookings import Bookings, Live
from pdcoord.core.canary import Canaries
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import DecodeMoved, Outcome, RequestEnded, ResponseBegan
from pdcoord.core.fleet import (
    Endpoint,
    EndpointGone,
    EndpointId,
    EndpointSeen,
    EngineKind,
    ModelName,
    Pool,
    PoolName,
    Role,
)
from pdcoord.core.model import Model
from pdcoord.core.models import Models
from pdcoord.core.plan import Candidate, Figures, Plan, Why
from pdcoord.core.prefixes import Prefixes
from pdcoord.core.request import BlockKey, Request, RequestId
from pdcoord.core.served import PathEvidence
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName, Mode, RungKind, RungTaken, ServedHeader
from transfer.verdict import Connector, Side

M = ModelName("m")
R, SECOND, OTHER = RequestId("r"), RequestId("r-hedge"), RequestId("other")
BOTH = Pool(
    name=PoolName("b"),
    model=M,
    role=Role.BOTH,
    vendor="v",
    engine=EngineKind.VLLM,
    side=Side(Connector.NONE, None),
    speed=SpeedFigures(0.01, 1e-4, 0.01),
    kv_bytes_per_token=1_000,
    link_bytes_per_s=1e10,
)
MODEL = Model(M, (BOTH,))
KEYS = tuple(BlockKey(key) for key in range(16))
PROMPT_TOKENS = 1_030
ENDS = tuple(Endpoint(EndpointId(f"b/{i}"), BOTH, HostPort(f"b-{i}:80")) for i in range(2))


class Books:
    """Every account that there is, with two endpoints."""

    def __init__(self, accounts: Accounts) -> None:
        self.to = accounts
        for endpoint in ENDS:
            accounts.fleet.handle(EndpointSeen(endpoint))
        models, prefixes = Models(), Prefixes()
        models.replace((MODEL,))
        prefixes.replace_models((MODEL,))
        self.prefixes = prefixes
        self.budget = models.budgets[M]
        canaries = Canaries(accounts.fleet, accounts.ledger, accounts.paths, has_runner=False)
        evidence = PathEvidence(accounts.fleet, accounts.paths, accounts.silent)
        self.bookings = Bookings(accounts, prefixes, models, canaries, evidence)

    def open(self, name: RequestId, prefill: Endpoint | None = None) -> Live:
        figures = Figures(0.0, 0.1, 0.0, 0.01, 0.0, 0.0, 0.0, 100, 0, transfer_bytes=5 if prefill else 0)
        plan = Plan(name, Candidate(ENDS[0], prefill, None, figures), Why.SPLIT_FASTER, DialectName.NIXLV2)
        request = Request(name, M, prompt_tokens=PROMPT_TOKENS, block_keys=KEYS, block_tokens=64)
        live = Live(request, plan)
        assert self.bookings.open(live, MODEL, 0.0).plan is plan
        return live

    def in_use(self) -> list[int]:
        """Tokens of the prompt that all of them have, by endpoint, that somebody holds there."""
        asked = Request(RequestId("asked"), M, prompt_tokens=PROMPT_TOKENS, block_keys=KEYS, block_tokens=64)
        states = [self.to.fleet.get(end.id) for end in ENDS]
        held = self.prefixes.in_use
        return [held.shared_tokens(each.ordinal, asked, 1_024) if each is not None else 0 for each in states]

    def validate(self, *live: RequestId) -> None:
        self.to.ledger.validate()
        self.bookings.validate()
        self.to.paths.validate({end.id for end in ENDS}, live)
        assert set(self.bookings.live) == set(live)


@pytest.fixture
def books(accounts: Accounts) -> Books:
    return Books(accounts)


def test_what_is_opened_is_closed_everywhere(books: Books) -> None:
    live = books.open(R, ENDS[1])
    books.validate(R)
    assert [books.to.ledger.load(end.id).request_count for end in ENDS] == [1, 1]
    books.bookings.close(live, 1.0)
    books.validate()


def test_a_second_attempt_goes_on_under_the_requests_own_id_at_its_place(books: Books) -> None:
    first, second, other = books.open(R), books.open(SECOND, ENDS[1]), books.open(OTHER, ENDS[1])
    books.bookings.adopt(first, second, 0.1)
    books.validate(R, OTHER)
    assert (second.request.id, second.plan.request_id) == (R, R)
    assert list(books.to.ledger.load(ENDS[1].id).prefills) == [R, OTHER]
    books.to.ledger.finish_prefill(R, 0.2)
    books.validate(R, OTHER)
    for each in (second, other):
        books.bookings.close(each, 1.0)
    books.validate()


def test_a_prompt_is_in_use_where_its_answer_is_made_until_its_request_is_over(books: Books) -> None:
    one, other = books.open(R, ENDS[1]), books.open(OTHER, ENDS[1])
    assert books.in_use() == [1_024, 0]
    books.bookings.close(one, 1.0)
    assert books.in_use() == [1_024, 0]
    books.bookings.move(DecodeMoved(OTHER, ENDS[1].address), 1.0)
    assert books.in_use() == [0, 1_024]
    books.bookings.close(books.bookings.live[OTHER], 2.0)
    assert books.in_use() == [0, 0]
    first, second = books.open(R), books.open(SECOND, ENDS[1])
    books.bookings.adopt(first, second, 3.0)
    assert books.in_use() == [1_024, 0]
    books.bookings.close(second, 4.0)
    assert books.in_use() == [0, 0]
    assert other.request.id not in books.bookings.live


def test_the_probe_of_a_path_goes_on_too(books: Books) -> None:
    path = (ENDS[1].id, ENDS[0].id)
    books.to.paths.fail(path, RungReason.PREFILL_UNREACHABLE, OTHER, 0.0)
    first, second = books.open(R), books.open(SECOND, ENDS[1])
    books.bookings.adopt(first, second, 0.1)
    books.validate(R)
    assert not books.to.paths.lets_pass(*path, 5.0)
    books.to.paths.abandon(*path, R)
    assert books.to.paths.lets_pass(*path, 5.0)


def test_the_account_of_an_endpoint_that_is_gone_goes_with_its_last_request(books: Books) -> None:
    one, other = books.open(R), books.open(OTHER)
    books.to.fleet.handle(EndpointGone(ENDS[0].id))
    books.bookings.close(one, 1.0)
    assert dict(books.to.ledger.loads())
    books.bookings.close(other, 1.0)
    assert not dict(books.to.ledger.loads())


def test_a_continued_answer_keeps_what_it_has(books: Books) -> None:
    live = replace(books.open(R), output_tokens=7)
    books.bookings.close(live, 0.5)
    books.bookings.open(live, MODEL, 0.5)
    books.validate(R)
    books.bookings.close(live, 1.0)


def test_a_request_that_ends_takes_its_second_attempt_along(books: Books) -> None:
    books.open(R)
    books.open(SECOND, ENDS[1])
    books.open(OTHER)
    books.bookings.end(RequestEnded(R, Outcome.CLIENT_GONE), 1.0)
    books.validate(OTHER)


def test_an_answer_that_began_is_noted_once_with_how_it_was_served(books: Books) -> None:
    live = books.open(R, ENDS[1])
    fell_back = RungTaken(rung=RungKind.COLOCATED, reason=RungReason.PREFILL_TIMEOUT, target=ENDS[1].address)
    served = ServedHeader(mode=Mode.COLOCATED, rungs=(fell_back,))
    books.bookings.begin(ResponseBegan(R, served), 0.5)
    books.validate(R)
    assert (live.has_begun, live.begun_s) == (True, 0.5)
    assert list(books.budget._recent) == [True]  # what was noted
    with pytest.raises(AssertionError, match="twice"):
        books.bookings.begin(ResponseBegan(R, served), 0.6)
    books.bookings.end(RequestEnded(R, Outcome.OK), 1.0)
    books.validate()


def test_a_continuation_is_not_noted_again_when_it_begins(books: Books) -> None:
    live = books.open(R)
    books.bookings.close(live, 0.1)
    books.bookings.open(replace(live, request=replace(live.request, is_resumed=True)), MODEL, 0.2)
    books.bookings.begin(ResponseBegan(R, None), 0.3)
    assert not books.budget._recent  # what was noted


def test_a_request_that_was_moved_is_booked_there_and_nowhere_else(books: Books) -> None:
    books.open(R)
    for nowhere in (HostPort("elsewhere:80"), ENDS[0].address):
        books.bookings.move(DecodeMoved(R, nowhere), 0.1)
        assert books.bookings.endpoint_ids() == {ENDS[0].id}
    books.bookings.move(DecodeMoved(R, ENDS[1].address), 0.1)
    books.validate(R)
    assert books.bookings.endpoint_ids() == {ENDS[1].id}
    assert [books.to.ledger.load(end.id).request_count for end in ENDS] == [0, 1]
