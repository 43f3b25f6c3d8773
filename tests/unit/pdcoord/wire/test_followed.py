"""Files that are looked at again."""

import asyncio
from pathlib import Path

from pdcoord.wire.followed import Stamp, follow


def test_a_change_counts_once(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1")
    stamp = Stamp((one, None, other))
    assert stamp.is_changed()
    assert not stamp.is_changed()
    other.write_text("2")
    assert stamp.is_changed()
    one.unlink()
    assert stamp.is_changed()
    assert not stamp.is_changed()


def test_a_link_that_is_turned_is_a_change(tmp_path: Path) -> None:
    """As Kubernetes replaces a Secret's files."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("same length")
    data, turned = tmp_path / "..data", tmp_path / "turned"
    data.symlink_to("a")
    stamp = Stamp((data / "file",))
    stamp.is_changed()
    turned.symlink_to("b")
    turned.rename(data)
    assert stamp.is_changed()


class Part:
    name = "part"

    def __init__(self) -> None:
        self.outcomes: list[bool | ValueError] = [False, True, ValueError("why"), True]

    def look(self) -> bool:
        outcome = self.outcomes.pop(0) if self.outcomes else False
        if isinstance(outcome, ValueError):
            raise outcome
        return outcome


async def test_what_cannot_be_used_is_told_and_looked_at_again() -> None:
    told: list[tuple[str, str | None]] = []
    part = Part()
    async with asyncio.timeout(20.0), asyncio.TaskGroup() as group:
        task = group.create_task(follow([part], lambda name, why: told.append((name, why)), interval_s=0.001))
        while len(told) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
    assert told == [("part", None), ("part", "why"), ("part", None)]
