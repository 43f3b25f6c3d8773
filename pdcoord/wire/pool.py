"""Which idle connections are kept, how many and how long; decides only, does no I/O."""

from typing import Generic, Protocol, TypeVar

from pdcoord.protocol.headers import HostPort


class Pooled(Protocol):
    """What the pool needs to know of a connection."""

    @property
    def address(self) -> HostPort: ...


C = TypeVar("C", bound=Pooled)


class IdlePool(Generic[C]):
    """Idle connections by origin, the last used first; bounded per origin, in all, and in time.

    Every method that drops connections returns them, for the caller to close.
    """

    def __init__(self, *, idle_s_max: float, per_origin_max: int, total_max: int) -> None:
        self._idle_s_max = idle_s_max
        self._per_origin_max = per_origin_max
        self._total_max = total_max
        # Both in the order of put: since all stay equally long, the first is the next to expire and
        # the one unused for longest. The values are when each expires.
        self._all: dict[C, float] = {}
        self._by_origin: dict[HostPort, dict[C, None]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def put(self, connection: C, now_s: float) -> list[C]:
        """Keep a connection; returns those that no longer fit, perhaps itself."""
        self._all[connection] = now_s + self._idle_s_max
        siblings = self._by_origin.setdefault(connection.address, {})
        siblings[connection] = None
        dropped = []
        if len(siblings) > self._per_origin_max:
            dropped.append(next(iter(siblings)))
        elif len(self._all) > self._total_max:
            dropped.append(next(iter(self._all)))
        for each in dropped:
            self.remove(each)
        return dropped

    def take(self, address: HostPort, now_s: float) -> C | None:
        """The connection to this origin that was used last and has not expired."""
        siblings = self._by_origin.get(address)
        if siblings is None:
            return None
        connection = next(reversed(siblings))
        if self._all[connection] <= now_s:
            return None  # So have all the others; `expire` will drop them.
        self.remove(connection)
        return connection

    def remove(self, connection: C) -> None:
        """Forget a connection; nothing happens if it is not here."""
        if self._all.pop(connection, None) is None:
            return
        siblings = self._by_origin[connection.address]
        del siblings[connection]
        if not siblings:
            del self._by_origin[connection.address]

    def expire(self, now_s: float) -> list[C]:
        """Drop and return all that have been idle for too long."""
        expired = []
        for connection, expires_s in self._all.items():
            if expires_s > now_s:
                break
            expired.append(connection)
        for connection in expired:
            self.remove(connection)
        return expired

    def next_expiry_s(self) -> float | None:
        """When `expire` will next have something to do."""
        return next(iter(self._all.values()), None)
