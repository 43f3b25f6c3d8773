"""Order in one publisher's batches: what is next, what was missed, and whether it is still the same process.

Batches are numbered from 0 by each process. A subscriber hears only what is published once it is
connected, and loses what it is too slow for; a replay socket gives what the publisher still keeps. That a
replay is by the same process is known by the last batch taken, which is asked for again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import xxhash


class Trouble(StrEnum):
    """What went wrong with one endpoint's events; closed, a metric's label."""

    GAP = "gap"
    REPLAY = "replay"
    REPLAY_FAILED = "replay-failed"
    RESTART = "restart"
    LOST = "lost"
    BATCH_UNREADABLE = "batch-unreadable"
    EVENT_UNREADABLE = "event-unreadable"
    FRAMES_UNREADABLE = "frames-unreadable"
    THROTTLED = "throttled"


@dataclass(frozen=True, slots=True)
class Batch:
    """One numbered payload."""

    number: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Deliver:
    """The payload is the next."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Clear:
    """Forget everything: what is delivered from here on is all there is."""


@dataclass(frozen=True, slots=True)
class Lose:
    """Forget everything: what is delivered from here on lacks something."""


@dataclass(frozen=True, slots=True)
class Count:
    """Something happened that is counted."""

    trouble: Trouble


@dataclass(frozen=True, slots=True)
class Replay:
    """Ask for all batches from this number on; the answer goes to `replayed`. The last of its list."""

    first: int


Action = Deliver | Clear | Lose | Count | Replay

WHOLE_REPLAYS_MAX = 3
"""Attempts to get everything again from a publisher whose replays came with holes or not at all."""


class BatchSequence:
    """The batches of one address.

    Every method returns what to do, in order. After a Replay comes `replayed` or `replay_failed` before
    anything else; meanwhile what is published waits in the subscriber's queue.
    """

    def __init__(self, *, has_replay: bool) -> None:
        self._has_replay = has_replay
        self._next: int | None = None
        self._digest: int | None = None
        self._heard: int | None = None
        self._covered = 0
        self._waiting: Batch | None = None
        self._asked: int | None = None
        self._is_whole = False
        self._whole_tries = 0
        self._is_unsure = False

    @property
    def next_number(self) -> int | None:
        """Of the batch that comes next; None before the first."""
        return self._next

    def connected(self) -> list[Action]:
        """The publisher can be heard, for the first time or again; it may be another process by now."""
        self._heard, self._covered = None, 0
        self._is_unsure = self._next is not None
        return self.check()

    def check(self) -> list[Action]:
        """Make sure that nothing was missed, not even at the end; try again for what was."""
        if not self._has_replay:
            return []
        if self._is_whole or self._next is None or self._whole_tries >= WHOLE_REPLAYS_MAX:
            return self._ask()
        self._whole_tries += 1
        return self._ask(is_whole=True)

    def received(self, batch: Batch) -> list[Action]:
        """A batch was published."""
        heard, self._heard = self._heard, batch.number
        if batch.number == self._next and not self._is_unsure:
            self._covered = 0
            return [self._take(batch)]
        if self._next is None:
            return self._begin(batch)
        if batch.number >= self._next:
            is_gap = batch.number > self._next
            return [*([Count(Trouble.GAP)] if is_gap else []), *self._fill(batch)]
        if batch.number < self._covered and (heard is None or batch.number > heard):
            return []  # It was published while a replay gave it already.
        # Numbers go back only when another process begins.
        self._next = self._digest = None
        self._is_unsure = False
        return [Count(Trouble.RESTART), *self._begin(batch)]

    def replayed(self, batches: Sequence[Batch]) -> list[Action]:
        """The answer to the last Replay, in order; what it does not have the publisher no longer keeps."""
        first, self._asked = self._asked, None
        assert first is not None, "an answer to nothing"
        self._is_unsure = False
        if self._digest is not None and self._next == first + 1:
            if not batches or batches[0].number != first or not self._is_last(batches[0]):
                # Another process, or so many batches since that the last one taken is no longer kept.
                is_restart = not batches or batches[0].number <= first
                self._next = self._digest = None
                return [*([Count(Trouble.RESTART)] if is_restart else []), *self._ask()]
            actions = self._take_run(batches[1:])
        else:
            actions = self._take_all(batches)
        actions += self._take_waiting()
        self._covered = self._next or 0
        return actions

    def replay_failed(self) -> list[Action]:
        """No answer, or not all of it: what was missed is lost."""
        assert self._asked is not None, "the failure of nothing"
        self._asked = None
        return [Count(Trouble.REPLAY_FAILED), *self._take_waiting()]

    def _ask(self, *, is_whole: bool = False) -> list[Action]:
        if is_whole or self._next is None:
            self._asked, self._digest = 0, None
        else:
            self._asked = max(0, self._next - 1)
        return [Count(Trouble.REPLAY), Replay(self._asked)]

    def _begin(self, batch: Batch) -> list[Action]:
        """Take a first batch, which is all there is if it is the first of all."""
        if batch.number:
            return self._fill(batch)
        self._is_whole, self._whole_tries = True, 0
        return [Clear(), self._take(batch)]

    def _fill(self, batch: Batch) -> list[Action]:
        """Get what is missing before a batch, or go on without."""
        self._waiting = batch
        return self._ask() if self._has_replay else self._take_waiting()

    def _take_all(self, batches: Sequence[Batch]) -> list[Action]:
        """Take an answer that should begin with the first of all."""
        self._is_whole = not batches or batches[0].number == 0
        if not self._is_whole:
            # The beginning is no longer kept: no use in asking for it again.
            self._whole_tries = WHOLE_REPLAYS_MAX
            self._next = batches[0].number
            return [Count(Trouble.LOST), Lose(), *self._take_run(batches)]
        self._next = 0
        actions = [Clear(), *self._take_run(batches)]
        if self._is_whole:
            self._whole_tries = 0
        return actions

    def _take_run(self, batches: Sequence[Batch]) -> list[Action]:
        """Take consecutive batches; where one is missing, what came before is forgotten."""
        actions: list[Action] = []
        for batch in batches:
            if self._next is not None and batch.number < self._next:
                continue
            if batch.number != self._next:
                self._is_whole = False
                actions += [Count(Trouble.LOST), Lose()]
            actions.append(self._take(batch))
        return actions

    def _take_waiting(self) -> list[Action]:
        batch, self._waiting = self._waiting, None
        if batch is None:
            return []
        if self._is_unsure:
            # Whether it is the same process cannot be said, and it may have the next number by chance.
            self._is_unsure, self._next = False, None
        return self._take_run([batch])

    def _take(self, batch: Batch) -> Action:
        self._next = batch.number + 1
        self._digest = xxhash.xxh3_64_intdigest(batch.payload)
        return Deliver(batch.payload)

    def _is_last(self, batch: Batch) -> bool:
        return self._digest == xxhash.xxh3_64_intdigest(batch.payload)
