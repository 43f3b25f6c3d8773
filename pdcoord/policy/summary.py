"""A policy on a page: per model its pools, where their endpoints come from, and who can feed whom."""

from collections.abc import Iterable, Iterator, Sequence

from pdcoord.core.model import Model, PrefixMode
from pdcoord.policy.compile import CompiledPolicy, PoolBinding
from pdcoord.policy.endpoints import MatchedEndpoint
from pdcoord.policy.pools import BYTES_PER_GBIT
from transfer.layout import PLAIN_TILING, KvLayout, KvSplit
from transfer.verdict import verdict

ENDPOINTS_SHOWN_MAX = 4


def describe_policy(compiled: CompiledPolicy, matched: Sequence[MatchedEndpoint] | None) -> Iterator[str]:
    """Lines that describe every model; `matched` is None where no endpoints file was given."""
    for model in compiled.models:
        yield ""
        yield from _describe_model(model)
        yield ""
        bindings = [binding for binding in compiled.bindings if binding.pool.model == model.name]
        yield from _indent(table(_POOL_HEAD, [_pool_row(binding, matched) for binding in bindings]))
        yield ""
        pairs = _pair_rows(model)
        yield from _indent(table(_PAIR_HEAD, pairs) if pairs else ["no pool prefills for another"])


def _describe_model(model: Model) -> Iterator[str]:
    aliases = f" ({', '.join(model.aliases)})" if model.aliases else ""
    yield f"model {model.name}{aliases}"
    if model.adapters:
        yield f"  adapters: {', '.join(model.adapters)}"
    rules = model.disaggregation
    yield (
        f"  split: {rules.mode}, from {rules.uncached_tokens_min} uncached tokens and"
        f" {rules.saving_s_min * 1e3:g} ms saved; transfer within {rules.transfer_deadline_s:g} s at"
        f" {rules.bandwidth_bytes_per_s_min / BYTES_PER_GBIT:g} Gbit/s or more"
    )
    yield f"  ladder: {', '.join([*model.fallback.rungs, 'refuse'])}"
    if model.prefix_mode is PrefixMode.PRECISE:
        by = model.tokenizing
        sources = [by.file] if by.file is not None else []
        sources.append(f"{by.render}/render" if by.render is not None else "the engines' /tokenize")
        yield f"  prefixes: precise; tokens by {', '.join(sources)} within {by.deadline_s * 1e3:g} ms"
    objectives = [("ttft", model.slo.ttft_s), ("tpot", model.slo.tpot_s)]
    said = [f"{name} {value_s * 1e3:g} ms" for name, value_s in objectives if value_s is not None]
    yield f"  slo: {', '.join(said) or 'none'}"


_POOL_HEAD = (
    "pool",
    "role",
    "vendor",
    "engine",
    "connector",
    "blocks",
    "link",
    "cost/h",
    "alone",  # whether a whole request can run on one endpoint
    "endpoints",
)


def _pool_row(binding: PoolBinding, matched: Sequence[MatchedEndpoint] | None) -> tuple[str, ...]:
    pool = binding.pool
    layout = pool.side.layout
    return (
        pool.name,
        pool.role,
        pool.vendor,
        pool.engine,
        pool.side.connector,
        "-" if layout is None else _describe_blocks(layout),
        f"{pool.link_bytes_per_s / BYTES_PER_GBIT:g} Gbit/s" if pool.link_bytes_per_s else "unknown",
        f"{pool.cost_per_hour:g}",
        "yes" if pool.can_serve_alone else "no",
        _describe_endpoints(binding, matched),
    )


def _describe_blocks(layout: KvLayout) -> str:
    """Block size, order and dtype, and whatever else is out of the ordinary."""
    words = [str(layout.block_tokens), layout.order, layout.dtype]
    words += [layout.tiling] if layout.tiling != PLAIN_TILING else []
    words += [layout.split] if layout.split is not KvSplit.PACKED else []
    words += [f"TP {layout.tensor_parallel}"] if layout.tensor_parallel > 1 else []
    return " ".join(words)


def _describe_endpoints(binding: PoolBinding, matched: Sequence[MatchedEndpoint] | None) -> str:
    if binding.match_labels is None:
        return _list_addresses([endpoint.address for endpoint in binding.endpoints])
    selector = "with " + ",".join(f"{key}={value}" for key, value in binding.match_labels.items())
    if matched is None:
        return f"those {selector}"
    addresses = [
        found.endpoint.address + (" (draining)" if found.is_draining else "")
        for found in matched
        if found.endpoint.pool == binding.pool
    ]
    return f"{_list_addresses(addresses)}; those {selector}"


def _list_addresses(addresses: Sequence[str]) -> str:
    shown = ", ".join(addresses[:ENDPOINTS_SHOWN_MAX])
    left_out = len(addresses) - ENDPOINTS_SHOWN_MAX
    if not addresses:
        return "0"
    return f"{len(addresses)}: {shown}" + (f", and {left_out} more" if left_out > 0 else "")


_PAIR_HEAD = ("prefill", "decode", "verdict", "core s/GB", "reason")


def _pair_rows(model: Model) -> list[tuple[str, ...]]:
    """One row for each pool that can prefill with each that can decode."""
    rows: list[tuple[str, ...]] = []
    for prefill in (pool for pool in model.pools if pool.can_prefill):
        for decode in (pool for pool in model.pools if pool.can_decode):
            found = verdict(prefill.side, decode.side)
            cost = "-" if found.cost is None else f"{found.cost.core_s_per_gb:g}"
            rows.append((prefill.name, decode.name, found.kind, cost, found.reason))
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their widest cell, two spaces apart."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _indent(lines: Iterable[str]) -> Iterator[str]:
    return ("  " + line for line in lines)
