"""Every backend that moves bytes between processes keeps the same promises, held by two real processes."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

STATION = Path(__file__).with_name("transfer_station.py")
ROOT = STATION.parents[2]
MIB = 1 << 20
LENGTH = 64 * MIB
ANSWER_S = 30.0


def has(module: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.util.find_spec(module) is not None
    return False


def needs(module: str, *kinds: str) -> list[Any]:
    absent = pytest.mark.skipif(not has(module), reason=f"{module} is not installed")
    return [pytest.param(kind, marks=absent) for kind in kinds]


KINDS = [
    *needs("nixl", "nixl:tcp,self,sm", "nixl:tcp,self"),
    *needs("ucxx", "ucx:tcp,self,sm"),
    *needs("transfer.backends.tcp", "tcp"),
]
# Bytes that the peer's processor sends can be stopped half-way; a copy by this kernel cannot.
SENT_KINDS = [
    *needs("nixl", "nixl:tcp,self"),
    *needs("ucxx", "ucx:tcp,self"),
    *needs("transfer.backends.tcp", "tcp"),
]


class Station:
    """The other end of transfer_station.py."""

    def __init__(self, kind: str, seed: int, length_bytes: int = LENGTH) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
        environment |= {"PYTHONPATH": str(ROOT), "NIXL_LOG_LEVEL": "FATAL", "UCX_WARN_UNUSED_ENV_VARS": "n"}
        self.process = subprocess.Popen(
            [sys.executable, str(STATION)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        try:
            self.do("start", kind=kind, length_bytes=length_bytes, seed=seed)
        except BaseException:
            self.end()
            raise

    def do(self, what: str, **order: Any) -> Any:
        answer = self.answer(what, **order)
        assert "ok" in answer, answer
        return answer["ok"]

    def answer(self, what: str, **order: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"do": what, **order}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise AssertionError(f"the station ended with {self.process.wait(5)}")

    def read(self, peer: str, pieces: list[list[int]], timeout_s: float = 20.0) -> Any:
        number = self.do("read", peer=peer, pieces=pieces, timeout_s=timeout_s)
        return self.answer("wait", read=number, timeout_s=ANSWER_S)

    def digest(self, offset: int, length_bytes: int) -> str:
        return str(self.do("digest", offset=offset, length_bytes=length_bytes))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


MakeStation = Callable[..., Station]


@pytest.fixture
def stations() -> Iterator[MakeStation]:
    made: list[Station] = []

    def make(kind: str, seed: int, **arguments: Any) -> Station:
        made.append(Station(kind, seed, **arguments))
        return made[-1]

    yield make
    for station in made:
        station.end()


def connected(make: MakeStation, kind: str) -> tuple[Station, Station]:
    owner, reader = make(kind, 1), make(kind, 0)
    reader.do("connect", peer="owner", metadata=owner.do("metadata"))
    return owner, reader


@pytest.mark.parametrize("kind", KINDS)
def test_scattered_pieces_arrive_where_they_belong(kind: str, stations: MakeStation) -> None:
    owner, reader = connected(stations, kind)
    # A regular series, neighbours that merge, an empty one, single bytes, and a last one at the region's end.
    pieces = [[i * 16_384, MIB + i * 8_192, 8_192] for i in range(40)]
    pieces += [[MIB, 0, 100], [MIB + 100, 100, 28], [5, 5, 0]]
    pieces += [[3 * MIB + 7 * i, 4 * MIB + 13 * i, 1 + i % 3] for i in range(1_200)]
    pieces += [[LENGTH - 3 * MIB, LENGTH - 3 * MIB, 3 * MIB]]
    answer = reader.read("owner", pieces)
    read_bytes, descriptor_count, moved_s = answer["ok"]
    assert read_bytes == sum(length for _, _, length in pieces)
    assert 0 < descriptor_count < len(pieces)
    assert moved_s > 0
    for remote, local, length in [*pieces[:42], *pieces[43:100], pieces[-2], pieces[-1]]:
        assert reader.digest(local, length) == owner.digest(remote, length), (remote, local, length)
    # Nothing else was touched.
    empty = stations(kind, 0)
    assert reader.digest(8 * MIB, MIB) == empty.digest(8 * MIB, MIB)
    assert reader.read("owner", [])["ok"][0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_many_reads_at_once_all_end(kind: str, stations: MakeStation) -> None:
    owner, reader = connected(stations, kind)
    step = MIB // 2
    numbers = [
        reader.do("read", peer="owner", pieces=[[i * step, i * step, step]], timeout_s=20.0)
        for i in range(64)
    ]
    assert all("ok" in reader.answer("wait", read=number, timeout_s=ANSWER_S) for number in numbers)
    assert reader.digest(0, 64 * step) == owner.digest(0, 64 * step)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_read_fails_and_leaves_the_rest_alone(kind: str, stations: MakeStation) -> None:
    owner, reader = connected(stations, kind)
    for piece in ([LENGTH - 10, 0, 11], [0, LENGTH - 10, 11], [LENGTH + 5, 0, 1], [-1, 0, 2], [0, 0, -1]):
        assert reader.read("owner", [[0, 0, 8], piece])["error"] == "BackendError", piece
    assert reader.read("nobody", [[0, 0, 1]])["error"] == "PeerLostError"
    again = reader.answer("connect", peer="owner", metadata=owner.do("metadata"))
    assert again["error"] == "BackendError"
    for bad in (
        "",
        "00",
        "ff" * 64,
        owner.do("metadata")[: -len(owner.do("metadata")) // 2 * 2 or None][:40],
    ):
        assert reader.answer("connect", peer="bad", metadata=bad)["error"] in {
            "BackendError",
            "PeerLostError",
        }
    assert reader.read("owner", [[0, 0, MIB]])["ok"][0] == MIB
    assert reader.digest(0, MIB) == owner.digest(0, MIB)
    reader.do("forget", peer="nobody")


def stop(station: Station) -> None:
    os.kill(station.process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, station.process.pid, os.WSTOPPED | os.WNOWAIT)


def go_on(station: Station) -> None:
    os.kill(station.process.pid, signal.SIGCONT)


def assert_nothing_was_written(make: MakeStation, kind: str, owner: Station, reader: Station) -> None:
    """A later read has come, and what the ended one asked for has not."""
    reader.do("connect", peer="owner again", metadata=owner.do("metadata"))
    assert "ok" in reader.read("owner again", [[LENGTH - MIB, LENGTH - MIB, MIB]])
    empty = make(kind, 0)
    assert reader.digest(0, LENGTH - MIB) == empty.digest(0, LENGTH - MIB)


@pytest.mark.parametrize("kind", SENT_KINDS)
def test_a_read_of_a_forgotten_peer_ends_before_its_memory_is_free(kind: str, stations: MakeStation) -> None:
    owner, reader = connected(stations, kind)
    assert "ok" in reader.read("owner", [[0, 0, 4_096]])
    stop(owner)
    number = reader.do("read", peer="owner", pieces=[[0, 0, LENGTH]], timeout_s=60.0)
    reader.do("forget", peer="owner")
    if kind.startswith("nixl"):
        # NIXL cannot end a transfer: it is over when the peer has answered, or is lost.
        assert not reader.do("is_done", read=number)
        go_on(owner)
    assert reader.answer("wait", read=number, timeout_s=ANSWER_S)["error"] == "PeerLostError"
    reader.do("zero")
    go_on(owner)
    assert_nothing_was_written(stations, kind, owner, reader)
    assert reader.read("owner", [[0, 0, 1]])["error"] == "PeerLostError"


@pytest.mark.parametrize("kind", SENT_KINDS)
def test_a_read_of_a_silent_peer_ends_before_its_memory_is_free(kind: str, stations: MakeStation) -> None:
    owner, reader = connected(stations, kind)
    assert "ok" in reader.read("owner", [[0, 0, 4_096]])
    stop(owner)
    number = reader.do("read", peer="owner", pieces=[[0, 0, LENGTH]], timeout_s=0.3)
    if kind.startswith("nixl"):
        late = reader.answer("wait", read=number, timeout_s=1.0)
        assert late["error"] == "TimeoutError", "what it would write to is not free"
        assert reader.read("owner", [[0, 0, 1]])["error"] == "PeerLostError"
        go_on(owner)
    assert reader.answer("wait", read=number, timeout_s=ANSWER_S)["error"] == "ReadTimeoutError"
    reader.do("zero")
    go_on(owner)
    reader.do("forget", peer="owner")
    assert_nothing_was_written(stations, kind, owner, reader)


@pytest.mark.parametrize("kind", SENT_KINDS)
def test_nothing_is_written_after_close_even_from_a_silent_peer(kind: str, stations: MakeStation) -> None:
    owner, reader = connected(stations, kind)
    assert "ok" in reader.read("owner", [[LENGTH - 4_096, LENGTH - 4_096, 4_096]])
    stop(owner)
    number = reader.do("read", peer="owner", pieces=[[0, 0, LENGTH]], timeout_s=60.0)
    reader.do("close")
    assert reader.answer("wait", read=number, timeout_s=ANSWER_S)["error"] in {
        "PeerLostError",
        "BackendError",
    }
    reader.do("zero")
    go_on(owner)
    # The peer lives on or, with UCX's emulated reads over TCP, ends by an assertion of UCX: either way it has
    # dealt with the wish by the time it answers or is gone.
    with contextlib.suppress(AssertionError, BrokenPipeError):
        owner.do("cpu")
    empty = stations(kind, 0)
    assert reader.digest(0, LENGTH) == empty.digest(0, LENGTH)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_peer_is_lost_and_its_successor_serves(kind: str, stations: MakeStation) -> None:
    owner, reader = connected(stations, kind)
    bystander = stations(kind, 2)
    reader.do("connect", peer="bystander", metadata=bystander.do("metadata"))
    assert "ok" in reader.read("owner", [[0, 0, 4_096]])
    number = reader.do("read", peer="owner", pieces=[[0, 0, LENGTH]], timeout_s=5.0)
    owner.process.kill()
    owner.process.wait()
    answer = reader.answer("wait", read=number, timeout_s=ANSWER_S)
    # The read may have been over before the signal came.
    assert answer.get("error", "PeerLostError") in {"PeerLostError", "ReadTimeoutError"}
    after = reader.read("owner", [[0, 0, MIB]], timeout_s=1.0)
    assert after["error"] in {"PeerLostError", "ReadTimeoutError"}
    assert "ok" in reader.read("bystander", [[0, MIB, MIB]])
    assert reader.digest(MIB, MIB) == bystander.digest(0, MIB)
    reader.do("forget", peer="owner")
    successor = stations(kind, 3)
    reader.do("connect", peer="successor", metadata=successor.do("metadata"))
    assert "ok" in reader.read("successor", [[0, 0, LENGTH]])
    assert reader.digest(0, LENGTH) == successor.digest(0, LENGTH)


@pytest.mark.parametrize("kind", KINDS)
def test_close_ends_what_is_under_way_and_may_be_called_again(kind: str, stations: MakeStation) -> None:
    owner, reader = connected(stations, kind)
    number = reader.do("read", peer="owner", pieces=[[0, 0, LENGTH]], timeout_s=20.0)
    reader.do("close")
    answer = reader.answer("wait", read=number, timeout_s=ANSWER_S)
    assert "ok" in answer or answer["error"] in {"PeerLostError", "BackendError"}
    reader.do("close")
    late = reader.do("read", peer="owner", pieces=[[0, 0, 1]], timeout_s=1.0)
    refused = reader.answer("wait", read=late, timeout_s=ANSWER_S)
    assert refused["error"] in {"PeerLostError", "BackendError"}
    owner.do("close")
    for station in (owner, reader):
        assert station.process.stdin
        station.process.stdin.close()
        assert station.process.wait(10) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_idle_backend_leaves_the_processor_alone(kind: str, stations: MakeStation) -> None:
    owner, reader = connected(stations, kind)
    assert "ok" in reader.read("owner", [[0, 0, MIB]])
    begun_s = time.monotonic()
    before_s = [owner.do("cpu"), reader.do("cpu")]
    time.sleep(1.0)
    after_s = [owner.do("cpu"), reader.do("cpu")]
    passed_s = time.monotonic() - begun_s
    # A thread that polls without sleeping uses all of its time, even where it has to share the processor.
    assert [b - a for a, b in zip(before_s, after_s, strict=True)] < [0.3 * passed_s] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_transport_in_use_is_told(kind: str, stations: MakeStation) -> None:
    _, reader = connected(stations, kind)
    assert "ok" in reader.read("owner", [[0, 0, MIB]])
    told = reader.do("transport", peer="owner").lower()
    assert "unknown" not in told
    if kind in {"nixl:tcp,self", "tcp"}:
        assert "tcp" in told
    if kind.startswith(("nixl", "ucx")):
        assert "/" in told
