"""Work reaches the loop in order, with few wake-ups, and not after the end."""

import asyncio
import threading

from transfer.mailbox import BATCH_MAX, Mailbox


async def test_work_of_many_threads_is_all_done_and_each_thread_in_order() -> None:
    seen: list[tuple[int, int]] = []
    mailbox = Mailbox(asyncio.get_running_loop(), lambda: None)

    def send(name: int) -> None:
        for number in range(500):
            assert mailbox.post(lambda number=number: seen.append((name, number)))

    threads = [threading.Thread(target=send, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    async with asyncio.timeout(30):
        while len(seen) < 1_500:
            await asyncio.sleep(0.001)
    for thread in threads:
        thread.join()
    for name in range(3):
        assert [number for who, number in seen if who == name] == list(range(500))


async def test_the_loop_is_woken_once_for_all_that_waits_and_gets_its_turn_in_between() -> None:
    loop = asyncio.get_running_loop()
    mailbox = Mailbox(loop, lambda: None)
    seen: list[int] = []
    for number in range(3 * BATCH_MAX):
        mailbox.post(lambda number=number: seen.append(number))
    await asyncio.sleep(0)
    assert len(seen) == BATCH_MAX
    for _ in range(3):
        await asyncio.sleep(0)
    assert seen == list(range(3 * BATCH_MAX))


async def test_after_a_fault_and_after_the_end_nothing_is_done() -> None:
    failed: list[bool] = []
    mailbox = Mailbox(asyncio.get_running_loop(), lambda: failed.append(True))
    seen: list[int] = []

    def fault() -> None:
        raise AssertionError("a fault of ours")

    mailbox.post(lambda: seen.append(1))
    mailbox.post(fault)
    mailbox.post(lambda: seen.append(2))
    for _ in range(3):
        await asyncio.sleep(0)
    assert (seen, failed) == ([1], [True])
    assert mailbox.post(lambda: seen.append(3)) is False
    mailbox.close()
