"""The accounts of requests under way: opened, carried on under another id, and closed, all at once."""

from dataclasses import replace

from pdcoord.core.bookings import Bookings, Live
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import (
    Endpoint,
    EndpointGone,
    EndpointId,
    EndpointSeen,
    EngineKind,
    Fleet,
    ModelName,
    Pool,
    PoolName,
    Role,
)
from pdcoord.core.learned import LearnedSpeed
from pdcoord.core.ledger import Ledger
from pdcoord.core.lessons import Lessons
from pdcoord.core.model import Model
from pdcoord.core.paths import PathTable
from pdcoord.core.plan import Candidate, Figures, Plan, Why
from pdcoord.core.prefixes import Prefixes
from pdcoord.core.progress import Progress
from pdcoord.core.remote import Accounts
from pdcoord.core.request import Request, RequestId
from pdcoord.core.served import PathEvidence
from pdcoord.core.silent import SilentFailures
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName
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
ENDS = tuple(Endpoint(EndpointId(f"b/{i}"), BOTH, HostPort(f"b-{i}:80")) for i in range(2))


class Books:
    """Every account that there is, with two endpoints."""

    def __init__(self) -> None:
        fleet, ledger, paths, speed = Fleet(), Ledger(), PathTable(), LearnedSpeed()
        for endpoint in ENDS:
            fleet.handle(EndpointSeen(endpoint))
        silent = SilentFailures()
        lessons = Lessons(fleet, ledger, paths, speed)
        progress = Progress(fleet, lambda _: MODEL)
        self.to = Accounts(fleet, ledger, paths, silent, lessons, speed, progress)
        prefixes = Prefixes()
        prefixes.replace_models((MODEL,))
        self.bookings = Bookings(self.to, prefixes, PathEvidence(fleet, paths, silent))

    def open(self, name: RequestId, prefill: Endpoint | None = None) -> Live:
        figures = Figures(0.0, 0.1, 0.0, 0.01, 0.0, 0.0, 0.0, 100, 0, transfer_bytes=5 if prefill else 0)
        plan = Plan(name, Candidate(ENDS[0], prefill, None, figures), Why.SPLIT_FASTER, DialectName.NIXLV2)
        live = Live(Request(name, M, prompt_tokens=100), plan)
        self.bookings.open(live, MODEL, 0.0)
        return live

    def validate(self, *live: RequestId) -> None:
        self.to.ledger.validate()
        self.to.lessons.validate(live)
        self.to.progress.validate(live)
        self.to.paths.validate({end.id for end in ENDS}, live)
        assert self.to.ledger.open_count == len(live)


def test_what_is_opened_is_closed_everywhere() -> None:
    books = Books()
    live = books.open(R, ENDS[1])
    books.validate(R)
    assert [books.to.ledger.load(end.id).request_count for end in ENDS] == [1, 1]
    books.bookings.close(live, 1.0)
    books.validate()


def test_a_second_attempt_goes_on_under_the_requests_own_id_at_its_place() -> None:
    books = Books()
    first, second, other = books.open(R), books.open(SECOND, ENDS[1]), books.open(OTHER, ENDS[1])
    books.bookings.close(first, 0.1)
    books.bookings.adopt(second, R)
    books.validate(R, OTHER)
    assert (second.request.id, second.plan.request_id) == (R, R)
    assert list(books.to.ledger.load(ENDS[1].id).prefills) == [R, OTHER]
    books.to.ledger.finish_prefill(R, 0.2)
    books.validate(R, OTHER)
    for each in (second, other):
        books.bookings.close(each, 1.0)
    books.validate()


def test_the_probe_of_a_path_goes_on_too() -> None:
    books = Books()
    path = (ENDS[1].id, ENDS[0].id)
    books.to.paths.fail(path, RungReason.PREFILL_UNREACHABLE, OTHER, 0.0)
    second = books.open(SECOND, ENDS[1])
    books.bookings.adopt(second, R)
    books.validate(R)
    assert not books.to.paths.lets_pass(*path, 5.0)
    books.to.paths.abandon(*path, R)
    assert books.to.paths.lets_pass(*path, 5.0)


def test_the_account_of_an_endpoint_that_is_gone_goes_with_its_last_request() -> None:
    books = Books()
    one, other = books.open(R), books.open(OTHER)
    books.to.fleet.handle(EndpointGone(ENDS[0].id))
    books.bookings.close(one, 1.0)
    assert dict(books.to.ledger.loads())
    books.bookings.close(other, 1.0)
    assert not dict(books.to.ledger.loads())


def test_a_continued_answer_keeps_what_it_has() -> None:
    books = Books()
    live = replace(books.open(R), output_tokens=7)
    books.bookings.close(live, 0.5)
    books.bookings.open(live, MODEL, 0.5)
    books.validate(R)
    books.bookings.close(live, 1.0)
