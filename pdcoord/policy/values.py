"""The values that several kinds of file are made of: names, addresses, labels and numbers with their unit."""

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pdcoord.policy.errors import quote
from pdcoord.policy.expect import EXPECTED
from pdcoord.protocol.headers import HostPort, format_host_port, parse_host_port

# RFC 1123 section 2.1, with the underscore that container networks put into host names.
_HOST = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9_-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9_-]*[a-z0-9])?)*\.?")


class Spec(BaseModel):
    """Base of everything that people write: closed, immutable, and strict about types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True
    )


def _canonical_address(text: str) -> str:
    """Write one address in one way, so that equal ones are seen to be equal."""
    try:
        host, port = parse_host_port(text)
        host = _canonical_host(host.lower())
    except ValueError:
        expected = "host:port such as 10.0.0.1:8000, or [2001:db8::1]:8000"
        raise ValueError(f"is {quote(text)}, expected {expected}") from None
    return format_host_port(host, port)


def _canonical_host(host: str) -> str:
    if ":" in host and "%" not in host:  # A zone id means something on one machine only.
        return ipaddress.IPv6Address(host).compressed
    if host.replace(".", "").isdigit():
        return str(ipaddress.IPv4Address(host))
    if _HOST.fullmatch(host) is None:
        raise ValueError(host)
    return host


Address = Annotated[
    HostPort,
    AfterValidator(_canonical_address),
    Field(
        max_length=300,
        json_schema_extra={
            EXPECTED: "host:port",
            "examples": ["10.0.0.1:8000"],
            # For other checkers; the rule here is `_canonical_address`.
            "pattern": r"^\s*[!-~]+:[0-9]{1,5}\s*$",
        },
    ),
]

Name = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        max_length=63,
        json_schema_extra={
            EXPECTED: "up to 63 lower-case letters, digits and dashes, with no dash at either end"
        },
    ),
]

EndpointName = Annotated[
    str,
    Field(
        # No colon, so that no name is the address that another endpoint has for a name.
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=253,
        json_schema_extra={EXPECTED: "up to 253 letters, digits and any of . _ - in one word"},
    ),
]

ServedName = Annotated[
    str,
    Field(
        pattern=r"^[!-~]+$",
        max_length=256,
        json_schema_extra={EXPECTED: "up to 256 printable ASCII characters without a space"},
    ),
]

# Kubernetes label syntax, so that what selects pods there selects entries here.
LabelKey = Annotated[
    str,
    Field(
        pattern=r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$",
        max_length=317,
        json_schema_extra={EXPECTED: "a label key such as role or llm-d.ai/role"},
    ),
]
LabelValue = Annotated[
    str,
    Field(
        pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?$",
        max_length=63,
        json_schema_extra={
            EXPECTED: "up to 63 letters, digits and any of . _ -, in quotes if it is a number"
        },
    ),
]
Labels = Annotated[
    dict[LabelKey, LabelValue], Field(max_length=64, json_schema_extra={"additionalProperties": False})
]

Port = Annotated[int, Field(ge=1, le=65_535)]

Milliseconds = Annotated[float, Field(ge=0, le=3_600_000)]
DeadlineMs = Annotated[float, Field(ge=1, le=3_600_000)]
GbitPerS = Annotated[float, Field(gt=0, le=100_000)]
Share = Annotated[float, Field(ge=0, le=1)]

ApiVersion = Annotated[
    Literal["pdcoord.io/v1alpha1"], Field(alias="apiVersion", description="Version of this format.")
]


class Metadata(Spec):
    """What the document is called."""

    name: Name = Field(description="Name of this document, for people; unique in the file.")
