"""Reading and pumping one response, back-pressure and silence, on a fake transport."""

import asyncio
from collections.abc import Awaitable

import pytest

from pdcoord.wire.errors import BodyTooLargeError, StalledError, StreamError
from pdcoord.wire.heads import Headers
from pdcoord.wire.response import BUFFERED_BYTES_MAX, Response, is_event_stream, is_plain_stream


class Transport:
    """Notes whether it may be read."""

    def __init__(self) -> None:
        self.is_reading = True
        self.pauses = 0

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        assert self.is_reading
        self.is_reading = False
        self.pauses += 1

    def resume_reading(self) -> None:
        assert not self.is_reading
        self.is_reading = True


class Rig:
    """A response in its body, with its peer's side to be played by the test."""

    def __init__(self) -> None:
        self.transport = Transport()
        self.aborts = 0
        self.loop = asyncio.get_running_loop()
        self.response = Response(self.loop, self.transport, self._abort)  # type: ignore[arg-type]

    def _abort(self) -> None:
        self.aborts += 1

    def arrive(self, data: bytes) -> None:
        self.response.chunks.append(data)
        self.response.fed(len(data))


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_read_takes_all_that_has_come_and_then_waits_for_more() -> None:
    rig = Rig()
    rig.arrive(b"a")
    rig.arrive(b"b")
    assert await rig.response.read_chunk(idle_timeout_s=5.0) == b"ab"
    rig.loop.call_soon(rig.arrive, b"c")
    assert await rig.response.read_chunk(idle_timeout_s=5.0) == b"c"
    rig.loop.call_soon(rig.response.end)
    assert await rig.response.read_chunk(idle_timeout_s=5.0) == b""
    assert await rig.response.read_chunk(idle_timeout_s=5.0) == b""
    assert rig.aborts == 0


async def test_bytes_of_framing_wake_nobody_for_long() -> None:
    rig = Rig()
    rig.loop.call_soon(rig.response.fed, 5)
    rig.loop.call_later(0.01, rig.arrive, b"x")
    assert await rig.response.read_chunk(idle_timeout_s=5.0) == b"x"


