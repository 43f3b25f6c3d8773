"""What counts as left behind: what is there again and again, not what each look finds elsewhere."""

import itertools

import pytest

from benchmarks.chaos import leftovers
from benchmarks.chaos.programs import Programs, Use


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What each look at the fleet finds, in turn, over and over."""
    found: list[dict[str, str]] = []
    turns = itertools.count()

    async def now(_: Programs, __: dict[str, Use]) -> dict[str, str]:
        return found[next(turns) % len(found)]

    monkeypatch.setattr(leftovers, "_now", now)
    monkeypatch.setattr(leftovers, "_PAUSE_S", 0.0)
    return found


async def left(programs: object = None) -> list[str]:
    return await leftovers.left_behind(programs, {})  # type: ignore[arg-type]  # nothing looks at it


async def test_scrapes_that_pass_are_not_left_behind(looks: list[dict[str, str]]) -> None:
    looks += [{"a": "one in flight"}, {"b": "one in flight"}]
    assert await left() == []


async def test_what_stays_is_told_once_the_time_is_up(
    looks: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "SETTLED_S_MAX", 0.05)
    looks += [{"a": "1 lease", "b": "a scrape"}, {"a": "1 lease"}]
    assert await left() == ["1 lease"]


async def test_nothing_there_ends_it_at_once(looks: list[dict[str, str]]) -> None:
    looks += [{}]
    assert await left() == []
