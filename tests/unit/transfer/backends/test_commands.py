import pytest

from transfer.backends.commands import COMMANDS_MAX, Commands, Forget
from transfer.errors import BackendError


def test_commands_come_in_order_and_wake_the_owner() -> None:
    woken: list[int] = []
    commands = Commands(lambda: woken.append(1))
    given = [Forget(str(number)) for number in range(3)]
    for command in given:
        commands.submit(command)
    assert [commands.take(0) for _ in range(4)] == [*given, None]
    assert len(woken) == 3


def test_a_full_queue_fails_the_newest() -> None:
    commands = Commands()
    for number in range(COMMANDS_MAX):
        commands.submit(Forget(str(number)))
    late = Forget("late")
    commands.submit(late)
    with pytest.raises(BackendError, match="wait already"):
        late.future.result(0)


def test_a_closed_queue_fails_what_waits_and_what_comes() -> None:
    commands = Commands()
    waiting, late = Forget("waiting"), Forget("late")
    commands.submit(waiting)
    commands.close()
    commands.close()
    commands.submit(late)
    commands.fail_all(BackendError("closed"))
    for command in (waiting, late):
        with pytest.raises(BackendError, match="closed"):
            command.future.result(0)


def test_a_future_under_way_cannot_be_cancelled() -> None:
    assert not Forget("x").future.cancel()
