"""Names of the headers that travel between client, gateway, sidecar and engine.

Names outside `x-pdcoord-` are llm-d's wire contract (llm-d-router ebab6879) or the Gateway API
inference extension's (endpoint-picker protocol 1.0.0). All names are lower case, as ASGI gives them.
"""

import re
from typing import NewType

HostPort = NewType("HostPort", str)
"""`host:port`; an IPv6 host stands in brackets."""

REQUEST_ID = b"x-request-id"
PREFILLER_HOST_PORT = b"x-prefiller-host-port"
ENCODER_HOSTS_PORTS = b"x-encoder-hosts-ports"
DATA_PARALLEL_HOST_PORT = b"x-data-parallel-host-port"
KV_CACHE_SOURCE_HOST_PORT = b"x-kv-cache-source-host-port"
DESTINATION_ENDPOINT = b"x-gateway-destination-endpoint"

FAIRNESS_ID = (b"x-llm-d-inference-fairness-id", b"x-gateway-inference-fairness-id")
"""Client to gateway: whose call it is. Of each of these pairs the second is the older name."""
OBJECTIVE = (b"x-llm-d-inference-objective", b"x-gateway-inference-objective")
"""Client to gateway: name of an objective, which the policy maps to a priority."""
SLO_TTFT_MS = (b"x-llm-d-slo-ttft-ms", b"x-slo-ttft-ms")
SLO_TPOT_MS = (b"x-llm-d-slo-tpot-ms", b"x-slo-tpot-ms")
"""Client to gateway: the call's own objectives, in milliseconds."""
NAME_BYTES_MAX = 128
SLO_MS_MAX = 3_600_000.0

PLAN = b"x-pdcoord-plan"
"""Gateway to sidecar: `plans.PlanHeader` as JSON."""
SERVED = b"x-pdcoord-served"
"""Sidecar to gateway, on the response: `plans.ServedHeader` as JSON."""
DECISION = b"x-pdcoord-decision"
"""Gateway to client: how the request is served (split or colocated) and why, as `mode; reason`."""
REASON = b"x-pdcoord-reason"
"""Gateway and sidecar to caller, on a refusal: a value of `errors.RefuseReason`."""
CACHE_SALT_FIELD = "cache_salt"

REQUEST_ID_BYTES_MAX = 128
_VISIBLE_BYTES = frozenset(range(0x21, 0x7F))


def is_request_id(value: bytes) -> bool:
    """Whether a client's x-request-id is taken over: visible ASCII, 1..128 bytes."""
    return 0 < len(value) <= REQUEST_ID_BYTES_MAX and _VISIBLE_BYTES.issuperset(value)


def is_name(value: bytes) -> bool:
    """Whether a tenant's or an objective's name is taken: visible ASCII, 1..128 bytes."""
    return 0 < len(value) <= NAME_BYTES_MAX and _VISIBLE_BYTES.issuperset(value)


PREFIX = b"x-pdcoord-"

ROUTING_FROM_OUTSIDE = frozenset(
    {
        PREFILLER_HOST_PORT,
        ENCODER_HOSTS_PORTS,
        DATA_PARALLEL_HOST_PORT,
        KV_CACHE_SOURCE_HOST_PORT,
        DESTINATION_ENDPOINT,
        b"x-data-parallel-rank",
        b"x-vllm-priority",
    }
)
"""Headers that choose where or when a request is served: the gateway strips them from clients. The last two
are vLLM 0.32's own."""
_BOOTSTRAP_PREFIX = b"x-override-bootstrap-"
"""SGLang 0.5.23 also takes its rendezvous from headers."""
_STEERING_PREFIXES = (PREFIX, b"x-prefiller-", _BOOTSTRAP_PREFIX)

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


# Characters of names, IPv4 and IPv6 addresses (with a zone) and no others: what passes here goes into
# headers, request targets and comma lists.
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]+")
_HOST_V6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9._-]+)?")


def is_routing(name: bytes) -> bool:
    """Whether a header name could steer routing and must not come from a client.

    An underscore counts as a hyphen: some servers and proxies take one for the other.
    """
    spelled = name.lower().replace(b"_", b"-")
    return spelled.startswith(_STEERING_PREFIXES) or spelled in ROUTING_FROM_OUTSIDE


def parse_host_port(text: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port`.

    Raises:
        ValueError: naming the text, if the host is none or has a character that no host has, an IPv6
            host stands without brackets, or the port is not in 1..65535.
    """
    host, _, port = text.strip().rpartition(":")
    pattern = _HOST_NAME
    if host.startswith("[") and host.endswith("]"):
        host, pattern = host[1:-1], _HOST_V6
    is_number = port.isascii() and port.isdigit() and len(port) <= 5
    if not is_number or not 0 < int(port) <= 65_535:
        raise ValueError(f"{text!r} is not host:port with a port in 1..65535")
    if not pattern.fullmatch(host):
        raise ValueError(f"{text!r} is not host:port: {host!r} is not a host's name or address")
    return host, int(port)


def format_host_port(host: str, port: int) -> HostPort:
    return HostPort(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
