"""Workers do what is ordered, and their end waits for what has begun, but not for ever."""

import threading

from transfer.workers import Workers

WAIT_S = 30.0


def test_orders_run_side_by_side_and_the_end_drops_what_has_not_begun() -> None:
    workers = Workers(2, "test")
    workers.start()
    both, hold = threading.Barrier(3), threading.Event()
    done: list[str] = []

    def held() -> None:
        both.wait(WAIT_S)
        assert hold.wait(WAIT_S)
        done.append("held")

    workers.submit(held)
    workers.submit(held)
    both.wait(WAIT_S)
    workers.submit(lambda: done.append("late"))
    assert workers.close(0.01) is False
    hold.set()
    assert workers.close(WAIT_S) is True
    assert done == ["held", "held"]
    workers.submit(lambda: done.append("never"))
    assert workers.close(0.0) is True


def test_workers_that_never_started_end_at_once() -> None:
    assert Workers(3, "test").close(0.0) is True
