"""A policy and a fleet file put together: the scene that a study runs on, and what a policy knows of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pdcoord.core.fleet import Endpoint
from pdcoord.core.model import Model
from pdcoord.core.paths import PathTable
from pdcoord.policy.compile import CompiledPolicy, PoolBinding, compile_policy
from pdcoord.policy.errors import PolicyError, Problem, quote
from pdcoord.policy.load import load_policies
from pdcoord.policy.pools import BYTES_PER_GBIT, make_endpoint
from pdcoord.protocol.headers import HostPort
from pdcoord.sim.coarse.scene import Scene
from pdcoord.sim.fleetfile import EngineSpec, LoadedFleet, load_fleet
from pdcoord.sim.routers.base import Place
from pdcoord.sim.settings import EngineSettings
from transfer.layout import KvLayout

KV_TOKENS_BELIEVED = 400_000
"""Roughly what an 80 GB card holds beside an 8B model in bfloat16 (pdcoord.sim.profiles)."""
_BLOCK_TOKENS = 16  # vLLM's default, for a pool that names no layout
_CONTEXT_TOKENS = 131_072
_RUNNING_MAX = 256  # vLLM's max_num_seqs on one card
_NAMES_SHOWN_MAX = 8


@dataclass(frozen=True, slots=True)
class Stage:
    """A fleet as it is, and the policy that believes something of it.

    Attributes:
        unused: engines that no pool of the policy uses.
    """

    model: Model
    scene: Scene
    unused: tuple[str, ...] = ()


class Reach(StrEnum):
    """Which pairs of endpoints a router may split a call over; closed."""

    VERDICTS = "verdicts"
    ONE_VENDOR = "one-vendor"
    ALL = "all"


def hand_over(places: Sequence[Place], reach: Reach) -> tuple[tuple[bool, ...], ...]:
    """`Surroundings.can_hand_over` of a reach; nobody hands over to itself."""
    table = PathTable()

    def can(prefill: Endpoint, decode: Endpoint) -> bool:
        if prefill.id == decode.id or not (prefill.pool.can_prefill and decode.pool.can_decode):
            return False
        match reach:
            case Reach.VERDICTS:
                return table.verdict(prefill.pool, decode.pool).is_possible
            case Reach.ONE_VENDOR:
                return prefill.pool.vendor == decode.pool.vendor and prefill.pool.engine is decode.pool.engine
            case Reach.ALL:
                return True

    return tuple(tuple(can(p.endpoint, d.endpoint) for d in places) for p in places)


def load_stage(policy: Path, fleet: Path) -> Stage:
    """Read both files and match them.

    Raises:
        PolicyError: with everything wrong with either, and with each endpoint that is no engine.
    """
    compiled = compile_policy(load_policies(policy))
    return match_stage(str(policy), compiled, load_fleet(fleet))


def match_stage(policy_file: str, compiled: CompiledPolicy, fleet: LoadedFleet) -> Stage:
    """Find the engine of every endpoint: by its address, else by its name.

    A decode endpoint's address is often its sidecar's, in front of the engine, so an engine of the
    endpoint's name will do. A pool with a selector takes every engine with its labels.

    Raises:
        PolicyError: naming what does not match.
    """
    model = _model_of(policy_file, compiled, fleet)
    engines = fleet.fleet.engines
    problems: list[Problem] = []
    matched: list[tuple[Endpoint, EngineSpec]] = []
    for binding in compiled.bindings:
        if binding.pool.model == model.name:
            matched += _of_pool(policy_file, fleet, binding, problems)
    problems += _taken_twice(policy_file, matched)
    if problems:
        raise PolicyError(problems)
    settings = [engine.settings(model.name, fleet.fleet.seed) for _, engine in matched]
    used = {engine.name for _, engine in matched}
    unused = tuple(engine.name for engine in engines if engine.name not in used)
    endpoints = [endpoint for endpoint, _ in matched]
    return Stage(model, make_scene(endpoints, settings), unused)


def believed_stage(model: Model, endpoints: Sequence[Endpoint]) -> Stage:
    """Engines that are exactly what the policy believes of them.

    What a policy does not say is taken to be: a KV pool of KV_TOKENS_BELIEVED or four of the longest
    contexts, and vLLM's defaults for the rest.
    """
    own = [endpoint for endpoint in endpoints if endpoint.pool.model == model.name]
    return Stage(model, make_scene(own, [_believed(endpoint) for endpoint in own]))


def _believed(endpoint: Endpoint) -> EngineSettings:
    pool = endpoint.pool
    layout = pool.side.layout or KvLayout(_BLOCK_TOKENS)
    context_tokens_max = pool.limits.context_tokens_max or _CONTEXT_TOKENS
    kv_tokens = max(KV_TOKENS_BELIEVED, 4 * context_tokens_max)
    return EngineSettings(
        name=endpoint.id,
        model=pool.model,
        speed=pool.speed,
        layout=layout,
        block_total=kv_tokens // layout.block_tokens,
        kv_bytes_per_token=pool.kv_bytes_per_token,
        link_bytes_per_s=pool.link_bytes_per_s or BYTES_PER_GBIT,
        engine=pool.engine,
        role=pool.role,
        connector=pool.side.connector,
        running_max=min(_RUNNING_MAX, pool.limits.in_flight_max),
        context_tokens_max=context_tokens_max,
    )


def make_scene(endpoints: Sequence[Endpoint], settings: Sequence[EngineSettings]) -> Scene:
    """A scene without trouble: each endpoint with its engine."""
    places = tuple(
        Place(
            index=index,
            endpoint=endpoint,
            kv_tokens=engine.block_total * engine.layout.block_tokens,
            running_max=engine.running_max,
            step_tokens_max=engine.step_tokens_max,
            block_tokens=engine.layout.block_tokens,
        )
        for index, (endpoint, engine) in enumerate(zip(endpoints, settings, strict=True))
    )
    return Scene(places, tuple(settings))


def _model_of(policy_file: str, compiled: CompiledPolicy, fleet: LoadedFleet) -> Model:
    served = fleet.fleet.model
    for model in compiled.models:
        if served in model.names:
            return model
    names = ", ".join(name for model in compiled.models for name in model.names)
    message = f"is {quote(served)}, which {policy_file} has no policy for; it has {names}"
    raise PolicyError([Problem(fleet.file, None, ("model",), message)])


def _of_pool(
    policy_file: str, fleet: LoadedFleet, binding: PoolBinding, problems: list[Problem]
) -> Iterator[tuple[Endpoint, EngineSpec]]:
    pool = binding.pool
    if binding.match_labels is not None:
        labels = binding.match_labels.items()
        picked = [engine for engine in fleet.fleet.engines if labels <= engine.labels.items()]
        if not picked:
            wanted = ", ".join(f"{key}: {value}" for key, value in labels)
            message = f"picks no engine of {fleet.file}; give one the labels {{{wanted}}}"
            problems.append(Problem(policy_file, None, ("pools", pool.name, "selector"), message))
        for engine in picked:
            address = HostPort(f"{engine.host}:{engine.port}")
            yield make_endpoint(pool, address, engine.name, engine.bootstrap_port), engine
        return
    by_address = {f"{engine.host}:{engine.port}": engine for engine in fleet.fleet.engines}
    by_name = {engine.name: engine for engine in fleet.fleet.engines}
    for endpoint in binding.endpoints:
        name = endpoint.id.removeprefix(f"{pool.name}/")
        found = by_address.get(endpoint.address) or by_name.get(name)
        if found is None:
            shown = ", ".join(f"{e.name} at {a}" for a, e in list(by_address.items())[:_NAMES_SHOWN_MAX])
            message = (
                f"{quote(name)} at {endpoint.address} is no engine of {fleet.file}, neither by address nor "
                f"by name; it has {shown}"
            )
            problems.append(Problem(policy_file, None, ("pools", pool.name, "endpoints"), message))
        else:
            yield endpoint, found


def _taken_twice(policy_file: str, matched: Sequence[tuple[Endpoint, EngineSpec]]) -> Iterator[Problem]:
    owners: dict[str, Endpoint] = {}
    for endpoint, engine in matched:
        owner = owners.setdefault(engine.name, endpoint)
        if owner is not endpoint:
            message = f"engine {quote(engine.name)} is {owner.id} and {endpoint.id}; name it in one pool only"
            yield Problem(policy_file, None, ("pools", endpoint.pool.name), message)
