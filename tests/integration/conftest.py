"""What several integration tests share: ranks of engines, each a process, and an engine's tokenizer."""

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from transfer.layout import GroupShape, KvLayout, LayerScales, RankLayout
from transfer.session.wire import rank_layout_to_wire

SCRIPT = Path(__file__).with_name("transfer_rank.py")
WAIT_S = 40.0
"""Longest wait for a condition; the box may be busy."""


class RankProcess:
    """One rank of an engine in a process of its own.

    Attributes:
        address: of its side channel.
    """

    def __init__(
        self,
        layout: KvLayout,
        groups: tuple[GroupShape, ...],
        *,
        kind: str = "tcp",
        rank: int = 0,
        scales: tuple[tuple[LayerScales, ...], ...] = (),
        engine: tuple[str, str] | None = None,
        blocks: int = 64,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.layout = RankLayout(layout, rank, groups, scales)
        self.engine, self.epoch = engine or (secrets.token_hex(4), secrets.token_hex(8))
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.address: str = self.ask(
            "start",
            layout=rank_layout_to_wire(self.layout),
            kind=kind,
            engine=self.engine,
            epoch=self.epoch,
            blocks=blocks,
            settings=settings or {},
        )

    def ask(self, do: str, **fields: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        # Of a process that was killed just now the pipe is broken before its output ends.
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                answer = json.loads(line.removeprefix("ANSWER "))
                assert "error" not in answer, answer
                return answer["ok"]
        raise AssertionError(f"the rank's process ended with {self.process.wait()}")

    def until(self, do: str, is_so: Callable[[Any], bool], **fields: Any) -> Any:
        """Ask until the answer is as it should be."""
        deadline_s = time.monotonic() + WAIT_S
        while not is_so(answer := self.ask(do, **fields)):
            assert time.monotonic() < deadline_s, answer
            time.sleep(0.002)
        return answer

    def report(self, request: str) -> str:
        """How a load ended: a FailureKind, or empty."""
        answer = self.until("poll", lambda told: request in told["reports"])
        kind: str = answer["reports"][request][0]
        return kind

    def drained(self) -> dict[str, Any]:
        """Statistics once nothing is staged and nothing lands any more."""
        stats: dict[str, Any] = self.until("stats", lambda told: told["staging_used_bytes"] == 0)
        return stats

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(WAIT_S)
        finally:
            self.process.kill()
            self.process.stdout.close()


@pytest.fixture
def rank_process() -> Iterator[Callable[..., RankProcess]]:
    """Starts ranks, which end with the test."""
    started: list[RankProcess] = []

    def start(*args: Any, **fields: Any) -> RankProcess:
        started.append(RankProcess(*args, **fields))
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.fixture
def tokenized() -> Callable[..., bytes]:
    """What an engine's /tokenize answers to a body; deaf, its template ends the answer to be continued."""
    return _tokenized


def _tokenized(asked: dict[str, Any], *, is_deaf: bool) -> bytes:
    """As vLLM answers: a word is a token, and so is what begins a message or ends it."""
    if "prompt" in asked:
        spelled = asked["prompt"].split()
    else:
        messages = [(each["role"], *each["content"].split(), "</s>") for each in asked["messages"]]
        spelled = [*(word for message in messages for word in message)]
        if not asked.get("continue_final_message"):
            spelled.append("assistant")
        elif not is_deaf:
            spelled.pop()
    ids = [sum(map(ord, word)) for word in spelled]
    return json.dumps({"count": len(ids), "tokens": ids, "token_strs": spelled}).encode()
