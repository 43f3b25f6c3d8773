"""The prober against a scripted agent: what is asked, shown, counted and logged."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import msgspec
from structlog.testing import capture_logs

from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.paths import PathsReport, decode_paths
from pdcoord.protocol.plans import PrefillTarget
from sidecar.errors import AgentLostError
from sidecar.observe import Metrics
from sidecar.probes import PROBES_MAX, Prober, ProbeRules
from transfer.session.messages import ProbeTold

A, B = (PrefillTarget(address=HostPort(f"10.0.0.{n}:8000")) for n in (1, 2))
KV_A, KV_B = HostPort("10.0.0.1:14579"), HostPort("10.0.0.2:14579")
GOOD = ProbeTold(
    address=KV_A, verdict="regroup", transport="nixl/UCX rc_mlx5", latency_s=1e-4, bytes_per_s=1e10
)


class Agent:
    """Answers by address; `answers` may hold an error, or None for silence until `is_free`."""

    def __init__(self) -> None:
        self.answers: dict[HostPort, ProbeTold | Exception | None] = {}
        self.asked: list[HostPort] = []
        self.busy = 0
        self.busy_max = 0
        self.is_free = asyncio.Event()

    async def ask(self, producer: HostPort) -> ProbeTold:
        self.asked.append(producer)
        self.busy += 1
        self.busy_max = max(self.busy, self.busy_max)
        try:
            await asyncio.sleep(0)
            answer = self.answers.get(producer, GOOD)
            if answer is None:
                await self.is_free.wait()
                answer = GOOD
            if isinstance(answer, Exception):
                raise answer
            return msgspec.structs.replace(answer, address=producer)
        finally:
            self.busy -= 1


class Bench:
    def __init__(self, *targets: PrefillTarget) -> None:
        self.agent = Agent()
        self.listed = list(targets)
        self.metrics = Metrics()
        self.ahead_s = 0.0
        self.looks = 0
        loop = asyncio.get_running_loop()
        self.prober = Prober(
            self.agent.ask,
            self.targets,
            ProbeRules(interval_s=10.0, kv_port=14_579, look_s=0.005),
            rng=random.Random(1),
            metrics=self.metrics,
            now_s=lambda: loop.time() + self.ahead_s,
        )

    def targets(self) -> list[PrefillTarget]:
        self.looks += 1
        return self.listed

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.timeout(20.0), asyncio.TaskGroup() as group:
            task = group.create_task(self.prober.run())
            yield
            task.cancel()

    def report(self) -> PathsReport:
        report = decode_paths(self.prober.report())
        assert report is not None
        return report

    def has_lost(self, count: int) -> bool:
        return (self.value('probes_total{outcome="agent-unreachable"}') or 0.0) >= count

    def value(self, series: str) -> float | None:
        rows = [row.rpartition(" ") for row in self.metrics.exposition().decode().splitlines()]
        return next((float(value) for name, _, value in rows if name == f"pdcoord_sidecar_{series}"), None)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # What the code under test does sets no event.
        await asyncio.sleep(0.001)


async def test_the_first_round_is_at_once_and_is_what_readiness_waits_for() -> None:
    bench = Bench(A, B)
    bench.agent.answers[KV_B] = None
    assert not bench.prober.is_warm()
    async with bench.running():
        await until(lambda: bench.value('probes_total{outcome="ok"}') == 1.0)
        assert not bench.prober.is_warm()
        bench.agent.is_free.set()
        await until(bench.prober.is_warm)
    assert sorted(bench.agent.asked) == [KV_A, KV_B]
    assert {(path.target, path.probe_count) for path in bench.report().paths} == {
        (A.address, 1),
        (B.address, 1),
    }


async def test_a_probe_is_shown_by_target_and_logged_once() -> None:
    bench = Bench(A)
    with capture_logs() as lines:
        async with bench.running():
            await until(bench.prober.is_warm)
            bench.ahead_s += 20.0
            await until(lambda: len(bench.agent.asked) == 2 and not bench.agent.busy)
    target = f'{{target="{A.address}"}}'
    assert bench.value(f"path_usable{target}") == 1.0
    assert bench.value(f"path_degraded{target}") == 0.0
    assert bench.value(f"path_latency_seconds{target}") == 1e-4
    assert bench.value(f"path_bandwidth_bytes_per_second{target}") == 1e10
    assert bench.value("kv_agent_up") == 1.0
    changes = [line for line in lines if line["event"] == "path.changed"]
    assert [(c["target"], c["verdict"], c["log_level"]) for c in changes] == [(A.address, "regroup", "info")]


async def test_a_failed_probe_takes_the_figures_back_and_warns() -> None:
    bench = Bench(A)
    target = f'{{target="{A.address}"}}'
    with capture_logs() as lines:
        async with bench.running():
            await until(bench.prober.is_warm)
            bench.agent.answers[KV_A] = ProbeTold(address=KV_A, failure="unreachable", detail="refused")
            bench.ahead_s += 20.0
            await until(lambda: bench.value(f"path_usable{target}") == 0.0)
    assert bench.value(f"path_bandwidth_bytes_per_second{target}") is None
    assert bench.value('probes_total{outcome="unreachable"}') == 1.0
    last = [line for line in lines if line["event"] == "path.changed"][-1]
    assert (last["failure"], last["detail"], last["log_level"]) == ("unreachable", "refused", "warning")
    assert bench.report().paths[0].failure == "unreachable"


async def test_a_degraded_transport_is_said() -> None:
    bench = Bench(A)
    bench.agent.answers[KV_A] = ProbeTold(address=KV_A, verdict="native", transport="tcp", is_degraded=True)
    with capture_logs() as lines:
        async with bench.running():
            await until(bench.prober.is_warm)
    assert bench.value(f'path_degraded{{target="{A.address}"}}') == 1.0
    (line,) = [line for line in lines if line["event"] == "path.changed"]
    assert (line["transport"], line["is_degraded"], line["log_level"]) == ("tcp", True, "warning")


async def test_an_agent_that_cannot_be_asked_is_no_news_of_the_paths() -> None:
    bench = Bench(A)
    errors: list[Exception] = [AgentLostError("refused"), AgentLostError("no key"), TimeoutError()]
    with capture_logs() as lines:
        async with bench.running():
            for count, error in enumerate(errors, start=1):
                bench.agent.answers[KV_A] = error
                await until(partial(bench.has_lost, count))
                bench.ahead_s += 5.0
            assert not bench.prober.is_warm()
            assert not bench.report().is_agent_up
            assert bench.value("kv_agent_up") == 0.0
            bench.agent.answers[KV_A] = GOOD
            bench.ahead_s += 5.0
            await until(bench.prober.is_warm)
    assert bench.value(f'path_usable{{target="{A.address}"}}') == 1.0
    assert [line["event"] for line in lines if line["event"].startswith("agent.")] == ["agent.found"]


async def test_only_so_many_probes_at_a_time() -> None:
    targets = [PrefillTarget(address=HostPort(f"10.0.1.{n}:1")) for n in range(3 * PROBES_MAX)]
    bench = Bench(*targets)
    bench.agent.answers = dict.fromkeys((HostPort(f"10.0.1.{n}:14579") for n in range(len(targets))), None)
    async with bench.running():
        await until(lambda: bench.agent.busy >= PROBES_MAX and bench.looks > 5)
        bench.agent.is_free.set()
        await until(bench.prober.is_warm)
    assert bench.agent.busy_max == PROBES_MAX


async def test_a_target_that_goes_takes_its_series_along() -> None:
    bench = Bench(A, B)
    async with bench.running():
        await until(bench.prober.is_warm)
        bench.listed = [B]
        bench.ahead_s += 20.0
        await until(lambda: len(bench.report().paths) == 1)
    assert bench.value(f'path_usable{{target="{A.address}"}}') is None
    assert bench.value(f'path_usable{{target="{B.address}"}}') == 1.0


async def test_cancelling_the_prober_cancels_what_it_asks() -> None:
    bench = Bench(A)
    bench.agent.answers[KV_A] = None
    async with bench.running():
        await until(lambda: bench.agent.busy == 1)
    assert bench.agent.busy == 0
