"""What a sidecar asks needs neither numpy nor an engine, and tells what went wrong."""

import subprocess
import sys

import pytest

from transfer.links import LinkError
from transfer.side_client import ask_probe, ask_probe_now, can_ask, describe

WITHOUT_NUMPY = """
import sys
for name in ("numpy", "nixl", "ucxx", "torch", "vllm"):
    sys.modules[name] = None
from transfer.side_client import ask_probe, describe
print("fine")
"""


def test_it_is_importable_without_numpy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMPY], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.parametrize("address", ["", "nowhere", "host:port", "host:0", "host:99999", ":80"])
async def test_an_address_that_is_none_is_told_as_the_own_agents_fault(address: str) -> None:
    told = await ask_probe(address, "10.0.0.1:14579", b"", 1.0)
    assert told.failure == "unreachable"
    assert told.detail.startswith("own agent: ")
    assert told.address == "10.0.0.1:14579"
    with pytest.raises(LinkError):
        await describe(address, b"", 1.0)


def test_without_an_event_loop() -> None:
    assert ask_probe_now("nowhere", "10.0.0.1:14579", b"", 1.0).failure == "unreachable"


def test_only_this_host_may_ask_without_a_key() -> None:
    assert can_ask("127.0.0.1")
    assert can_ask("::1")
    assert not can_ask("10.0.0.1")
    assert not can_ask("")
