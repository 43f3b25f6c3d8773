"""Which faults are drawn: all kinds, at parts that can have them, and never at the last of a kind."""

import random
from collections import Counter
from pathlib import Path

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
