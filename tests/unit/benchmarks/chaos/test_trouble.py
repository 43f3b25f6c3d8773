"""Which faults are drawn: all kinds, at parts that can have them, and never at the last of a kind."""

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.chaos import trouble as trouble_module
from benchmarks.chaos.fleet import lay_out
from benchmarks.chaos.programs import Programs
from benchmarks.chaos.trouble import Trouble
from pdcoord.wire.client import Client


async def test_every_kind_strikes_and_one_of_each_part_is_left_alone(tmp_path: Path) -> None:
    async with Client() as client:
        programs = Programs(tmp_path, lay_out(tmp_path), client)
        trouble = Trouble(programs, random.Random(3))
        drawn = [trouble.draw() for _ in range(400)]
        kinds = Counter(fault.kind for fault in drawn if fault is not None)
        assert len(kinds) >= 15
        assert {"kill", "stop", "terminate", "stall", "reset"} <= kinds.keys()
        engines = {f.target.partition("-")[0] for f in drawn if f is not None and f.kind == "stall"}
        assert engines == {"decode"}

        struck = 0
        for seed in range(20):
            other = Trouble(programs, random.Random(seed))
            while (fault := other.draw()) is not None:
                other.hold(fault.target)
                struck += 1
            well = Counter(part.kind for name, part in programs.parts.items() if not other.is_struck(name))
            assert all(well[kind] >= 1 for kind in ("prefill", "decode", "sidecar", "gateway")), well
        assert struck >= 40


async def test_only_what_ucx_ended_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    running = {"prefill-1", "decode-0", "decode-2"}

    async def start(_: Programs, name: str) -> None:
        started.append(name)
        running.add(name)

    async def until_ready(_: Programs, name: str) -> None:
        assert name in running

    monkeypatch.setattr(trouble_module, "_LOOK_S", 0.001)
    monkeypatch.setattr(Programs, "start", start)
    monkeypatch.setattr(Programs, "until_ready", until_ready)
    monkeypatch.setattr(Programs, "is_running", lambda _, name: name in running)
    async with Client() as client:
        programs = Programs(tmp_path, lay_out(tmp_path), client)
        for name in programs.parts:
            programs.log(name).write_text("ready\n")
        programs.log("prefill-0").write_text(
            "[1] Fatal: unexpected error: Endpoint timeout\n==== backtrace\n"
        )
        trouble = Trouble(programs, random.Random(3))
        trouble.hold("decode-1")
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            keeping = group.create_task(trouble.keep_running())
            while not started or trouble.is_struck("prefill-0"):
                await asyncio.sleep(0.001)
            keeping.cancel()
    assert started == ["prefill-0"]
    assert trouble.counts == {"ended-by-ucx": 1}
    assert not trouble.failures
