"""What a sidecar asks of its own engine's agent, over the side channel: no KV, no staging, no numpy."""

import asyncio
import secrets
import time

from transfer.errors import FailureKind
from transfer.links import Link, LinkError, LinkLimits, Peer, dial, is_loopback
from transfer.session.messages import VERSION, Hello, Message, ProbeAsk, ProbeTold

_OUT_BYTES_MAX = 1 << 20
_HEARTBEAT_S = 5.0
_AGENT_SHARE = 0.9
"""What the agent may take of the time that is left, so that its answer comes in time."""


def can_ask(host: str) -> bool:
    """Whether an agent without a key does what this peer asks."""
    return is_loopback(host)


async def ask_probe(agent_address: str, producer_address: str, key: bytes, timeout_s: float) -> ProbeTold:
    """Have the agent of an engine probe a producer.

    Returns a ProbeTold whose `failure` says what went wrong, with the producer or on the way to the agent.
    """
    until_s = time.monotonic() + timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            link = await _dial(agent_address, key, timeout_s)
            # The agent ends first: that the producer did not answer must not look as if the agent had not.
            left_s = max(0.0, until_s - time.monotonic()) * _AGENT_SHARE
            return await _ask(link, ProbeAsk(address=producer_address, timeout_s=left_s))
    except LinkError as error:
        return _not_asked(producer_address, error.failure.kind, f"own agent: {error.failure.detail}")
    except TimeoutError:
        detail = f"own agent at {agent_address} did not tell in {timeout_s:g} s"
        return _not_asked(producer_address, FailureKind.TRANSFER_TIMEOUT, detail)


async def describe(agent_address: str, key: bytes, timeout_s: float) -> Peer:
    """What an agent tells of itself.

    Raises:
        LinkError: if it cannot be asked.
    """
    link = await _dial(agent_address, key, timeout_s)
    link.end(FailureKind.CLOSED)
    await link.run(lambda _: None)
    return link.peer


def ask_probe_now(agent_address: str, producer_address: str, key: bytes, timeout_s: float) -> ProbeTold:
    """`ask_probe` for a caller without an event loop."""
    return asyncio.run(ask_probe(agent_address, producer_address, key, timeout_s))


async def _dial(address: str, key: bytes, timeout_s: float) -> Link:
    hello = Hello(version=VERSION, nonce=b"", engine_id="", epoch=secrets.token_hex(8))
    return await dial(address, hello, key, LinkLimits(_HEARTBEAT_S, timeout_s, _OUT_BYTES_MAX))


async def _ask(link: Link, question: ProbeAsk) -> ProbeTold:
    told: list[ProbeTold] = []

    def hear(message: Message) -> None:
        if isinstance(message, ProbeTold):
            told.append(message)
            link.end(FailureKind.CLOSED)

    link.send(question)
    failure = await link.run(hear)
    if not told:
        raise LinkError(failure.kind, failure.detail or "it closed without an answer")
    return told[0]


def _not_asked(address: str, kind: FailureKind, detail: str) -> ProbeTold:
    return ProbeTold(address=address, failure=str(kind), detail=detail[:1000])
