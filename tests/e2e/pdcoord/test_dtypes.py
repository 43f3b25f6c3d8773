"""Servers of other and of unlike number formats."""

import sys
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

NAMES = ("bf16-128", "fp16-128", "fp32-32", "fp32-64")
LENGTHS = (1, 33, 128, 300, 512, 513, 1100)
# Of log-probabilities, between answers to one prompt on this model, over tokens that they have in common.
# bf16 keeps 8 bits of a number: two servers with unlike formats differ by 0.04 to 0.09 in what they compute
# themselves, and split answers by no more.
BOUND = 0.2


@pytest.fixture(scope="module")
def running(servers: Any) -> dict[str, Any]:
    return dict(zip(NAMES, servers.up(*NAMES), strict=True))


def test_fp32_with_unlike_blocks_gives_the_tokens_of_the_decode_server(running: Any, compare: Any) -> None:
    compare.tokens(running["fp32-32"], running["fp32-64"])


@pytest.mark.parametrize(
    ("prefill", "decode"), [("fp16-128", "bf16-128"), ("bf16-128", "fp32-64")], ids=lambda name: name
)
def test_unlike_formats_differ_by_no_more_than_their_rounding(
    running: Any, compare: Any, prefill: str, decode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens would be the wrong measure: where two are nearly as likely, rounding decides."""
    failed = running[decode].failures()
    apart, control = compare.logprobs(running[prefill], running[decode], LENGTHS)
    with capsys.disabled():
        sys.stdout.write(f"split {apart:.3f}, the two servers alone {control:.3f}, bound {BOUND} ")
    assert apart <= BOUND
    assert running[decode].failures() == failed
