"""What must hold between the parts of a policy, within one document and over all of a file."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

from pdcoord.core.fleet import EngineKind, Pool, Role
from pdcoord.core.model import PrefixMode, SplitMode
from pdcoord.policy.errors import KeyPath, Problem, quote
from pdcoord.policy.fallbackschema import FallbackSpec
from pdcoord.policy.poolschema import PoolSpec
from pdcoord.policy.schema import DisaggregationSpec, ModelSpec
from pdcoord.policy.yamltext import Document
from transfer.verdict import verdict

Fault = tuple[KeyPath, str]
Use = tuple[str, str, Document, KeyPath]
"""A name in use: what sort of name, the name, and where."""


@dataclass(frozen=True, slots=True)
class PoolPart:
    """A pool that is sound by itself, with its place in the document."""

    index: int
    spec: PoolSpec
    pool: Pool

    def path(self, *beneath: str | int) -> KeyPath:
        return ("pools", self.index, *beneath)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a document that are sound by themselves; the others have problems of their own.

    Attributes:
        is_complete: whether every pool of the document is among `pools`.
    """

    document: Document
    metadata_name: str | None
    model: ModelSpec | None
    pools: tuple[PoolPart, ...]
    is_complete: bool
    disaggregation: DisaggregationSpec | None
    fallback: FallbackSpec | None = None

    @property
    def mode(self) -> SplitMode | None:
        return None if self.disaggregation is None else self.disaggregation.mode

    @property
    def prefills(self) -> list[PoolPart]:
        return [part for part in self.pools if part.pool.can_prefill]

    @property
    def decodes(self) -> list[PoolPart]:
        return [part for part in self.pools if part.pool.can_decode]

    def impossible_reasons(self, prefill: PoolPart) -> list[str]:
        """Why each decode pool cannot take this pool's KV; empty as soon as one can."""
        verdicts = [(decode, verdict(prefill.pool.side, decode.pool.side)) for decode in self.decodes]
        if any(found.is_possible for _, found in verdicts):
            return []
        return [f"{prefill.pool.name} -> {decode.pool.name}: {found.reason}" for decode, found in verdicts]


def problems_of(all_parts: Iterable[Parts]) -> Iterator[Problem]:
    """Everything wrong between the parts of the documents of one file."""
    all_parts = list(all_parts)
    yield from _repeats(use for parts in all_parts for use in names_of(parts))
    for parts in all_parts:
        faults = [*_adapter_faults(parts), *_selector_faults(parts), *_speed_faults(parts)]
        faults += _replay_faults(parts)
        if parts.is_complete:
            faults += [*_serving_faults(parts), *_always_faults(parts), *_precise_faults(parts)]
        yield from (parts.document.problem(path, message) for path, message in faults)
        yield from _repeats(_endpoint_uses(parts))


def _repeats(uses: Iterable[Use]) -> Iterator[Problem]:
    """A problem for every name that is used again."""
    first_uses: dict[tuple[str, str], Use] = {}
    for use in uses:
        sort, name, document, path = use
        first = first_uses.setdefault((sort, name), use)
        if first is not use:
            yield document.problem(path, repeat_message(use, first))


def repeat_message(use: Use, first: Use) -> str:
    """What is wrong with a name that is in use already, in a text or in another object."""
    sort, name, _, _ = use
    holder = first[2].place_of(first[3])
    return f"is {quote(name)}, {sort} that {holder} already has; change one"


def names_of(parts: Parts) -> Iterator[Use]:
    """Names that are unique over all documents."""
    if parts.metadata_name is not None:
        yield "a document name", parts.metadata_name, parts.document, ("metadata", "name")
    if parts.model is not None:
        names: list[tuple[str, KeyPath]] = [(parts.model.name, ("model", "name"))]
        names += [(alias, ("model", "aliases", i)) for i, alias in enumerate(parts.model.aliases)]
        names += [(adapter, ("model", "adapters", i)) for i, adapter in enumerate(parts.model.adapters)]
        for name, path in names:
            yield "a name of a model", name, parts.document, path
    for part in parts.pools:
        # An endpoint's id is pool/name, with no room for the model.
        yield "a pool name", part.spec.name, parts.document, part.path("name")


def _adapter_faults(parts: Parts) -> Iterator[Fault]:
    """Adapters under names by which SGLang does not choose one.

    SGLang's OpenAI server (serving_base.py, `_parse_model_parameter`: read, not run) takes an adapter from
    `model` only as what follows a colon; by a name without one its base model answers, and nothing tells.
    """
    pool = next((part.spec.name for part in parts.pools if part.pool.engine is EngineKind.SGLANG), None)
    if parts.model is None or pool is None:
        return
    start = f"{parts.model.name}:"
    for i, adapter in enumerate(parts.model.adapters):
        if not adapter.startswith(start) or adapter == start:
            message = (
                f'is {quote(adapter)}; name it "{start}<name>": so SGLang (pool {pool}) knows an adapter, '
                "and without the colon answers as its base model; vLLM takes such a name as well "
                "in --lora-modules"
            )
            yield ("model", "adapters", i), message


