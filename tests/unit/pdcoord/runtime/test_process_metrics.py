"""What a process tells of itself."""

import asyncio

from pdcoord.runtime.metricspec import bound_of
from pdcoord.runtime.process_metrics import CERTIFICATE_USES, TASKS, certificate_samples, task_samples
from pdcoord.wire.validity import Validity


def count() -> float:
    ((spec, samples),) = task_samples()
    assert spec is TASKS
    ((labels, value),) = samples
    assert labels == ()
    return value


def test_outside_of_a_loop_there_are_no_tasks() -> None:
    assert count() == 0


async def test_tasks_count_until_they_have_ended() -> None:
    before = count()
    over = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(over.wait())
        assert count() == before + 3
        over.set()
    assert count() == before


def test_only_certificates_that_are_there_have_dates() -> None:
    read = {"listener": lambda: Validity(1.0, 2.0), "admin": lambda: None}
    found = {spec.name.split("_")[3]: list(samples) for spec, samples in certificate_samples(read)}
    assert found == {"begins": [(("listener",), 1.0)], "expires": [(("listener",), 2.0)]}


def test_the_uses_are_those_that_bound_the_label() -> None:
    for spec, _ in certificate_samples({}):
        bound = bound_of(spec.name, "use")
        assert bound is not None
        assert bound.values == frozenset(CERTIFICATE_USES)
