"""Timed requests to one server: when the first token came, when the next ones did."""

import http.client
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REQUEST_S_MAX = 120.0


@dataclass(frozen=True, slots=True)
class Timed:
    """One streamed answer.

    Attributes:
        first_s: from sending to the first token.
        step_s: between the first and the second token.
        served: the sidecar's own account, if it gave one.
    """

    first_s: float
    step_s: float
    served: dict[str, Any]


class RequestError(Exception):
    """A server did not answer as it should; the message has its own words."""


def stream(address: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> Timed:
    """Send a completion and time its first two tokens.

    Raises:
        RequestError: if the answer is not a stream of two tokens at least.
    """
    connection = http.client.HTTPConnection(address, timeout=REQUEST_S_MAX)
    try:
        began_s = time.perf_counter()
        raw = json.dumps({**body, "stream": True})
        connection.request(
            "POST", "/v1/completions", raw, {"content-type": "application/json"} | dict(headers)
        )
        response = connection.getresponse()
        if response.status != 200:
            raise RequestError(f"{address}: {response.status} {response.read(500)!r}")
        times: list[float] = []
        while len(times) < 2 and (line := response.readline()):
            if line.startswith(b"data: {") and json.loads(line[6:]).get("choices"):
                times.append(time.perf_counter())
        response.read()
        if len(times) < 2:
            raise RequestError(f"{address}: the stream ended after {len(times)} tokens")
        served = response.getheader("x-pdcoord-served")
        return Timed(times[0] - began_s, times[1] - times[0], json.loads(served) if served else {})
    finally:
        connection.close()


def prefill_s(address: str, body: Mapping[str, Any]) -> float:
    """How long an engine takes for one token in one piece, which is a prefill and its HTTP."""
    connection = http.client.HTTPConnection(address, timeout=REQUEST_S_MAX)
    try:
        began_s = time.perf_counter()
        raw = json.dumps({**body, "max_tokens": 1})
        connection.request("POST", "/v1/completions", raw, {"content-type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RequestError(f"{address}: {response.status} {answer[:500]!r}")
        return time.perf_counter() - began_s
    finally:
        connection.close()


def metric(address: str, name: str) -> float:
    """The sum of a metric's samples.

    Raises:
        RequestError: if there is none.
    """
    connection = http.client.HTTPConnection(address, timeout=REQUEST_S_MAX)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    found = [
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith((f"{name}{{", f"{name} "))
    ]
    if not found:
        raise RequestError(f"{address}: no metric {name}")
    return sum(found)


def answers(address: str, path: str) -> bool:
    connection = http.client.HTTPConnection(address, timeout=2.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
