"""Following a collection: transcripts of what a server may do, and what holds whatever it does."""

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pdcoord.feeds.kubewatch import (
    Failed,
    KubeObject,
    ListPage,
    OpenWatch,
    PageListed,
    Started,
    TellChange,
    TellTrouble,
    WatchAction,
    WatchEnded,
    WatchEvent,
    WatchLimits,
    WatchMachine,
    WatchOpened,
    WatchTold,
    WatchTrouble,
    trouble_of_status,
)

LIMITS = WatchLimits(objects_max=4, backoff_s=1.0, backoff_s_max=8.0)


def thing(name: str, version: str = "1", **more: Any) -> KubeObject:
    return {"metadata": {"name": name, "resourceVersion": version}, **more}


def error(code: int, **details: Any) -> WatchTold:
    return WatchTold("ERROR", {"kind": "Status", "code": code, "details": details})


class Bench:
    def __init__(self) -> None:
        self.machine = WatchMachine(LIMITS, random.Random(1))
        self.now_s = 100.0

    def say(self, *events: WatchEvent) -> list[str]:
        """What the machine wants, in short; pauses as a range of what chance may make of them."""
        said: list[str] = []
        for event in events:
            said += [short(action) for action in self.machine.handle(event, self.now_s)]
            self.machine.validate()
        return said

    def names(self) -> str:
        return " ".join(sorted(self.machine.objects))


def short(action: WatchAction) -> str:
    match action:
        case ListPage(page, pause_s):
            return f"list {page or 'all'}{span(pause_s)}"
        case OpenWatch(version, pause_s):
            return f"watch {version}{span(pause_s)}"
        case TellChange():
            return "change"
        case TellTrouble(trouble, _):
            return f"trouble {trouble}"


def span(pause_s: float) -> str:
    """The doubled pause that a drawn one is at least half of."""
    if pause_s == 0.0:
        return ""
    full_s = 1.0
    while full_s < pause_s:
        full_s *= 2.0
    return f" after <={full_s:g}s"


def watching(*names: str) -> Bench:
    bench = Bench()
    bench.say(Started(), PageListed([thing(name) for name in names], "10"), WatchOpened())
    return bench


def test_a_list_of_pages_then_a_watch() -> None:
    bench = Bench()
    assert bench.say(Started()) == ["list all"]
    assert bench.say(PageListed([thing("a")], "10", "next")) == ["list next"]
    assert bench.names() == ""
    assert bench.say(PageListed([thing("b"), {"no": "name"}], "10")) == ["change", "watch 10"]
    assert bench.names() == "a b"
    assert bench.say(WatchOpened(), WatchTold("ADDED", thing("c", "11"))) == ["change"]
    assert bench.say(WatchTold("MODIFIED", thing("a", "12")), WatchTold("DELETED", thing("b", "13"))) == [
        "change",
        "change",
    ]
    assert bench.names() == "a c"
    assert bench.say(WatchTold("BOOKMARK", {"metadata": {"resourceVersion": "20"}})) == []
    assert bench.say(WatchEnded()) == ["watch 20"]


def test_what_says_nothing_new_changes_nothing() -> None:
    bench = watching("a")
    assert bench.say(WatchTold("ADDED", thing("a"))) == []
    assert bench.say(WatchTold("DELETED", thing("x", "11"))) == []
    assert bench.say(WatchTold("NEWLY", thing("x", "12"))) == []
    assert bench.say(WatchTold("ADDED", {"metadata": None})) == []
    assert bench.say(Started(), PageListed([thing("a")], "12")) == ["list all", "watch 12"]
    assert bench.names() == "a"


def test_only_what_is_kept_counts_as_a_change() -> None:
    bench = Bench()
    bench.machine.keep = lambda given: {"metadata": {"name": given["metadata"]["name"]}}
    bench.say(Started(), PageListed([thing("a", heart="1")], "10"), WatchOpened())
    assert bench.say(WatchTold("MODIFIED", thing("a", "11", heart="2"))) == []
    assert bench.say(WatchEnded()) == ["watch 11"]


def test_an_expired_watch_is_listed_anew_at_once_and_what_was_known_stays_until_then() -> None:
    for expiry in (error(410), Failed(WatchTrouble.EXPIRED)):
        bench = watching("a", "b")
        assert bench.say(expiry) == ["trouble expired", "list all"]
        assert bench.names() == "a b"
        assert bench.say(PageListed([thing("b")], "30", "next")) == ["list next"]
        assert bench.names() == "a b"
        assert bench.say(PageListed([thing("c")], "30")) == ["change", "watch 30"]
        assert bench.names() == "b c"


def test_expiries_in_a_row_wait_longer_and_longer() -> None:
    bench = watching("a")
    assert bench.say(error(410)) == ["trouble expired", "list all"]
    bench.say(PageListed([thing("a")], "30"))
    assert bench.say(Failed(WatchTrouble.EXPIRED)) == ["trouble expired", "list all after <=2s"]
    assert bench.say(Failed(WatchTrouble.EXPIRED)) == ["trouble expired", "list all after <=4s"]


def test_other_failures_of_a_watch_go_on_where_it_was() -> None:
    bench = watching("a")
    bench.say(WatchTold("BOOKMARK", {"metadata": {"resourceVersion": "20"}}))
    assert bench.say(Failed(WatchTrouble.BROKEN)) == ["trouble broken", "watch 20 after <=1s"]
    assert bench.say(Failed(WatchTrouble.UNREACHABLE)) == ["trouble unreachable", "watch 20 after <=2s"]
    assert bench.say(error(500)) == ["trouble status", "watch 20 after <=4s"]
    assert bench.say(WatchOpened(), WatchTold("ADDED", thing("b", "21"))) == ["change"]
    assert bench.say(Failed(WatchTrouble.TIMEOUT)) == ["trouble timeout", "watch 21 after <=1s"]
    assert bench.say(Failed(WatchTrouble.UNREADABLE)) == ["trouble unreadable", "list all after <=2s"]