def _endpoint_uses(parts: Parts) -> Iterator[Use]:
    """Addresses, unique in the document, and endpoint names, unique in their pool."""
    for part in parts.pools:
        for i, endpoint in enumerate(part.spec.endpoints or ()):
            yield "an address", endpoint.address, parts.document, part.path("endpoints", i, "address")
            if endpoint.name is not None:
                sort = f"an endpoint name of pool {part.spec.name}"
                yield sort, endpoint.name, parts.document, part.path("endpoints", i, "name")


def _selector_faults(parts: Parts) -> Iterator[Fault]:
    """Two selectors of which one picks everything that the other picks."""
    selecting = [(part, part.spec.selector) for part in parts.pools if part.spec.selector is not None]
    for (first, wide), (second, narrow) in combinations(selecting, 2):
        labels, others = wide.match_labels.items(), narrow.match_labels.items()
        if labels <= others or others <= labels:
            message = f"overlaps the selector of pool {first.spec.name}; an endpoint belongs to one pool"
            yield second.path("selector", "match_labels"), message


def _speed_faults(parts: Parts) -> Iterator[Fault]:
    """Figures that predictions for the pool would miss: work that costs nothing always wins."""
    for part in parts.pools:
        speed = part.pool.speed
        prefill = (speed.prefill_base_s, speed.prefill_s_per_token, speed.prefill_s_per_token_squared)
        step = (speed.step_base_s, speed.step_s_per_sequence, speed.step_s_per_context_token)
        if (part.pool.can_prefill or part.pool.can_serve_alone) and not any(prefill):
            why = "prefills" if part.pool.can_prefill else "prefills the requests that stay together"
            message = f"has no prefill figure above 0, and the pool {why}; set prefill_ms_per_token"
            yield part.path("speed"), message
        if part.pool.can_decode and not any(step):
            yield part.path("speed"), "has no step figure above 0, and the pool decodes; set step_base_ms"


def _replay_faults(parts: Parts) -> Iterator[Fault]:
    """A replay of events that nobody follows."""
    for part in parts.pools:
        for i, endpoint in enumerate(part.spec.endpoints or ()):
            if endpoint.kv_events_replay_port is not None and endpoint.kv_events_port is None:
                message = f"is {endpoint.kv_events_replay_port} without kv_events_port; set both"
                yield part.path("endpoints", i, "kv_events_replay_port"), message


def _precise_faults(parts: Parts) -> Iterator[Fault]:
    """Precise prefixes of engines none of which tells any; an endpoints file may bring ports later."""
    if parts.model is None or parts.model.prefix.mode is not PrefixMode.PRECISE:
        return
    listed = [part.spec.endpoints for part in parts.pools]
    if all(
        endpoints is not None and all(endpoint.kv_events_port is None for endpoint in endpoints)
        for endpoints in listed
    ):
        message = (
            "is precise, but no endpoint has a kv_events_port; set it where the engines publish KV events, "
            "or set mode to approximate"
        )
        yield ("model", "prefix", "mode"), message


def _serving_faults(parts: Parts) -> Iterator[Fault]:
    """A model that no request could be served from."""
    if not parts.decodes:
        yield ("pools",), "no pool decodes; give one of them role decode or both"
        return
    if any(part.pool.can_serve_alone for part in parts.pools):
        return
    if parts.mode is SplitMode.NEVER:
        yield (
            ("disaggregation", "mode"),
            "is never, but no pool can serve a request alone; add one with role both",
        )
    elif parts.mode is SplitMode.AUTO and all(parts.impossible_reasons(part) for part in parts.prefills):
        reasons = "; ".join(reason for part in parts.prefills for reason in parts.impossible_reasons(part))
        why = reasons or "no pool prefills"
        yield ("pools",), f"no pool can serve a request alone, and no two can together: {why}"


def _always_faults(parts: Parts) -> Iterator[Fault]:
    """Mode always where nothing, or not a whole prefill pool, can be split."""
    if parts.mode is not SplitMode.ALWAYS or not parts.decodes:
        return
    prefill_only = [part for part in parts.prefills if part.pool.role is Role.PREFILL]
    for part in prefill_only:
        if reasons := parts.impossible_reasons(part):
            why = "; ".join(reasons)
            yield part.path(), f"mode is always, but pool {part.spec.name} can feed no decode pool: {why}"
    if not parts.prefills:
        yield ("disaggregation", "mode"), "is always, but no pool prefills; give one role prefill or both"
    elif not prefill_only and all(parts.impossible_reasons(part) for part in parts.prefills):
        why = "; ".join(reason for part in parts.prefills for reason in parts.impossible_reasons(part))
        yield ("disaggregation", "mode"), f"is always, but no pool can feed another: {why}"
