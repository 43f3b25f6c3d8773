"""A bounded queue of commands to the one thread that owns a transport library."""

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from transfer.backends.base import Piece, ReadReport
from transfer.errors import BackendError

T = TypeVar("T")

COMMANDS_MAX = 4_096
"""Most commands that wait for the owner thread."""


def running_future() -> "Future[T]":
    """A future that its holder cannot cancel: what it stands for is under way."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(frozen=True, slots=True)
class Connect:
    peer: str
    metadata: bytes
    future: "Future[None]" = field(default_factory=running_future)


@dataclass(frozen=True, slots=True)
class Read:
    """`deadline_s` and `asked_s` are of the monotonic clock."""

    peer: str
    pieces: Sequence[Piece]
    asked_s: float
    deadline_s: float
    future: "Future[ReadReport]" = field(default_factory=running_future)


@dataclass(frozen=True, slots=True)
class Forget:
    peer: str
    future: "Future[None]" = field(default_factory=running_future)


Command = Connect | Read | Forget


def obey(
    command: Command,
    connect: Callable[[Connect], None],
    read: Callable[[Read], None],
    forget: Callable[[str], None],
    translated: Callable[[Exception], BackendError],
) -> None:
    """Carry a command out in the owner's thread; what it raises ends its future.

    Args:
        translated: what an exception of the library means; those have no base of their own.
    """
    try:
        match command:
            case Connect():
                connect(command)
            case Read():
                read(command)
            case Forget():
                forget(command.peer)
                command.future.set_result(None)
    except BackendError as error:
        command.future.set_exception(error)
    except Exception as error:  # noqa: BLE001  # whatever the library raises
        command.future.set_exception(translated(error))


class Commands:
    """The queue; `submit` from any thread, `take` from the owner's.

    Args:
        wake: called after each command that was put, to end the owner's wait where `take` is not what it
            waits in.
    """

    def __init__(self, wake: Callable[[], None] | None = None) -> None:
        # One more place is for the word that wakes the owner at the end.
        self._queue: queue.Queue[Command | None] = queue.Queue(COMMANDS_MAX + 1)
        self._lock = threading.Lock()
        self._is_closed = False
        self._wake = wake

    def submit(self, command: Command) -> None:
        """Hand a command over; where that is impossible its future fails with a BackendError at once."""
        reason = ""
        with self._lock:
            if self._is_closed:
                reason = "the backend is closed"
            elif self._queue.qsize() >= COMMANDS_MAX:
                reason = f"{COMMANDS_MAX} commands wait already"
            else:
                self._queue.put_nowait(command)
        if reason:
            command.future.set_exception(BackendError(reason))
        elif self._wake is not None:
            self._wake()

    def take(self, timeout_s: float | None) -> Command | None:
        """The next command; None after the time, or because the queue was closed."""
        try:
            return self._queue.get_nowait() if timeout_s == 0 else self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        """Take no more commands and wake the owner. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._queue.put_nowait(None)
        if self._wake is not None:
            self._wake()

    def fail_all(self, error: BackendError) -> None:
        """Fail whatever still waits."""
        while True:
            try:
                command = self._queue.get_nowait()
            except queue.Empty:
                return
            if command is not None:
                command.future.set_exception(error)


class Commanding(ABC):
    """The calls of a backend whose work is done by commands to its owner thread; see `base.Backend`."""

    @abstractmethod
    def _running_commands(self) -> Commands:
        """The owner's queue.

        Raises:
            BackendError: if the backend has not been started.
        """

    def connect(self, peer: str, metadata: bytes) -> "Future[None]":
        command = Connect(peer, metadata)
        self._running_commands().submit(command)
        return command.future

    def read(self, peer: str, pieces: Sequence[Piece], *, timeout_s: float) -> "Future[ReadReport]":
        asked_s = time.monotonic()
        command = Read(peer, tuple(pieces), asked_s, asked_s + timeout_s)
        self._running_commands().submit(command)
        return command.future

    def forget(self, peer: str) -> "Future[None]":
        command = Forget(peer)
        self._running_commands().submit(command)
        return command.future
