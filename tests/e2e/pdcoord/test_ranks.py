"""One rank hands over to two, and two to one."""

from typing import Any

import pytest

pytestmark = pytest.mark.e2e

# fp32, as ranks add up in another order than one alone does, which rounds bf16 to other tokens.
ONE, TWO = "fp32-64", "fp32-64-tp2"


@pytest.fixture(scope="module")
def running(servers: Any) -> dict[str, Any]:
    return dict(zip((ONE, TWO), servers.up(ONE, TWO), strict=True))


@pytest.mark.parametrize(("prefill", "decode"), [(ONE, TWO), (TWO, ONE)], ids=["1 to 2", "2 to 1"])
def test_ranks_may_differ(running: Any, compare: Any, prefill: str, decode: str) -> None:
    compare.tokens(running[prefill], running[decode])


def test_blocks_and_staging_of_all_ranks_are_free_again(
    running: Any, hand_over: Any, words: Any, wait: Any
) -> None:
    one, two = running[ONE], running[TWO]
    for prefill, decode in ((one, two), (two, one)):
        hand_over.one_after_the_other(prefill, decode, words.prompt(900))
    for server in (one, two):
        wait(lambda server=server: server.used_blocks == 0, 60, "all blocks are free")
