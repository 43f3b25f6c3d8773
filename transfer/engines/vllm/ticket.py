"""What travels between engines in a request's `kv_transfer_params`: nixlv2 names and one `pdcoord` key.

A prefill leg asks for a hand-over (`parse_ask`), its answer carries a ticket (`ticket`), the decode leg
brings the ticket back (`parse_ticket`). Sidecars that start both legs at once mint the transfer themselves:
then both legs carry `pdcoord` with the same transfer and nonce, and the answer's ticket is not waited for.
Source of the names beside ours: vLLM 0.32 NixlConnector, `request_finished` of its pull scheduler.
"""

import re
from dataclasses import dataclass
from typing import Any

from transfer.errors import TransferError
from transfer.session.vocabulary import TransferId

VERSION = 1
KEY = "pdcoord"
NONCE_BYTES = 16
ADDRESS_CHARACTERS_MAX = 260
EPOCH_CHARACTERS_MAX = 64

_HEX_32 = re.compile(r"[0-9a-f]{32}")
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_EPOCH = re.compile(r"[0-9A-Za-z._-]*")


class TicketError(TransferError):
    """A request's `kv_transfer_params` are not what they should be: serve it without a transfer.

    Attributes:
        field: the offending member; its value is not told, it may be a secret.
    """

    def __init__(self, field: str, expected: str) -> None:
        super().__init__(f"kv_transfer_params.{field} is malformed, expected {expected}")
        self.field = field


@dataclass(frozen=True, slots=True)
class Ask:
    """A prefill leg's wish that its KV be handed over.

    Attributes:
        transfer: None if this engine is to mint it, and the nonce.
    """

    transfer: TransferId | None
    nonce: bytes | None


@dataclass(frozen=True, slots=True)
class Ticket:
    """Where a decode leg's KV is.

    Attributes:
        address: side channel of the producer's rank 0, `host:port`.
        epoch: the producer's; empty where a sidecar minted the transfer.
        token_count: of the producer's prompt; None where a sidecar minted the transfer.
    """

    transfer: TransferId
    nonce: bytes
    address: str
    epoch: str = ""
    token_count: int | None = None


@dataclass(frozen=True, slots=True)
class Producer:
    """What every ticket says of the engine it is from."""

    engine_id: str
    address: str
    epoch: str
    tensor_parallel: int


def parse_ask(params: object) -> Ask | None:
    """Read a request's params as a prefill leg's; None if it asks for nothing.

    Raises:
        TicketError: if it asks, but malformed.
    """
    members = _asking(params, "do_remote_decode")
    if members is None:
        return None
    if KEY not in members:
        return Ask(None, None)
    ours = _ours(members)
    return Ask(_transfer(ours), _nonce(ours))


def parse_ticket(params: object) -> Ticket | None:
    """Read a request's params as a decode leg's; None if it brings no ticket.

    Raises:
        TicketError: if it does, but malformed, or of another connector.
    """
    members = _asking(params, "do_remote_prefill")
    if members is None:
        return None
    ours = _ours(members)
    return Ticket(
        transfer=_transfer(ours),
        nonce=_nonce(ours),
        address=_address(ours),
        epoch=_epoch(ours),
        token_count=_token_count(members),
    )


def ticket(
    producer: Producer, request: str, tables: tuple[list[int], ...], token_count: int, ask: Ask
) -> dict[str, Any]:
    """The `kv_transfer_params` of a prefill leg's answer; `ask` must be minted.

    Foreign routers pass it on verbatim. The block ids inform only: they never serve as addresses.
    """
    if ask.transfer is None or ask.nonce is None:
        raise ValueError("a ticket needs a transfer and a nonce")
    host, _, port = producer.address.rpartition(":")
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [list(table) for table in tables],
        "remote_engine_id": producer.engine_id,
        "remote_request_id": request,
        "remote_host": host.strip("[]"),
        "remote_port": int(port),
        "tp_size": producer.tensor_parallel,
        "dcp_size": 1,
        "pp_size": 1,
        "remote_num_tokens": token_count,
        "remote_blocks_expiry_time": None,
        "transfer_mode": "pull",
        KEY: {
            "version": VERSION,
            "transfer": ask.transfer,
            "nonce": ask.nonce.hex(),
            "epoch": producer.epoch,
            "address": producer.address,
        },
    }


def _asking(params: object, flag: str) -> dict[str, Any] | None:
    """The members of params that have a flag set; None for params that have not."""
    if params is None:
        return None
    if not isinstance(params, dict):
        raise TicketError(flag, "an object around it")
    value = params.get(flag)
    if value is None or value is False:
        return None
    if value is not True:
        raise TicketError(flag, "true or false")
    return params


def _ours(members: dict[str, Any]) -> dict[str, Any]:
    ours = members.get(KEY)
    if not isinstance(ours, dict):
        raise TicketError(KEY, "an object; without one the ticket is another connector's")
    version = ours.get("version")
    if isinstance(version, bool) or version != VERSION:
        raise TicketError(f"{KEY}.version", str(VERSION))
    return ours


def _transfer(ours: dict[str, Any]) -> TransferId:
    return TransferId(_hex_32(ours, "transfer"))


def _nonce(ours: dict[str, Any]) -> bytes:
    return bytes.fromhex(_hex_32(ours, "nonce"))


def _hex_32(ours: dict[str, Any], name: str) -> str:
    value = ours.get(name)
    if not isinstance(value, str) or not _HEX_32.fullmatch(value):
        raise TicketError(f"{KEY}.{name}", "32 lower-case hexadecimal digits")
    return value


def _address(ours: dict[str, Any]) -> str:
    value = ours.get("address")
    if isinstance(value, str) and len(value) <= ADDRESS_CHARACTERS_MAX:
        found = _ADDRESS.fullmatch(value)
        if found is not None and 0 < int(found[2]) < 1 << 16:
            return value
    raise TicketError(f"{KEY}.address", "host:port")


def _epoch(ours: dict[str, Any]) -> str:
    value = ours.get("epoch", "")
    if not isinstance(value, str) or len(value) > EPOCH_CHARACTERS_MAX or not _EPOCH.fullmatch(value):
        raise TicketError(f"{KEY}.epoch", f"at most {EPOCH_CHARACTERS_MAX} letters, digits, `.`, `_`, `-`")
    return value


def _token_count(members: dict[str, Any]) -> int | None:
    value = members.get("remote_num_tokens")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TicketError("remote_num_tokens", "a positive whole number")
    return value
