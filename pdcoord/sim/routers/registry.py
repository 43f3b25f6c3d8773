"""The rivals by name, each with its best published setting."""

from collections.abc import Callable
from functools import partial

from pdcoord.sim.routers.base import Router, Surroundings
from pdcoord.sim.routers.cacheaware import CacheAware, CacheAwareSettings, Unknown
from pdcoord.sim.routers.dynamo import Dynamo, DynamoSettings
from pdcoord.sim.routers.leastload import LeastLoad, LeastLoadSettings
from pdcoord.sim.routers.leastrequest import LeastRequest, LeastRequestSettings
from pdcoord.sim.routers.llmd import Llmd, LlmdSettings
from pdcoord.sim.routers.mooncake import Mooncake, MooncakeSettings
from pdcoord.sim.routers.roundrobin import ProxyMode, RoundRobin, ServiceSettings

Factory = Callable[[Surroundings], Router]

_WHOLE: dict[str, Factory] = {
    "round-robin": partial(RoundRobin, name="round-robin", settings=ServiceSettings()),
    "random": partial(RoundRobin, name="random", settings=ServiceSettings(ProxyMode.IPTABLES)),
    "least-request": partial(LeastRequest, name="least-request", settings=LeastRequestSettings()),
    "llm-d": partial(Llmd, name="llm-d", settings=LlmdSettings.scored()),
    "llm-d-precise": partial(Llmd, name="llm-d-precise", settings=LlmdSettings.precise()),
    "llm-d-sticky": partial(Llmd, name="llm-d-sticky", settings=LlmdSettings.sticky()),
    "dynamo-agg": partial(Dynamo, name="dynamo-agg", settings=DynamoSettings.aggregated()),
    "cache-aware": partial(CacheAware, name="cache-aware", settings=CacheAwareSettings()),
    "cache-aware-tree": partial(
        CacheAware, name="cache-aware-tree", settings=CacheAwareSettings(unknown=Unknown.SMALLEST_TREE)
    ),
    "least-load": partial(LeastLoad, name="least-load", settings=LeastLoadSettings()),
}

_SPLITTING: dict[str, Factory] = {
    "llm-d-pd": partial(Llmd, name="llm-d-pd", settings=LlmdSettings.threshold()),
    "llm-d-pd-always": partial(Llmd, name="llm-d-pd-always", settings=LlmdSettings.always()),
    "llm-d-pd-sticky": partial(Llmd, name="llm-d-pd-sticky", settings=LlmdSettings.always_sticky()),
    "dynamo": partial(Dynamo, name="dynamo", settings=DynamoSettings.split()),
    "dynamo-conditional": partial(Dynamo, name="dynamo-conditional", settings=DynamoSettings.conditional()),
    "cache-aware-pd": partial(CacheAware, name="cache-aware-pd", settings=CacheAwareSettings(is_split=True)),
    "least-load-pd": partial(LeastLoad, name="least-load-pd", settings=LeastLoadSettings(is_split=True)),
    "mooncake": partial(Mooncake, name="mooncake", settings=MooncakeSettings()),
}

RIVALS: dict[str, Factory] = _WHOLE | _SPLITTING

SPLITTING: frozenset[str] = frozenset(_SPLITTING)
"""Rivals that split calls where a pair may hand over; the others do so only where no place serves alone."""
