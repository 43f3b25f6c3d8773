"""A process with one backend and one region, told what to do by lines of JSON; no test by itself.

Each station is a process of its own because NIXL and ucxx bring a UCX each, of which a process takes one, and
because a peer must be there to be killed.
"""

import hashlib
import json
import sys
import time
from concurrent.futures import Future
from typing import Any

import numpy as np

from transfer.backends.base import Backend, Piece, Region
from transfer.errors import TransferError


def make_backend(kind: str) -> Backend:
    name, _, transports = kind.partition(":")
    if name == "nixl":
        from transfer.backends.nixl import NixlBackend, nixl_settings_from_mapping

        return NixlBackend(nixl_settings_from_mapping({"transports": transports} if transports else {}))
    if name == "ucx":
        from transfer.backends.ucx import UcxBackend, ucx_settings_from_mapping

        return UcxBackend(ucx_settings_from_mapping({"transports": transports} if transports else {}))
    from transfer.backends.tcp import TcpBackend

    return TcpBackend("127.0.0.1")


def pattern(length_bytes: int, seed: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    return np.random.default_rng(seed).integers(0, 256, length_bytes, dtype=np.uint8)


class Station:
    def __init__(self, kind: str, length_bytes: int, seed: int) -> None:
        self.memory = pattern(length_bytes, seed) if seed else np.zeros(length_bytes, np.uint8)
        self.backend = make_backend(kind)
        self.backend.start(Region(self.memory.ctypes.data, length_bytes))
        self.futures: dict[int, Future[Any]] = {}

    def do(self, order: dict[str, Any]) -> Any:  # noqa: PLR0911  # one for each order
        match order["do"]:
            case "metadata":
                return self.backend.metadata().hex()
            case "connect":
                self.backend.connect(order["peer"], bytes.fromhex(order["metadata"])).result(10)
            case "read":
                pieces = [Piece(*piece) for piece in order["pieces"]]
                number = len(self.futures)
                self.futures[number] = self.backend.read(order["peer"], pieces, timeout_s=order["timeout_s"])
                return number
            case "wait":
                report = self.futures[order["read"]].result(order["timeout_s"])
                return [report.read_bytes, report.descriptor_count, report.moved_s]
            case "is_done":
                return self.futures[order["read"]].done()
            case "forget":
                self.backend.forget(order["peer"]).result(10)
            case "digest":
                piece = self.memory[order["offset"] : order["offset"] + order["length_bytes"]]
                return hashlib.sha256(piece.tobytes()).hexdigest()
            case "zero":
                self.memory[:] = 0
            case "transport":
                return self.backend.transport(order["peer"])
            case "cpu":
                return time.process_time()
            case "close":
                begun_s = time.monotonic()
                self.backend.close()
                return time.monotonic() - begun_s
        return None


def main() -> None:
    station: Station | None = None
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any]
        try:
            if order["do"] == "start":
                station = Station(order["kind"], order["length_bytes"], order["seed"])
                answer = {"ok": None}
            else:
                assert station is not None
                answer = {"ok": station.do(order)}
        except (TransferError, TimeoutError) as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        # Libraries write to the standard output too: an answer has a mark of its own.
        sys.stdout.write(f"ANSWER {json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
