"""Workloads written to a file, and run as a simulator would run them."""

import heapq
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdcoord.sim.workload.call import Call, Workload
from pdcoord.sim.workload.compile import compile_workload
from pdcoord.sim.workload.mixed import MixedWorkload
from pdcoord.sim.workload.workloadfile import load_workload

HEAD = "apiVersion: pdcoord.io/v1alpha1\nkind: Workload\n"

Write = Callable[[str], Path]
Compile = Callable[..., MixedWorkload]
Follow = Callable[..., list[Call]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a Workload document and give its path."""

    def write_text(text: str) -> Path:
        path = tmp_path / "workload.yaml"
        path.write_text(HEAD + text)
        return path

    return write_text


@pytest.fixture
def compiled(write: Write) -> Compile:
    def compile_text(text: str, **options: object) -> MixedWorkload:
        return compile_workload(load_workload(write(text)), **options)  # type: ignore[arg-type]

    return compile_text


def played(workload: Workload, answer_s: float = 1.0) -> Iterator[Call]:
    """All calls in the order of time, each answered after `answer_s`."""
    waiting: list[tuple[float, int, Call]] = []
    calls = workload.calls()
    known = next(calls, None)
    while known is not None or waiting:
        if known is not None and (not waiting or known.at_s <= waiting[0][0]):
            call, known = known, next(calls, None)
        else:
            call = heapq.heappop(waiting)[2]
        yield call
        following = workload.after(call, call.at_s + answer_s)
        if following is not None:
            heapq.heappush(waiting, (following.at_s, following.id, following))


@pytest.fixture
def follow() -> Follow:
    return lambda workload, answer_s=1.0: list(played(workload, answer_s))
