"""The admin listener answers nobody but who shows its key."""

import json
from typing import Any

import pytest

from pdcoord.front.keys import KeyFault
from pdcoord.gateway.admin_guard import guarded

KEY = b"0123456789abcdef0123456789abcdef"


class Guarded:
    """An app behind the guard, and what came of asking it."""

    def __init__(self) -> None:
        self.key: bytes | None = KEY
        self.faults: list[KeyFault] = []
        self.asked: list[str] = []
        self.app = guarded(self.inner, lambda: self.key, self.faults.append)

    async def inner(self, scope: Any, _receive: Any, _send: Any) -> None:
        self.asked.append(scope["path"])

    async def ask(self, headers: list[tuple[bytes, bytes]], path: str = "/fleet") -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError("nobody reads a body here")

        await self.app({"type": "http", "path": path, "headers": headers}, receive, send)
        return sent


@pytest.mark.parametrize("header", [(b"authorization", b"Bearer " + KEY), (b"x-api-key", KEY)])
async def test_who_shows_the_key_is_answered(header: tuple[bytes, bytes]) -> None:
    guard = Guarded()
    assert await guard.ask([header]) == []
    assert (guard.asked, guard.faults) == (["/fleet"], [])


@pytest.mark.parametrize(
    ("headers", "fault"),
    [
        ([], KeyFault.MISSING),
        ([(b"authorization", b"Basic " + KEY)], KeyFault.MISSING),
        ([(b"authorization", b"Bearer " + KEY[:-1])], KeyFault.UNKNOWN),
        ([(b"authorization", b"Bearer " + KEY + b"x")], KeyFault.UNKNOWN),
        ([(b"authorization", b"Bearer " + KEY), (b"x-api-key", b"x")], KeyFault.AMBIGUOUS),
    ],
)
@pytest.mark.parametrize("path", ["/fleet", "/openapi.json", "/no-such-page"])
async def test_nobody_else_learns_anything(headers: Any, fault: KeyFault, path: str) -> None:
    guard = Guarded()
    head, body = await guard.ask(headers, path)
    assert head["status"] == 401
    assert (b"www-authenticate", b"Bearer") in head["headers"]
    assert json.loads(body["body"])["error"]["code"] == "unauthorized"
    assert (guard.asked, guard.faults) == ([], [fault])


async def test_the_key_may_change_while_it_is_asked_for() -> None:
    guard = Guarded()
    guard.key = KEY[::-1]
    assert await guard.ask([(b"x-api-key", KEY)])
    assert not await guard.ask([(b"x-api-key", KEY[::-1])])
    guard.key = None
    assert not await guard.ask([])
