"""The bodies of one request's legs, with what pairs the legs of an attempt."""

from random import Random

from pdcoord.protocol.plans import DialectName
from pdcoord.protocol.tickets import PAIRING_ID_BITS, ROOM_MAX, Pairing
from sidecar import dialects
from sidecar.vocabulary import SendDecode, SendPrefill


class Bodies:
    """Makes them.

    Args:
        raw: the request's own body.
        body: the same, read; None for a call that is not generative, which is never split.
        rng: draws SGLang's rooms and pdcoord's pairings.
        bootstrap_port, kv_port: of a prefill target that names none.
    """

    __slots__ = ("_body", "_bootstrap_port", "_dialect", "_kv_port", "_pairings", "_raw", "_rng", "_rooms")

    def __init__(
        self,
        raw: bytes,
        body: dialects.ClientBody | None,
        dialect: DialectName,
        rng: Random,
        *,
        bootstrap_port: int,
        kv_port: int,
    ) -> None:
        self._raw = raw
        self._body = body
        self._dialect = dialect
        self._rng = rng
        self._bootstrap_port = bootstrap_port
        self._kv_port = kv_port
        self._rooms: dict[int, int] = {}
        self._pairings: dict[int, Pairing] = {}

    def prefill(self, action: SendPrefill) -> bytes:
        body = self._body
        assert body is not None, "only a generative call is split"
        match self._dialect:
            case DialectName.NIXLV2:
                return dialects.nixlv2_prefill(body)
            case DialectName.PDCOORD:
                return dialects.pdcoord_prefill(body, self._pairing(action.attempt))
            case DialectName.SGLANG:
                room = self._room(action.attempt)
                return dialects.sglang_prefill(
                    body, action.target, bootstrap_port=self._bootstrap_port, room=room
                )

    def decode(self, action: SendDecode) -> bytes:
        body = self._body
        if body is None or (action.ticket is None and action.peer is None):
            return self._raw
        if action.ticket is not None:
            return dialects.nixlv2_decode(body, action.ticket)
        assert action.peer is not None
        if self._dialect is DialectName.PDCOORD:
            pairing = self._pairing(action.attempt)
            return dialects.pdcoord_decode(body, action.peer, pairing, kv_port=self._kv_port)
        room = self._room(action.attempt)
        return dialects.sglang_decode(body, action.peer, bootstrap_port=self._bootstrap_port, room=room)

    def _room(self, attempt: int) -> int:
        """One room for both legs of an attempt, another for each attempt."""
        if attempt not in self._rooms:
            self._rooms[attempt] = self._rng.randint(0, ROOM_MAX)
        return self._rooms[attempt]

    def _pairing(self, attempt: int) -> Pairing:
        """One transfer id and nonce for both legs of an attempt, others for each attempt."""
        if attempt not in self._pairings:
            draw = self._rng.getrandbits
            transfer, nonce = (f"{draw(PAIRING_ID_BITS):032x}" for _ in range(2))
            self._pairings[attempt] = Pairing(transfer, nonce)
        return self._pairings[attempt]
