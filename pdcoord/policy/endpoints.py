"""The endpoints file: endpoints with labels, written by whatever knows the fleet, picked by selectors."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field

from pdcoord.core.fleet import Endpoint, ModelName, PoolName
from pdcoord.policy.compile import PoolBinding
from pdcoord.policy.errors import KeyPath, PolicyError, Problem, quote
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


class Origin(Protocol):
    """Where an entry was written: a document of a file, or an object of an API."""

    def problem(self, key_path: KeyPath, message: str) -> Problem:
        """A problem with what stands there, named so that it is found."""
        ...


@dataclass(frozen=True, slots=True)
class EndpointsDocument:
    """A sound endpoints file, or what something else says in place of one.

    Attributes:
        sources: each entry's origin and index there, in the order of `entries`.
    """

    entries: tuple[EndpointEntrySpec, ...]
    sources: tuple[tuple[Origin, int], ...]

    def problem(self, index: int, message: str) -> Problem:
        """A problem with one entry, at its place."""
        origin, origin_index = self.sources[index]
        return origin.problem(("endpoints", origin_index), message)


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
    problems += _repeats(entries, sources)
    if problems:
        raise PolicyError(problems)
    return EndpointsDocument(tuple(entries), tuple(sources))


def _repeats(
    entries: Sequence[EndpointEntrySpec], sources: Sequence[tuple[Document, int]]
) -> Iterator[Problem]:
    """Addresses and names that a file has twice."""
    places: dict[tuple[str, str], str] = {}
    for (document, i), entry in zip(sources, entries, strict=True):
        for key, text in (("address", entry.address), ("name", entry.name)):
            path = ("endpoints", i, key)
            if text is None:
                continue
            if (key, text) in places:
                message = f"is {quote(text)}, which {places[key, text]} already has; change one"
                yield document.problem(path, message)
            places.setdefault((key, text), document.place_of(path))


def static_endpoints(bindings: Iterable[PoolBinding]) -> tuple[MatchedEndpoint, ...]:
    """The endpoints that the policy itself lists."""
    return tuple(MatchedEndpoint(endpoint) for binding in bindings for endpoint in binding.endpoints)


@dataclass(frozen=True, slots=True)
class Matching:
    """What selectors pick of a document.

    Attributes:
        endpoints: the entries that are picked, as endpoints of their pools.
        problems: one for each entry that would belong to two pools of one model; it is in neither.
        unpicked: one for each entry that no selector picks: its labels may be mistyped.
    """

    endpoints: tuple[MatchedEndpoint, ...]
    problems: tuple[Problem, ...]
    unpicked: tuple[Problem, ...]


def match_endpoints(
    bindings: Sequence[PoolBinding], document: EndpointsDocument
) -> tuple[MatchedEndpoint, ...]:
    """`pick_endpoints` where one entry at fault refuses them all, as in a file.

    Raises:
        PolicyError: if an entry would belong to two pools of one model.
    """
    matching = pick_endpoints(bindings, document)
    if matching.problems:
        raise PolicyError(matching.problems)
    return matching.endpoints


def unmatched_entries(bindings: Sequence[PoolBinding], document: EndpointsDocument) -> tuple[Problem, ...]:
    """`Matching.unpicked` alone."""
    return pick_endpoints(bindings, document).unpicked


def pick_endpoints(bindings: Sequence[PoolBinding], document: EndpointsDocument) -> Matching:
    """Pick entries by the pools' selectors; `static_endpoints` are apart."""
    return EndpointPicker(bindings).pick(document)


@dataclass(frozen=True, slots=True)
class _Pick:
    """What became of one entry; `faults` are messages."""

    entry: EndpointEntrySpec
    endpoints: tuple[MatchedEndpoint, ...]
    faults: tuple[str, ...]


class EndpointPicker:
    """Picks entries by the selectors of one policy's pools.

    An entry may serve several models, but one pool of each. Entries that come again, as the same objects,
    are not judged anew: of thousands of pods few change at a time.
    """

    def __init__(self, bindings: Sequence[PoolBinding]) -> None:
        self._bindings = bindings
        self._listed = _listed_pools(bindings)
        self._picks: dict[int, _Pick] = {}

    def pick(self, document: EndpointsDocument) -> Matching:
        """What is picked of a document."""
        matched: list[MatchedEndpoint] = []
        problems: list[Problem] = []
        unpicked: list[Problem] = []
        picks: dict[int, _Pick] = {}
        for index, entry in enumerate(document.entries):
            pick = self._picks.get(id(entry))
            if pick is None or pick.entry is not entry:
                pick = self._judge(entry)
            picks[id(entry)] = pick
            problems += [document.problem(index, message) for message in pick.faults]
            if not pick.endpoints:
                message = "is picked by no pool's selector, so nothing is sent there"
                unpicked.append(document.problem(index, message))
            elif not pick.faults:
                matched += pick.endpoints
        self._picks = picks
        return Matching(tuple(matched), tuple(problems), tuple(unpicked))

    def _judge(self, entry: EndpointEntrySpec) -> _Pick:
        picked: list[MatchedEndpoint] = []
        faults: list[str] = []
        pools_by_model: defaultdict[ModelName, list[PoolName]] = defaultdict(list)
        for binding in self._bindings:
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
                picked.append(MatchedEndpoint(endpoint, entry.is_draining))
                pools_by_model[pool.model].append(pool.name)
        for model, names in pools_by_model.items():
            pools = [*names, *self._listed.get((model, entry.address), ())]
            if len(pools) > 1:
                faults.append(
                    f"belongs to pools {' and '.join(pools)} of model {model}, expected one of them"
                )
        return _Pick(entry, tuple(picked), tuple(faults))


def _listed_pools(bindings: Sequence[PoolBinding]) -> dict[tuple[ModelName, HostPort], list[PoolName]]:
    """Pools of a model that list an address in the policy itself."""
    pools: defaultdict[tuple[ModelName, HostPort], list[PoolName]] = defaultdict(list)
    for binding in bindings:
        for endpoint in binding.endpoints:
            pools[binding.pool.model, endpoint.address].append(binding.pool.name)
    return pools


def _picks(binding: PoolBinding, entry: EndpointEntrySpec) -> bool:
    return binding.match_labels is not None and binding.match_labels.items() <= entry.labels.items()
