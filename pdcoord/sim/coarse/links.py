"""The ways KV takes between coarse engines: NICs shared fairly by the transfers on them."""

from collections.abc import Callable, Sequence
from typing import Any

from pdcoord.sim.coarse.agenda import Agenda

RATE_CHANGE_MIN = 1e-9
"""A share that changed by less is the same: floats of equal splits differ in their last digits."""


class Transfer:
    """One transfer under way; `subject` is whoever waits for it."""

    __slots__ = ("at_s", "bytes_left", "bytes_per_s", "decode", "is_over", "prefill", "subject", "turn")

    def __init__(self, prefill: int, decode: int, byte_count: float, subject: Any) -> None:
        self.prefill = prefill
        self.decode = decode
        self.bytes_left = byte_count
        self.bytes_per_s = 0.0
        self.at_s = 0.0
        self.turn = 0
        self.is_over = False
        self.subject = subject


class Links:
    """As `pdcoord.sim.network.Nic` on both ends: each of n transfers on a NIC's direction gets an n-th of it.

    A transfer moves at the lesser of its two shares; what one leaves is not given to others.
    """

    def __init__(
        self, bytes_per_s: Sequence[float], agenda: Agenda, on_done: Callable[[Transfer], None]
    ) -> None:
        self._bytes_per_s = list(bytes_per_s)
        self._factors = [1.0] * len(self._bytes_per_s)
        self._agenda = agenda
        self._on_done = on_done
        self._leaving: list[dict[Transfer, None]] = [{} for _ in self._bytes_per_s]
        self._coming: list[dict[Transfer, None]] = [{} for _ in self._bytes_per_s]

    def begin(self, prefill: int, decode: int, byte_count: float, subject: Any) -> Transfer:
        transfer = Transfer(prefill, decode, byte_count, subject)
        transfer.at_s = self._agenda.now_s
        self._leaving[prefill][transfer] = None
        self._coming[decode][transfer] = None
        self._share(prefill, decode)
        return transfer

    def end(self, transfer: Transfer) -> None:
        """Take a transfer off, finished or not; one that is off already is passed over."""
        if transfer.is_over:
            return
        transfer.is_over = True
        del self._leaving[transfer.prefill][transfer]
        del self._coming[transfer.decode][transfer]
        self._share(transfer.prefill, transfer.decode)

    def touching(self, place: int) -> list[Transfer]:
        """Transfers from or to a place, in the order they began."""
        return list({**self._leaving[place], **self._coming[place]})

    def between(self, prefill: int, decode: int) -> list[Transfer]:
        return [one for one in self._leaving[prefill] if one.decode == decode]

    def slow(self, place: int, factor: float) -> None:
        """Both directions of a place's NIC run at this share of their speed; 1.0 heals it."""
        if factor <= 0.0:
            raise ValueError(f"factor is {factor}, expected more than 0")
        self._factors[place] = factor
        self._share(place, place)

    def _share(self, prefill: int, decode: int) -> None:
        """Give everyone on these two NICs their share, and say when they will be done."""
        for transfer in self._leaving[prefill]:
            self._set_rate(transfer)
        for transfer in self._coming[decode]:
            if transfer.prefill != prefill or prefill == decode:
                self._set_rate(transfer)

    def _set_rate(self, transfer: Transfer) -> None:
        prefill, decode = transfer.prefill, transfer.decode
        rate = min(
            self._bytes_per_s[prefill] * self._factors[prefill] / len(self._leaving[prefill]),
            self._bytes_per_s[decode] * self._factors[decode] / len(self._coming[decode]),
        )
        if abs(rate - transfer.bytes_per_s) <= RATE_CHANGE_MIN * rate:
            return
        now_s = self._agenda.now_s
        moved = (now_s - transfer.at_s) * transfer.bytes_per_s
        transfer.bytes_left = max(0.0, transfer.bytes_left - moved)
        transfer.at_s = now_s
        transfer.bytes_per_s = rate
        transfer.turn += 1
        self._agenda.at(now_s + transfer.bytes_left / rate, self._arrive, (transfer, transfer.turn))

    def _arrive(self, due: tuple[Transfer, int]) -> None:
        transfer, turn = due
        if transfer.turn == turn and not transfer.is_over:
            self.end(transfer)
            self._on_done(transfer)

    def validate(self) -> None:
        """Assert that both ends agree and that each transfer moves."""
        leaving = {one for nic in self._leaving for one in nic}
        coming = {one for nic in self._coming for one in nic}
        assert leaving == coming, "a transfer is on one NIC only"
        for place, nic in enumerate(self._leaving):
            assert all(one.prefill == place for one in nic), "a transfer leaves from elsewhere"
        for place, nic in enumerate(self._coming):
            assert all(one.decode == place for one in nic), "a transfer comes to elsewhere"
            share = self._bytes_per_s[place] * self._factors[place] / max(1, len(nic))
            for one in nic:
                assert not one.is_over, "a finished transfer is on a NIC"
                assert 0.0 < one.bytes_per_s <= share * (1 + 1e-6), "a transfer has more than its share"
