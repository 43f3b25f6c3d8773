"""Names of the headers that travel between client, gateway, sidecar and engine.

Names outside `x-pdcoord-` are llm-d's wire contract (llm-d-router ebab6879) or the Gateway API
inference extension's (endpoint-picker protocol 1.0.0). All names are lower case, as ASGI gives them.
"""

from typing import NewType

HostPort = NewType("HostPort", str)
"""`host:port`; an IPv6 host stands in brackets."""

REQUEST_ID = b"x-request-id"
PREFILLER_HOST_PORT = b"x-prefiller-host-port"
ENCODER_HOSTS_PORTS = b"x-encoder-hosts-ports"
DATA_PARALLEL_HOST_PORT = b"x-data-parallel-host-port"
KV_CACHE_SOURCE_HOST_PORT = b"x-kv-cache-source-host-port"
DESTINATION_ENDPOINT = b"x-gateway-destination-endpoint"

PLAN = b"x-pdcoord-plan"
"""Gateway to sidecar: `plans.PlanHeader` as JSON."""
SERVED = b"x-pdcoord-served"
"""Sidecar to gateway, on the response: `plans.ServedHeader` as JSON."""
DECISION = b"x-pdcoord-decision"
"""Gateway to client: how the request is served (split or colocated) and why, as `mode; reason`."""
REASON = b"x-pdcoord-reason"
"""Gateway and sidecar to caller, on a refusal: a value of `errors.RefuseReason`."""
CACHE_SALT_FIELD = "cache_salt"

PREFIX = b"x-pdcoord-"

ROUTING_FROM_OUTSIDE = frozenset(
    {
        PREFILLER_HOST_PORT,
        ENCODER_HOSTS_PORTS,
        DATA_PARALLEL_HOST_PORT,
        KV_CACHE_SOURCE_HOST_PORT,
        DESTINATION_ENDPOINT,
    }
)
"""Headers that choose where a request goes: the gateway strips them from clients."""

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""RFC 9110 section 7.6.1: never forwarded."""


def is_routing(name: bytes) -> bool:
    """Whether a (lower-case) header name could steer routing and must not come from a client."""
    return name in ROUTING_FROM_OUTSIDE or name.startswith(PREFIX)


def parse_host_port(text: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port`.

    Raises:
        ValueError: naming the text, if the host is empty or the port is not in 1..65535.
    """
    host, separator, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        separator = ""  # A bare IPv6 address: which colon ends the host cannot be told.
    is_number = port.isascii() and port.isdigit() and len(port) <= 5
    if not separator or not host or not is_number or not 0 < int(port) <= 65_535:
        raise ValueError(f"{text!r} is not host:port with a port in 1..65535")
    if any(c in host for c in "/@?#[] \t\r\n"):
        raise ValueError(f"{text!r} is not host:port: the host has a character that no host has")
    return host, int(port)


def format_host_port(host: str, port: int) -> HostPort:
    return HostPort(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
