"""Hosts of the network chaos: what is done to a line is felt by whom it is meant for, and then removed."""

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from benchmarks.chaos import hop
from benchmarks.chaos.hop import Fate
from benchmarks.chaos.lines import deaf, late, losing_others, mute
from benchmarks.chaos.netns import Hosts, NoNetworkError, remove_forgotten

ECHO = """
import asyncio, sys
async def echo(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
async def main():
    servers = [await asyncio.start_server(echo, sys.argv[1], int(port)) for port in sys.argv[2:]]
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
PORTS = (7_001, 7_002)
SIDE, DATA = PORTS
BULK_BYTES = 300_000


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        with Hosts(["server"]) as made:
            yield made
            assert not made.pids()
    except NoNetworkError as error:
        pytest.skip(str(error))
    assert not [
        each for each in Path("/sys/class/net").iterdir() if each.name.startswith(f"pdc{os.getpid()}")
    ]


@pytest.fixture
async def server(hosts: Hosts) -> AsyncIterator[str]:
    """Address of a host that answers at both ports with what it is sent."""
    address = hosts.addresses["server"]
    command = [*hosts.prefixes["server"], sys.executable, "-c", ECHO, address, *map(str, PORTS)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    async with asyncio.timeout(60):
        assert await process.stdout.readline() == b"ready\n"
    assert process.pid in hosts.pids()
    try:
        yield address
    finally:
        process.kill()
        await process.wait()


class Line:
    """A connection to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def echo(self, data: bytes = b"x") -> float:
        """How long the answer took, in s."""
        begun_s = time.monotonic()
        self._writer.write(data)
        assert await self._reader.readexactly(len(data)) == data
        return time.monotonic() - begun_s

    async def is_silent(self) -> bool:
        """Whether there is no answer for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.4):
                await self.echo()
                return False
        return True

    async def heal(self) -> None:
        """Read what comes late of an answer that was lost."""
        assert await self._reader.readexactly(1) == b"x"


@contextlib.asynccontextmanager
async def lines(address: str) -> AsyncIterator[tuple[Line, Line]]:
    async with asyncio.timeout(60), contextlib.AsyncExitStack() as stack:
        found = []
        for port in PORTS:
            reader, writer = await asyncio.open_connection(address, port)
            stack.callback(writer.close)
            found.append(Line(reader, writer))
            await found[-1].echo()
        side, data = found
        yield side, data


needs_taps = pytest.mark.skipif(not hop.is_there(), reason="no TAP devices")


@needs_taps
async def test_late_frames_arrive_whole_and_then_are_late_no_more(hosts: Hosts, server: str) -> None:
    async with lines(server) as (side, data):
        async with hosts.hop("server", late(random.Random(0))):
            # There and back, at 30 ms each at least.
            assert await side.echo() >= 0.06
            # More than a frame holds: cut to size, and in order.
            await data.echo(os.urandom(BULK_BYTES))
        await data.echo(os.urandom(BULK_BYTES))
        await side.echo()
    async with lines(server) as (side, _):
        await side.echo()


@needs_taps
@pytest.mark.parametrize(
    ("fate", "is_side_lost"),
    [(deaf({SIDE}), True), (mute({SIDE}), True), (losing_others({SIDE}), False)],
    ids=["deaf", "mute", "losing-others"],
)
async def test_one_port_is_lost_and_the_other_is_not(
    hosts: Hosts, server: str, fate: Fate, *, is_side_lost: bool
) -> None:
    async with lines(server) as (side, data):
        lost, well = (side, data) if is_side_lost else (data, side)
        async with hosts.hop("server", fate):
            assert await lost.is_silent()
            await well.echo()
        await lost.heal()
        await lost.echo()


async def test_a_pulled_cable_and_a_plugged_in_one(hosts: Hosts, server: str) -> None:
    async with lines(server) as (side, _):
        hosts.cut("server", is_on=True)
        assert await side.is_silent()
        hosts.cut("server", is_on=False)
        await side.heal()


async def test_only_connections_of_the_port_are_reset(hosts: Hosts, server: str) -> None:
    async with lines(server) as (side, data):

        async def until_reset() -> None:
            # A reset whose number has been overtaken is ignored by the server, so there may be several tries.
            while True:
                async with asyncio.TaskGroup() as group:
                    struck = group.create_task(hosts.reset("server", 0.3, {SIDE}))
                    await data.echo()
                    await side.echo()
                assert struck.result() == 1

        with pytest.raises(ExceptionGroup) as raised:
            await until_reset()
        assert raised.value.subgroup(ConnectionResetError) is not None
        await data.echo()


def test_what_a_killed_run_left_is_removed() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    space = f"pdc{ended.pid}n0"
    if subprocess.run(["ip", "netns", "add", space], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces")
    orphan = subprocess.Popen(["ip", "netns", "exec", space, "sleep", "600"])
    try:
        deadline_s = time.monotonic() + 30
        while not subprocess.check_output(["ip", "netns", "pids", space]):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        remove_forgotten()
        assert orphan.wait(30) == -9
    finally:
        orphan.kill()
        orphan.wait()
    assert not Path("/run/netns", space).exists()
