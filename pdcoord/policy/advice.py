"""What is allowed in a policy but may not be what its writer meant."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from pdcoord.core.fleet import EngineKind, Role
from pdcoord.core.model import PrefixMode, SplitMode
from pdcoord.policy.checks import Fault, Parts
from pdcoord.policy.errors import Problem, quote
from pdcoord.protocol.plans import RungKind
from transfer.verdict import verdict


def warnings_of(all_parts: Iterable[Parts]) -> Iterator[Problem]:
    """Warnings about complete documents, in the order of the file."""
    addresses: dict[str, str] = {}
    for parts in all_parts:
        faults = [*_unused(parts), *_alone(parts), *_prefixes(parts), *_rungs(parts)]
        if parts.mode is not SplitMode.NEVER:
            faults += [*_links(parts), *_kv_sizes(parts)]
        yield from (parts.document.problem(path, message) for path, message in faults)
        yield from _shared_addresses(parts, addresses)


def _unused(parts: Parts) -> Iterator[Fault]:
    """Prefill pools that no request can reach."""
    for part in parts.pools:
        if part.pool.role is not Role.PREFILL:
            continue
        if parts.mode is SplitMode.NEVER:
            yield part.path(), f"pool {part.spec.name} gets no work: disaggregation.mode is never"
        elif reasons := parts.impossible_reasons(part):
            yield part.path(), f"pool {part.spec.name} gets no work: {'; '.join(reasons)}"


def _alone(parts: Parts) -> Iterator[Fault]:
    if not any(part.pool.can_serve_alone for part in parts.pools):
        message = (
            "no pool can serve a request alone, so requests that cannot be split (n > 1, embeddings) "
            "are refused; add a pool with role both"
        )
        yield ("pools",), message


def _prefixes(parts: Parts) -> Iterator[Fault]:
    """Precise prefixes that stay approximate for some pools or calls, and what approximate ones ignore."""
    if parts.model is None:
        return
    prefix, tokenizer = parts.model.prefix, parts.model.tokenizer
    if prefix.mode is not PrefixMode.PRECISE:
        if tokenizer is not None:
            yield ("model", "tokenizer"), "is not used: model.prefix.mode is approximate; set it to precise"
        return
    for part in parts.pools:
        endpoints = part.spec.endpoints or ()
        silent = sum(endpoint.kv_events_port is None for endpoint in endpoints)
        if silent:
            message = (
                f"{silent} of {len(endpoints)} have no kv_events_port, so their prefixes are approximate"
            )
            yield part.path("endpoints"), message
    is_asked = any(part.pool.engine is EngineKind.VLLM for part in parts.pools)
    if not is_asked and (tokenizer is None or tokenizer.render is None):
        message = (
            "is precise, but nobody can tell the tokens of chats: no pool is of vLLM, and "
            "model.tokenizer.render is not set; their prefixes are approximate"
        )
        yield ("model", "prefix", "mode"), message
    nameless = sum(part.pool.engine is EngineKind.SGLANG for part in parts.pools)
    if parts.model.adapters and nameless:
        message = (
            f"is precise, but KV events of SGLang name no adapter: what {nameless} of the pools have of an "
            "adapter's prefixes counts as the model's own; set it to approximate"
        )
        yield ("model", "prefix", "mode"), message
    file = tokenizer.file if tokenizer is not None else None
    if file is not None and not Path(file).is_file():
        yield (
            ("model", "tokenizer", "file"),
            f"is {quote(file)}, which is no file here, so prompts are asked of the engines",
        )


def _rungs(parts: Parts) -> Iterator[Fault]:
    """Figures for a rung that the ladder does not have, and a rung that none may take."""
    spec = parts.fallback
    if spec is None:
        return
    told = spec.model_fields_set
    if "resume" in told and RungKind.RESUME not in spec.ladder:
        yield ("fallback", "resume"), "is not used: fallback.ladder has no resume; add it there"
    if "hedge" in told and spec.hedge.share_max > 0.0 and RungKind.OTHER_DECODE not in spec.ladder:
        yield ("fallback", "hedge"), "is not used: fallback.ladder has no other-decode; add it there"
    for name, rung in (
        ("other_decode_max", RungKind.OTHER_DECODE),
        ("other_prefill_max", RungKind.OTHER_PREFILL),
    ):
        if name in told and getattr(spec, name) == 0 and "ladder" in told and rung in spec.ladder:
            yield ("fallback", name), f"is 0, so the rung {rung} in fallback.ladder is never taken"


def _links(parts: Parts) -> Iterator[Fault]:
    """Pools that could be paired but for their link."""
    if parts.disaggregation is None:
        return
    minimum = parts.disaggregation.bandwidth_gbit_per_s_min
    paired = set()
    for prefill in parts.prefills:
        for decode in parts.decodes:
            if verdict(prefill.pool.side, decode.pool.side).is_possible and prefill is not decode:
                paired |= {prefill.index, decode.index}
    for part in parts.pools:
        link = part.spec.link_gbit_per_s
        if part.index in paired and link is None:
            yield part.path(), f"pool {part.spec.name} has no link_gbit_per_s, so nothing is split with it"
        elif part.index in paired and link is not None and link < minimum:
            message = f"is {link:g}, below bandwidth_gbit_per_s_min ({minimum:g}), so nothing is split here"
            yield part.path("link_gbit_per_s"), message


def _kv_sizes(parts: Parts) -> Iterator[Fault]:
    """Pools of one dtype whose KV of one token differs: one of the figures is likely wrong."""
    first_of_dtype: dict[str, tuple[str, int]] = {}
    for part in parts.pools:
        if part.spec.layout is None:
            continue
        dtype, size = part.spec.layout.dtype, part.spec.kv_bytes_per_token
        name, first = first_of_dtype.setdefault(dtype, (part.spec.name, size))
        if first != size:
            message = f"is {size}, but pool {name} has {first} with the same dtype ({dtype})"
            yield part.path("kv_bytes_per_token"), message


def _shared_addresses(parts: Parts, addresses: dict[str, str]) -> Iterator[Problem]:
    """Endpoints that another document lists too: neither model's figures know the other's load."""
    own: dict[str, str] = {}
    for part in parts.pools:
        for i, endpoint in enumerate(part.spec.endpoints or ()):
            path = part.path("endpoints", i, "address")
            if endpoint.address in addresses:
                where = addresses[endpoint.address]
                message = f"is {endpoint.address}, which serves another model too ({where})"
                yield parts.document.problem(path, message)
            own.setdefault(endpoint.address, parts.document.place_of(path))
    addresses.update(own)