async def test_a_reader_that_is_behind_stops_the_socket_until_it_has_caught_up() -> None:
    rig = Rig()
    for _ in range(5):
        rig.arrive(b"x" * (BUFFERED_BYTES_MAX // 4))
    assert not rig.transport.is_reading
    assert len(await rig.response.read_chunk(idle_timeout_s=5.0)) == BUFFERED_BYTES_MAX // 4 * 5
    assert rig.transport.is_reading
    rig.arrive(b"y")
    assert rig.transport.pauses == 1


async def test_a_body_that_ends_while_its_reader_is_behind_leaves_the_socket_to_the_next() -> None:
    rig = Rig()
    rig.arrive(b"x" * (BUFFERED_BYTES_MAX + 1))
    assert not rig.transport.is_reading
    rig.response.end()
    assert rig.transport.is_reading
    assert len(await rig.response.read_all(timeout_s=5.0)) == BUFFERED_BYTES_MAX + 1
    assert rig.transport.pauses == 1


async def test_silence_inside_a_body_fails_it_and_closes() -> None:
    rig = Rig()
    rig.arrive(b"a")
    assert await rig.response.read_chunk(idle_timeout_s=0.01) == b"a"
    with pytest.raises(StreamError, match="silent"):
        await rig.response.read_chunk(idle_timeout_s=0.01)
    assert rig.aborts == 1


async def test_a_shorter_idle_timeout_replaces_a_longer_one() -> None:
    rig = Rig()
    rig.loop.call_soon(rig.arrive, b"a")
    assert await rig.response.read_chunk(idle_timeout_s=3_600.0) == b"a"
    async with asyncio.timeout(5.0):
        with pytest.raises(StreamError, match="silent"):
            await rig.response.read_chunk(idle_timeout_s=0.01)


async def test_the_time_between_reads_does_not_count_as_silence() -> None:
    rig = Rig()
    rig.loop.call_soon(rig.arrive, b"a")
    await rig.response.read_chunk(idle_timeout_s=0.02)
    await asyncio.sleep(0.05)  # Longer than the idle timeout: this is what is tested.
    rig.loop.call_soon(rig.arrive, b"b")
    assert await rig.response.read_chunk(idle_timeout_s=5.0) == b"b"
    assert rig.aborts == 0


async def test_cancelling_a_read_closes() -> None:
    rig = Rig()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(rig.response.read_chunk(idle_timeout_s=5.0))
        await settle()
        task.cancel()
    assert rig.aborts == 1


async def test_leaving_with_the_body_unread_closes_and_after_its_end_does_not() -> None:
    rig = Rig()
    async with rig.response:
        rig.arrive(b"a")
    assert rig.aborts == 1
    with pytest.raises(StreamError, match="closed by its reader"):
        await rig.response.read_chunk(idle_timeout_s=5.0)
    rig = Rig()
    async with rig.response:
        rig.response.end()
    await rig.response.aclose()
    assert rig.aborts == 0


async def test_a_body_is_read_whole_within_its_bounds() -> None:
    rig = Rig()
    rig.arrive(b"ab")
    rig.loop.call_soon(rig.arrive, b"c")
    rig.loop.call_later(0.01, rig.response.end)
    assert await rig.response.read_all(timeout_s=5.0, bytes_max=3) == b"abc"


async def test_a_body_past_its_bound_is_refused_and_closes() -> None:
    rig = Rig()
    rig.arrive(b"abcd")
    with pytest.raises(BodyTooLargeError):
        await rig.response.read_all(timeout_s=5.0, bytes_max=3)
    assert rig.aborts == 1


async def test_a_body_that_does_not_end_in_time_fails_and_closes() -> None:
    rig = Rig()
    rig.arrive(b"a")
    with pytest.raises(StreamError, match="not ended"):
        await rig.response.read_all(timeout_s=0.01)
    assert rig.aborts == 1


async def test_pumping_hands_on_every_read_at_once_in_order_and_ends() -> None:
    rig = Rig()
    got: list[bytes] = []
    rig.arrive(b"early")
    async with asyncio.TaskGroup() as group:
        group.create_task(rig.response.pump(got.append, idle_timeout_s=5.0))
        assert rig.response.last == b""
        await settle()
        assert got == [b"early"]
        assert rig.response.last == b"early"
        rig.arrive(b"a")
        assert rig.response.last == b"a"
        assert got == [b"early", b"a"], "no task is needed to hand it on"
        rig.response.chunks.extend([b"b", b"c"])
        rig.response.fed(2)
        rig.response.chunks.append(b"last")
        rig.response.end()
    assert got == [b"early", b"a", b"bc", b"last"]
    assert (rig.response.last, rig.response.part_count) == (b"last", 4)


async def test_pumping_gives_nothing_more_until_the_pause_that_the_sink_asked_for_is_over() -> None:
    rig = Rig()
    got: list[bytes] = []
    gate = asyncio.Event()

    async def pause() -> None:
        await gate.wait()

    def sink(data: bytes) -> Awaitable[None] | None:
        got.append(data)
        return pause() if data == b"full" else None

    async with asyncio.TaskGroup() as group:
        group.create_task(rig.response.pump(sink, idle_timeout_s=5.0))
        rig.arrive(b"a")
        await settle()
        rig.arrive(b"full")
        await settle()
        for _ in range(5):
            rig.arrive(b"x" * (BUFFERED_BYTES_MAX // 4))
        await settle()
        assert got == [b"a", b"full"]
        assert not rig.transport.is_reading, "what a stalled client does not take must not pile up"
        assert rig.response.is_held_up
        gate.set()
        await settle()
        assert not rig.response.is_held_up
        await settle()
        assert rig.transport.is_reading
        rig.response.end()
    assert len(b"".join(got)) == 5 + BUFFERED_BYTES_MAX // 4 * 5


class Watch:
    """Allows so much silence; parts that begin with a colon are none of it."""

    def __init__(self, allowed_s: float, *then_s: float) -> None:
        self.allowed_s = allowed_s
        self.then_s = list(then_s)
        self.asked: list[float] = []

    def is_progress(self, part: bytes) -> bool:
        return not part.startswith(b":")

    def silence_s_max(self, silent_s: float) -> float:
        if silent_s:
            self.asked.append(silent_s)
            return self.then_s.pop(0)
        return self.allowed_s


@pytest.mark.parametrize("has_begun", [True, False])
async def test_a_body_that_comes_without_progress_ends_when_its_watch_says_so(*, has_begun: bool) -> None:
    rig, watch = Rig(), Watch(0.03, 0.03)
    if has_begun:
        rig.arrive(b"token")

    async def breathe() -> None:
        while True:
            rig.arrive(b": alive")
            await asyncio.sleep(0.005)

    async with asyncio.timeout(5.0), asyncio.TaskGroup() as group:
        breath = group.create_task(breathe())
        with pytest.raises(StalledError):
            await rig.response.pump(lambda _: None, idle_timeout_s=3_600.0, watch=watch)
        breath.cancel()
    assert rig.aborts == 1
    assert watch.asked[0] >= 0.03


async def test_a_watch_may_allow_more_when_it_is_asked() -> None:
    rig, watch = Rig(), Watch(0.02, 0.06, 0.0)
    with pytest.raises(StalledError):
        await rig.response.pump(lambda _: None, idle_timeout_s=3_600.0, watch=watch)
    first_s, second_s = watch.asked[:2]
    assert 0.02 <= first_s < second_s
    assert second_s >= 0.06


async def test_a_watch_that_fails_ends_the_body_and_is_told_of() -> None:
    rig, watch = Rig(), Watch(0.02)
    told: list[dict[str, object]] = []
    rig.loop.set_exception_handler(lambda _, context: told.append(context))
    with pytest.raises(StalledError):
        await rig.response.pump(lambda _: None, idle_timeout_s=3_600.0, watch=watch)
    (context,) = told
    assert isinstance(context["exception"], IndexError)


async def test_progress_and_waiting_for_the_sink_are_no_silence() -> None:
    rig, watch = Rig(), Watch(0.08, 0.08)
    gate = asyncio.Event()

    async def pause() -> None:
        await gate.wait()

    sink = {b"full": pause}
    async with asyncio.timeout(5.0), asyncio.TaskGroup() as group:
        pump = group.create_task(
            rig.response.pump(
                lambda part: sink[part]() if part in sink else None, idle_timeout_s=3_600.0, watch=watch
            )
        )
        for _ in range(20):
            await asyncio.sleep(0.01)  # In all longer than is allowed: this is what is tested.
            rig.arrive(b"token")
        rig.arrive(b"full")
        await asyncio.sleep(0.2)  # Likewise.
        assert not pump.done()
        gate.set()
        rig.response.end()
    assert rig.aborts == 0


async def test_a_dead_body_is_silent_whatever_its_watch_allows() -> None:
    rig = Rig()
    with pytest.raises(StreamError, match="silent"):
        await rig.response.pump(lambda _: None, idle_timeout_s=0.02, watch=Watch(3_600.0))


@pytest.mark.parametrize("when", ["buffered", "pushed"])
async def test_what_the_sink_raises_is_raised_by_the_pump_and_closes(when: str) -> None:
    rig = Rig()

    def sink(data: bytes) -> None:
        if data == b"bad":
            raise RuntimeError("sink")

    rig.arrive(b"bad" if when == "buffered" else b"good")
    rig.loop.call_later(0.01, rig.arrive, b"bad")
    with pytest.raises(RuntimeError, match="sink"):
        await rig.response.pump(sink, idle_timeout_s=5.0)
    assert rig.aborts == 1


async def test_a_body_that_fails_while_pumped_hands_on_the_rest_first() -> None:
    rig = Rig()
    got: list[bytes] = []

    def break_off() -> None:
        rig.response.chunks.append(b"rest")
        rig.response.fail(StreamError("broke"))

    rig.arrive(b"a")
    rig.loop.call_later(0.01, break_off)
    with pytest.raises(StreamError, match="broke"):
        await rig.response.pump(got.append, idle_timeout_s=5.0)
    assert got == [b"a", b"rest"]


async def test_silence_while_pumping_fails_the_body() -> None:
    rig = Rig()
    got: list[bytes] = []
    rig.arrive(b"a")
    rig.loop.call_later(0.01, rig.arrive, b"b")
    async with asyncio.timeout(5.0):
        with pytest.raises(StreamError, match="silent"):
            await rig.response.pump(got.append, idle_timeout_s=0.04)
    assert got == [b"a", b"b"]
    assert rig.aborts == 1


async def test_a_stream_that_keeps_coming_is_never_silent() -> None:
    rig = Rig()
    left = 12

    def more() -> None:
        nonlocal left
        left -= 1
        rig.arrive(b"x")
        if left:
            rig.loop.call_later(0.02, more)
        else:
            rig.response.end()

    rig.loop.call_soon(more)
    await rig.response.pump(lambda _data: None, idle_timeout_s=0.2)
    assert rig.aborts == 0


async def test_cancelling_a_pump_closes_and_drops_a_pause_that_nobody_will_await() -> None:
    rig = Rig()

    async def pause() -> None:
        raise AssertionError("it must not run")

    def sink(data: bytes) -> Awaitable[None] | None:
        if data == b"full":
            task.cancel()
            return pause()
        return None

    async with asyncio.TaskGroup() as group:
        task = group.create_task(rig.response.pump(sink, idle_timeout_s=5.0))
        rig.arrive(b"a")
        await settle()
        rig.arrive(b"full")
    assert task.cancelled()
    assert rig.aborts == 1


@pytest.mark.parametrize(
    ("headers", "is_stream", "is_plain"),
    [
        ([(b"content-type", b"text/event-stream; charset=utf-8")], True, True),
        ([(b"content-type", b"TEXT/Event-Stream")], True, True),
        ([(b"content-type", b"text/event-stream"), (b"content-encoding", b"gzip")], True, False),
        ([(b"content-type", b"text/plain")], False, False),
        ([], False, False),
    ],
)
async def test_what_is_an_event_stream_and_can_be_read_as_one(
    headers: Headers, *, is_stream: bool, is_plain: bool
) -> None:
    response = Rig().response
    response.headers = headers
    assert (is_event_stream(response), is_plain_stream(response)) == (is_stream, is_plain)
