"""The endpoints file: endpoints with labels, written by whatever knows the fleet, picked by selectors."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from pdcoord.core.fleet import Endpoint, ModelName, PoolName
from pdcoord.policy.compile import PoolBinding
from pdcoord.policy.errors import PolicyError, Problem, quote
from pdcoord.policy.pools import make_endpoint
from pdcoord.policy.poolschema import (
    KV_EVENTS_PORT_MEANING,
    KV_EVENTS_REPLAY_PORT_MEANING,
    KV_PORT_MEANING,
    METRICS_PORT_MEANING,
)
from pdcoord.policy.values import Address, ApiVersion, EndpointName, Labels, Metadata, Port, Spec
from pdcoord.policy.yamltext import Document, parse_documents, read_bytes, validate
from pdcoord.protocol.headers import HostPort


class EndpointEntrySpec(Spec):
    """One endpoint and what is known of it."""

    address: Address = Field(description="host:port where requests go.")
    name: EndpointName | None = Field(
        default=None, description="Name in logs and metrics, unique in the file; the address if not set."
    )
    labels: Labels = Field(default_factory=dict, description="What selectors match, as on a Kubernetes pod.")
    bootstrap_port: Port | None = Field(
        default=None, description="SGLang's rendezvous port; 8998 on SGLang pools that prefill."
    )
    kv_port: Port | None = Field(default=None, description=KV_PORT_MEANING)
    metrics_port: Port | None = Field(default=None, description=METRICS_PORT_MEANING)
    kv_events_port: Port | None = Field(default=None, description=KV_EVENTS_PORT_MEANING)
    kv_events_replay_port: Port | None = Field(default=None, description=KV_EVENTS_REPLAY_PORT_MEANING)
    is_draining: bool = Field(
        default=False, description="Whether the endpoint gets no new work while what runs there finishes."
    )


class EndpointsSpec(Spec):
    """Endpoints for the pools that have a selector."""

    api_version: ApiVersion
    kind: Literal["Endpoints"] = Field(description="Always Endpoints.")
    metadata: Metadata | None = Field(default=None, description="What the document is called.")
    endpoints: tuple[EndpointEntrySpec, ...] = Field(
        max_length=16_384, description="The endpoints; none is allowed, and means that all are gone."
    )


@dataclass(frozen=True, slots=True)
class EndpointsDocument:
    """A sound endpoints file.

    Attributes:
        sources: each entry's document and index there, in the order of `entries`.
    """

    entries: tuple[EndpointEntrySpec, ...]
    sources: tuple[tuple[Document, int], ...]

    def problem(self, index: int, message: str) -> Problem:
        """A problem with one entry, on its line."""
        document, document_index = self.sources[index]
        return document.problem(("endpoints", document_index), message)


@dataclass(frozen=True, slots=True)
class MatchedEndpoint:
    """An endpoint of a pool, as listed or as picked."""

    endpoint: Endpoint
    is_draining: bool = False


def load_endpoints(path: Path) -> EndpointsDocument:
    """Read an endpoints file; several documents count as one list.

    Raises:
        PolicyError: with everything that is wrong; nothing of the file is used.
    """
    return parse_endpoints(read_bytes(path), str(path))


def parse_endpoints(raw: bytes, file: str) -> EndpointsDocument:
    """`load_endpoints` for bytes at hand; `file` is how problems name them."""
    entries: list[EndpointEntrySpec] = []
    sources: list[tuple[Document, int]] = []
    problems: list[Problem] = []
    for document in parse_documents(raw, file):
        try:
            listed = validate(document, EndpointsSpec).endpoints
        except PolicyError as error:
            problems += error.problems
            continue
        entries += listed
        sources += [(document, i) for i in range(len(listed))]
    found = EndpointsDocument(tuple(entries), tuple(sources))
    problems += _repeats(found)
    if problems:
        raise PolicyError(problems)
    return found


def _repeats(found: EndpointsDocument) -> Iterator[Problem]:
    """Addresses and names that a file has twice."""
    lines: dict[tuple[str, str], int] = {}
    for (document, i), entry in zip(found.sources, found.entries, strict=True):
        for key, text in (("address", entry.address), ("name", entry.name)):
            path = ("endpoints", i, key)
            if text is None:
                continue
            if (key, text) in lines:
                message = f"is {quote(text)}, which line {lines[key, text]} already has; change one"
                yield document.problem(path, message)
            lines.setdefault((key, text), document.position_of(path))


def static_endpoints(bindings: Iterable[PoolBinding]) -> tuple[MatchedEndpoint, ...]:
    """The endpoints that the policy itself lists."""
    return tuple(MatchedEndpoint(endpoint) for binding in bindings for endpoint in binding.endpoints)


def match_endpoints(
    bindings: Sequence[PoolBinding], document: EndpointsDocument
) -> tuple[MatchedEndpoint, ...]:
    """The entries that selectors pick, as endpoints of their pools; `static_endpoints` are apart.

    An entry that no selector picks is left out; one may serve several models, but one pool of each.

    Raises:
        PolicyError: if an entry would belong to two pools of one model.
    """
    matched: list[MatchedEndpoint] = []
    problems: list[Problem] = []
    listed = _listed_pools(bindings)
    for index, entry in enumerate(document.entries):
        pools_by_model: defaultdict[ModelName, list[PoolName]] = defaultdict(list)
        for binding in bindings:
            if _picks(binding, entry):
                pool = binding.pool
                endpoint = make_endpoint(
                    pool,
                    entry.address,
                    entry.name,
                    entry.bootstrap_port,
                    kv_port=entry.kv_port,
                    metrics_port=entry.metrics_port,
                    kv_events_port=entry.kv_events_port,
                    kv_events_replay_port=entry.kv_events_replay_port,
                )
                matched.append(MatchedEndpoint(endpoint, entry.is_draining))
                pools_by_model[pool.model].append(pool.name)
        for model, names in pools_by_model.items():
            pools = [*names, *listed.get((model, entry.address), ())]
            if len(pools) > 1:
                message = f"belongs to pools {' and '.join(pools)} of model {model}, expected one of them"
                problems.append(document.problem(index, message))
    if problems:
        raise PolicyError(problems)
    return tuple(matched)


def _listed_pools(bindings: Sequence[PoolBinding]) -> dict[tuple[ModelName, HostPort], list[PoolName]]:
    """Pools of a model that list an address in the policy itself."""
    pools: defaultdict[tuple[ModelName, HostPort], list[PoolName]] = defaultdict(list)
    for binding in bindings:
        for endpoint in binding.endpoints:
            pools[binding.pool.model, endpoint.address].append(binding.pool.name)
    return pools


def unmatched_entries(bindings: Sequence[PoolBinding], document: EndpointsDocument) -> tuple[Problem, ...]:
    """A warning for each entry that no selector picks: its labels may be mistyped."""
    return tuple(
        document.problem(index, "is picked by no pool's selector, so nothing is sent there")
        for index, entry in enumerate(document.entries)
        if not any(_picks(binding, entry) for binding in bindings)
    )


def _picks(binding: PoolBinding, entry: EndpointEntrySpec) -> bool:
    return binding.match_labels is not None and binding.match_labels.items() <= entry.labels.items()