def test_a_list_that_fails_begins_anew_and_pauses_are_bounded() -> None:
    bench = Bench()
    bench.say(Started(), PageListed([thing("a")], "10", "next"))
    assert bench.say(Failed(WatchTrouble.EXPIRED)) == ["trouble expired", "list all after <=1s"]
    for _ in range(40):
        bench.say(Failed(WatchTrouble.DENIED))
    assert bench.say(Failed(WatchTrouble.DENIED)) == ["trouble denied", "list all after <=8s"]
    assert bench.say(PageListed([thing("b")], "11")) == ["change", "watch 11"]
    assert bench.names() == "b"


def test_the_server_says_how_long_to_wait_within_bounds() -> None:
    bench = watching()
    (_, step) = bench.machine.handle(Failed(WatchTrouble.THROTTLED, 5.0), 0.0)
    assert isinstance(step, OpenWatch)
    assert 5.0 <= step.pause_s <= 5.5
    (_, step) = bench.machine.handle(Failed(WatchTrouble.THROTTLED, 3_600.0), 0.0)
    assert isinstance(step, OpenWatch)
    assert 8.0 <= step.pause_s <= 8.8
    (_, step) = bench.machine.handle(error(429, retryAfterSeconds=6), 0.0)
    assert isinstance(step, OpenWatch)
    assert 6.0 <= step.pause_s <= 6.6


def test_watches_that_end_at_once_are_not_opened_in_a_loop() -> None:
    bench = watching("a")
    assert bench.say(WatchEnded()) == ["trouble broken", "watch 10 after <=1s"]
    assert bench.say(WatchOpened(), WatchEnded()) == ["trouble broken", "watch 10 after <=2s"]
    bench.say(WatchOpened())
    bench.now_s += 1.0
    assert bench.say(WatchEnded()) == ["watch 10"]


def test_too_many_objects_are_left_out_and_taken_in_when_there_is_room() -> None:
    bench = watching("a", "b", "c", "d", "e")
    assert bench.names() == "a b c d"
    assert bench.say(WatchTold("ADDED", thing("f", "11"))) == []
    assert bench.say(WatchTold("DELETED", thing("a", "12"))) == ["change", "list all"]
    assert bench.say(WatchTold("ADDED", thing("late", "13"))) == []
    assert bench.say(PageListed([thing(n) for n in "bcde"], "14", "rest")) == [
        "change",
        "trouble too-many",
        "watch 14",
    ]


def test_a_change_of_what_is_followed_keeps_what_is_known() -> None:
    bench = watching("a")
    assert bench.say(Started()) == ["list all"]
    assert bench.names() == "a"
    assert bench.say(PageListed([], "40")) == ["change", "watch 40"]
    assert bench.names() == ""


def test_statuses_have_names() -> None:
    found = [trouble_of_status(status).value for status in (410, 429, 401, 403, 404, 500, 302)]
    assert found == ["expired", "throttled", "denied", "denied", "missing", "status", "status"]


NAMES = st.sampled_from("abcdefg")
VERSIONS = st.sampled_from(["1", "2", ""])
OBJECTS: st.SearchStrategy[KubeObject] = st.one_of(
    st.builds(thing, NAMES, VERSIONS),
    st.sampled_from([{}, {"metadata": 3}, {"code": 410}, {"code": "x"}]),
)
ANSWERS = {
    "list": st.one_of(
        st.builds(PageListed, st.lists(OBJECTS, max_size=6), VERSIONS, st.sampled_from(["", "more"])),
        st.builds(Failed, st.sampled_from(WatchTrouble)),
    ),
    "watch": st.one_of(
        st.just(WatchOpened()),
        st.builds(
            WatchTold, st.sampled_from(["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR", "X"]), OBJECTS
        ),
        st.just(WatchEnded()),
        st.builds(Failed, st.sampled_from(WatchTrouble), st.sampled_from([None, 2.0, 1e6])),
    ),
}


@given(st.data())
def test_whatever_a_server_does_there_is_one_next_step_and_objects_go_only_by_its_word(
    data: st.DataObject,
) -> None:
    bench = Bench()
    (step,) = bench.machine.handle(Started(), 0.0)
    for _ in range(data.draw(st.integers(1, 25))):
        kind = "list" if isinstance(step, ListPage) else "watch"
        event: WatchEvent = data.draw(ANSWERS[kind])
        before = dict(bench.machine.objects)
        list_count = bench.machine.list_count
        bench.now_s += data.draw(st.sampled_from([0.0, 0.1, 70.0]))
        actions = bench.machine.handle(event, bench.now_s)
        bench.machine.validate()
        steps = [action for action in actions if isinstance(action, ListPage | OpenWatch)]
        is_end = kind == "list" or isinstance(event, WatchEnded | Failed)
        assert len(steps) <= 1
        assert bool(steps) or not is_end
        assert all(0.0 <= each.pause_s <= LIMITS.backoff_s_max * 1.1 for each in steps)
        gone = before.keys() - bench.machine.objects.keys()
        if gone and bench.machine.list_count == list_count:
            assert isinstance(event, WatchTold)
            assert event.type == "DELETED"
        is_change = before != bench.machine.objects
        assert is_change <= any(isinstance(action, TellChange) for action in actions)
        step = steps[0] if steps else step
