"""Start what a run needs, wait until it serves, and see that none of it stays behind."""

import http.client
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from benchmarks.relay.contenders import Launch

READY_S_MAX = 30.0
_STOP_S_MAX = 5.0
_LOG_TAIL_BYTES = 2_000


class StartError(Exception):
    """A process did not serve in time; carries the end of what it wrote."""


@contextmanager
def started(launch: Launch, log_file: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The running process and the port where it serves; stopped, or killed, on the way out.

    Raises:
        StartError: if it does not serve within READY_S_MAX.
    """
    with log_file.open("wb") as log:
        stdout: int | IO[bytes] = subprocess.PIPE if launch.port is None else log
        process = subprocess.Popen(launch.command, stdout=stdout, stderr=log)
        try:
            yield process, _wait_ready(process, launch, log_file)
        finally:
            _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], launch: Launch, log_file: Path) -> int:
    if launch.port is None:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        if len(words) == 2 and words[0] == b"ready":
            return int(words[1])
        raise _start_error(launch, log_file)
    deadline_s = time.monotonic() + READY_S_MAX
    while time.monotonic() < deadline_s and process.poll() is None:
        if _answers(launch.port, launch.ready_path):
            return launch.port
        time.sleep(0.1)
    raise _start_error(launch, log_file)


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _start_error(launch: Launch, log_file: Path) -> StartError:
    tail = log_file.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
    return StartError(f"{' '.join(launch.command)}: not serving after {READY_S_MAX:g} s or ended\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.stdout is not None:
        process.stdout.close()
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S_MAX)
        return
    process.kill()
    process.wait()


def python_module(name: str, *arguments: str) -> Launch:
    """A module of this benchmark that prints its port."""
    return Launch([sys.executable, "-m", f"benchmarks.relay.{name}", *arguments])
