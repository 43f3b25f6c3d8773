"""Readiness: the engine's word, a drain, and for a bounded time the first look at the paths."""

import asyncio
from typing import Self

import pytest

from pdcoord.protocol.headers import HostPort
from pdcoord.wire.errors import ConnectError
from sidecar import health
from sidecar.health import Health
from sidecar.observe import Metrics


class Engine:
    """Answers /health; stands for the client and for its response."""

    def __init__(self) -> None:
        self.status = 200
        self.is_there = True

    async def request(self, method: str, address: str, target: str, **options: object) -> Self:
        assert (method, target) == ("GET", "/health")
        if not self.is_there:
            raise ConnectError("refused")
        return self

    async def read_all(self, *, timeout_s: float, bytes_max: int) -> bytes:
        return b""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *details: object) -> None:
        pass


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = Engine()
        self.is_warm = False
        self.now_s = 1_000.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now_s)
        self.health = Health(
            self.engine,  # type: ignore[arg-type]
            HostPort("e:1"),
            Metrics(),
            lambda: self.is_warm,
        )

    async def after(self, seconds: float) -> str:
        self.now_s += seconds
        # No timer may be set on a clock that stands still: what is asked here waits for nothing.
        return await self.health.why_not()


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(health, "PROBE_S_MAX", 3_600.0)
    return Bench(monkeypatch)


async def test_a_pod_is_ready_once_its_paths_were_probed(bench: Bench) -> None:
    assert "being probed" in await bench.after(0.0)
    bench.is_warm = True
    assert await bench.after(2.0) == ""


async def test_a_prefill_pod_that_hangs_does_not_keep_this_one_out_of_service(bench: Bench) -> None:
    assert "being probed" in await bench.after(0.0)
    assert "being probed" in await bench.after(health.WARM_S_MAX - 0.1)
    assert await bench.after(0.2) == ""


async def test_the_wait_begins_with_the_engines_first_good_answer(bench: Bench) -> None:
    bench.engine.is_there = False
    assert "/health" in await bench.after(0.0)
    bench.engine.is_there = True
    bench.engine.status = 503
    assert "/health" in await bench.after(100.0)
    bench.engine.status = 200
    assert "being probed" in await bench.after(100.0)


async def test_targets_that_come_later_are_no_reason_to_leave_service(bench: Bench) -> None:
    bench.is_warm = True
    assert await bench.after(0.0) == ""
    bench.is_warm = False
    assert await bench.after(2.0) == ""


async def test_a_drain_goes_before_everything(bench: Bench) -> None:
    bench.is_warm = bench.health.is_draining = True
    assert await bench.after(0.0) == "draining"
