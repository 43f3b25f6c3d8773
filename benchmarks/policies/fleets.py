"""The fleets of the benchmark, from the vendor profiles; a policy believes exactly what its engines are."""

from dataclasses import dataclass
from functools import lru_cache

from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolLimits, PoolName, Role
from pdcoord.core.model import AdmissionRules, Model, PrefixMode, Slo
from pdcoord.protocol.headers import HostPort
from pdcoord.sim.profiles import PROFILES, Profile
from pdcoord.sim.settings import EngineSettings
from pdcoord.sim.study.shapes import GRANITE_8B, SARVAM_30B, ModelShape, reshaped
from pdcoord.sim.study.stage import Stage, make_scene
from transfer.verdict import Connector, Side

SLO = Slo(ttft_s=2.0, tpot_s=0.05)


@dataclass(frozen=True, slots=True)
class Vendor:
    """One vendor of the published runs.

    The runs name them A, B and C only. C runs blocks of 128 and 256 sequences, which is Gaudi's habit; which
    accelerators the others are is an assumption.

    Attributes:
        cost_per_hour: an estimate; it decides between equal predictions only.
    """

    letter: str
    profile: str
    count: int
    cost_per_hour: float


VENDORS = {
    vendor.letter: vendor
    for vendor in (
        Vendor("A", "nvidia-h100-8b", 4, 4.0),
        Vendor("B", "amd-mi300x-8b", 8, 3.0),
        Vendor("C", "intel-gaudi3-8b", 8, 2.0),
    )
}
SHAPES: dict[str, ModelShape | None] = {"granite": GRANITE_8B, "sarvam": SARVAM_30B, "llama": None}
"""Models by the name that a job gives; None is the one that the profiles are of."""
RUNNING_MAX = 256
CONTEXT_TOKENS_MAX = 131_072


@lru_cache(maxsize=32)
def stage(letters: str, model: str) -> Stage:
    """The pods of some vendors, all of role both, all with our connector.

    Role both lets every rival serve whole calls anywhere and split over whichever pairs it may.
    """
    pools: list[Pool] = []
    endpoints: list[Endpoint] = []
    settings: list[EngineSettings] = []
    shape = SHAPES[model]
    for letter in letters:
        vendor = VENDORS[letter]
        base = PROFILES[vendor.profile]
        profile = base if shape is None else reshaped(base, shape)
        pool = _pool(vendor, profile, model)
        pools.append(pool)
        for index in range(vendor.count):
            name = f"{profile.vendor}-{index}"
            address = HostPort(f"10.0.{'ABC'.index(letter)}.{index}:8000")
            endpoints.append(Endpoint(EndpointId(f"{pool.name}/{name}"), pool, address))
            settings.append(_settings(name, model, pool, profile))
    # The runs had granite precise and sarvam approximate.
    mode = PrefixMode.APPROXIMATE if model == "sarvam" else PrefixMode.PRECISE
    if shape is None:
        compiled = Model(ModelName(model), tuple(pools), slo=SLO, prefix_mode=mode)
    else:
        # The published runs had no objectives and refused nobody: all of it queues in the engines.
        admission = AdmissionRules(wait_s_max=0.0)
        compiled = Model(ModelName(model), tuple(pools), prefix_mode=mode, admission=admission)
    return Stage(compiled, make_scene(endpoints, settings))


def _pool(vendor: Vendor, profile: Profile, model: str) -> Pool:
    return Pool(
        name=PoolName(profile.vendor),
        model=ModelName(model),
        role=Role.BOTH,
        vendor=profile.vendor,
        engine=EngineKind.VLLM,
        side=Side(Connector.PDCOORD, profile.layout),
        speed=profile.speed,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        link_bytes_per_s=profile.link_gbit_per_s.value * 1e9 / 8,
        cost_per_hour=vendor.cost_per_hour,
        limits=PoolLimits(in_flight_max=1_024, context_tokens_max=CONTEXT_TOKENS_MAX),
    )


def _settings(name: str, model: str, pool: Pool, profile: Profile) -> EngineSettings:
    return EngineSettings(
        name=name,
        model=model,
        speed=profile.speed,
        layout=profile.layout,
        block_total=profile.block_total,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        link_bytes_per_s=pool.link_bytes_per_s,
        running_max=RUNNING_MAX,
        context_tokens_max=CONTEXT_TOKENS_MAX,
    )
