"""The emulated fleet as a person writes it: one EmulatedFleet document, compiled to engine settings."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import EngineKind, Role
from pdcoord.policy.errors import KeyPath, PolicyError, Problem
from pdcoord.policy.poolschema import LayoutSpec, SpeedSpec
from pdcoord.policy.values import ApiVersion, GbitPerS, Labels, Name, ServedName, Spec
from pdcoord.policy.yamltext import FaultsError, read_documents, validate
from pdcoord.sim.profiles import PROFILES, Profile
from pdcoord.sim.settings import EngineSettings, LoadFailurePolicy
from transfer.layout import KvLayout
from transfer.verdict import Connector, tiling_fault

ENGINES_MAX = 1_024
"""Engines of one fleet."""
AnyPort = Annotated[int, Field(ge=0, le=65_535)]
"""A port to listen on; 0 lets the kernel pick one."""
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Host = Annotated[
    str,
    Field(
        pattern=r"^[0-9A-Za-z:._-]{1,253}$", json_schema_extra={"x-expected": "a host name or an IP address"}
    ),
]


class EngineSpec(Spec):
    """One emulated engine, or several alike."""

    name: Name = Field(description="Unique in the file.")
    count: int | None = Field(
        default=None,
        ge=1,
        le=ENGINES_MAX,
        description="Engines alike, name-0, name-1 and so on, each port one higher than the last's.",
    )
    labels: Labels = Field(default={}, description="As a pod's: what a simulated policy's selectors match.")
    cost_per_hour: float | None = Field(
        default=None,
        ge=0,
        le=1e6,
        description="Of one engine, in any one currency: what advice reckons with.",
    )
    profile: str = Field(
        description="Speeds, memory, layout and link: a name of pdcoord.sim.profiles.",
        json_schema_extra={"x-expected": "one of " + ", ".join(PROFILES)},
    )
    engine: EngineKind = Field(default=EngineKind.VLLM, description="Whose wire habits it has.")
    role: Role = Field(default=Role.BOTH, description="Legs it is meant for; binds SGLang only.")
    connector: Connector | None = Field(
        default=None, description="What moves its KV: pdcoord for vllm and sglang for sglang if not set."
    )
    host: Host = Field(default="127.0.0.1", description="Address that every port of it listens on.")
    advertise_host: Host | None = Field(
        default=None, description="Address that other engines are told to dial; host if not set."
    )
    port: AnyPort = Field(description="The API; 0 lets the kernel pick one.")
    side_channel_port: AnyPort = Field(default=0, description="Where consumers pull from a vLLM engine.")
    bootstrap_port: AnyPort | None = Field(
        default=None, description="SGLang's rendezvous; required on one that prefills."
    )
    kv_events_port: AnyPort | None = Field(
        default=None, description="ZMQ publisher of KV events; none if not set."
    )
    kv_events_replay_port: AnyPort | None = Field(default=None, description="ZMQ replay of KV events.")
    kv_events_form: Literal["map", "array"] = Field(
        default="map", description="map is vLLM 0.32's encoding of an event, array that of earlier versions."
    )
    kv_events_hash: Literal["bytes", "int"] = Field(
        default="bytes", description="int is VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES: the low 64 bits."
    )
    kv_events_topic: str | None = Field(
        default=None, max_length=256, description="kv@HOST:PORT@MODEL if not set."
    )
    kv_port: Annotated[int, Field(ge=1, le=65_535)] | None = Field(
        default=None,
        description=(
            "Side channel of a transfer agent: the engine then holds real KV in its layout and hands it "
            "over. Connector pdcoord, one rank."
        ),
    )
    kv_backend: Literal["nixl", "tcp", "loopback"] = Field(
        default="tcp", description="What carries the real KV; loopback only within one process."
    )
    kv_key_file: str | None = Field(
        default=None, description="File with the key that the side channels share; none if they have none."
    )
    kv_always: bool = Field(
        default=False, description="kv_port: every request moves real KV, not only those that ask for it."
    )
    speed: SpeedSpec | None = Field(default=None, description="Figures in place of the profile's.")
    layout: LayoutSpec | None = Field(default=None, description="Layout in place of the profile's.")
    kv_blocks: int | None = Field(
        default=None, ge=1, le=1 << 22, description="Size of the KV pool in place of the profile's."
    )
    link_gbit_per_s: GbitPerS | None = Field(
        default=None, description="Network card in place of the profile's."
    )
    step_tokens_max: int = Field(default=8_192, ge=1, le=1 << 20, description="--max-num-batched-tokens.")
    running_max: int = Field(default=256, ge=1, le=65_536, description="--max-num-seqs.")
    queued_max: int = Field(
        default=1_024, ge=1, le=65_536, description="--max-num-queued-reqs; one more is answered 503."
    )
    context_tokens_max: int = Field(default=32_768, ge=2, le=1 << 24, description="--max-model-len.")
    lease_s: Seconds = Field(default=30.0, description="How long a prefill's KV waits: kv_lease_duration.")
    handshake_s: float = Field(
        default=0.2,
        ge=0,
        le=600,
        description="First contact of a pair; llm-d's guide tells of 5 s with vLLM's NixlConnector.",
    )
    pull_timeout_s: Seconds = Field(
        default=300.0, description="Longest wait for KV, for a room's prefill too (SGLang: 300 s)."
    )
    kv_load_failure_policy: LoadFailurePolicy = Field(
        default=LoadFailurePolicy.FAIL, description="vLLM's: fail answers 500, recompute prefills here."
    )
    deaf_template: bool = Field(
        default=False,
        description="A chat template that ends a partial answer, as DeepSeek V3.2's in vLLM 0.32.",
    )
    stock_silent_corruption: bool = Field(
        default=False,
        description="nixl only: unequal block sizes give wrong tokens without an error, as in vLLM 0.32.",
    )
    shutdown_timeout_s: float = Field(
        default=0.0,
        ge=0,
        le=86_400,
        description="--shutdown-timeout: how long SIGTERM waits for requests and leases; 0 drops them.",
    )
    prefix_caching: bool = Field(default=True, description="--enable-prefix-caching.")
    step_jitter_share: float = Field(
        default=0.0, ge=0, lt=1, description="A step's time varies by this share either way."
    )

    @property
    def told_host(self) -> str:
        """Where others dial it."""
        return self.advertise_host or self.host

    @property
    def connector_kind(self) -> Connector:
        if self.connector is not None:
            return self.connector
        return Connector.SGLANG if self.engine is EngineKind.SGLANG else Connector.PDCOORD

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults: list[tuple[KeyPath, str]] = []
        if self.profile not in PROFILES:
            message = f'is "{self.profile}", expected one of {", ".join(PROFILES)}'
            faults.append((("profile",), message))
        is_sglang = self.engine is EngineKind.SGLANG
        allowed = {Connector.SGLANG, Connector.NONE} if is_sglang else set(Connector) - {Connector.SGLANG}
        if self.connector_kind not in allowed:
            names = ", ".join(sorted(allowed))
            message = f"is {self.connector}, expected one of {names} with engine {self.engine}"
            faults.append((("connector",), message))
        if is_sglang and self.role is Role.PREFILL and self.bootstrap_port is None:
            faults.append((("bootstrap_port",), "is missing, expected on an sglang engine of role prefill"))
        if not is_sglang and self.bootstrap_port is not None:
            faults.append((("bootstrap_port",), "is sglang's; set side_channel_port on a vllm engine"))
        if self.kv_events_replay_port is not None and self.kv_events_port is None:
            faults.append((("kv_events_replay_port",), "is set without kv_events_port; set both"))
        if self.stock_silent_corruption and self.connector_kind is not Connector.NIXL:
            faults.append((("stock_silent_corruption",), "is nixl's; set connector: nixl or remove it"))
        if not faults:
            faults = [*self._size_faults(), *self._kv_faults()]
        if faults:
            raise FaultsError(faults)
        return self

    def _size_faults(self) -> list[tuple[KeyPath, str]]:
        profile = PROFILES[self.profile]
        layout = self._layout(profile)
        pool_tokens = self._block_total(profile, layout) * layout.block_tokens
        if pool_tokens >= self.context_tokens_max:
            return []
        message = (
            f"is {self.context_tokens_max}, expected at most the {pool_tokens} tokens that the KV pool holds"
        )
        return [(("context_tokens_max",), message)]

    def _kv_faults(self) -> list[tuple[KeyPath, str]]:
        if self.kv_port is None:
            return [(("kv_always",), "is set without kv_port; set both")] if self.kv_always else []
        if self.connector_kind is not Connector.PDCOORD:
            return [(("kv_port",), f"is set with connector {self.connector_kind}, expected pdcoord")]
        if not self.side_channel_port:
            return [(("side_channel_port",), "is 0 with kv_port, expected a port that others can know")]
        layout = self._layout(PROFILES[self.profile])
        if layout.tensor_parallel != 1:
            ranks = layout.tensor_parallel
            return [(("kv_port",), f"is set with tensor_parallel {ranks}, expected 1: one rank is emulated")]
        if (fault := tiling_fault(layout)) is not None:
            return [(("kv_port",), f"is set, but {fault}")]
        return []

    def each(self) -> list["EngineSpec"]:
        """The engines that this stands for."""
        if self.count is None:
            return [self]
        engines = []
        for number in range(self.count):
            ports = {key: port + number for key in _PORT_KEYS if (port := getattr(self, key))}
            changes: dict[str, object] = {"name": f"{self.name}-{number}", "count": None, **ports}
            engines.append(self.model_copy(update=changes))
        return engines

    def _layout(self, profile: Profile) -> KvLayout:
        if self.layout is None:
            return profile.layout
        return self.layout.compiled()

    def _block_total(self, profile: Profile, layout: KvLayout) -> int:
        if self.kv_blocks is not None:
            return self.kv_blocks
        return int(profile.kv_pool_tokens.value) // layout.block_tokens

    def settings(self, model: str, seed: int) -> EngineSettings:
        """This engine for the model that its fleet serves."""
        profile = PROFILES[self.profile]
        layout = self._layout(profile)
        link_gbit_per_s = self.link_gbit_per_s or profile.link_gbit_per_s.value
        return EngineSettings(
            name=self.name,
            model=model,
            speed=_speed(profile.speed, self.speed),
            layout=layout,
            block_total=self._block_total(profile, layout),
            kv_bytes_per_token=profile.kv_bytes_per_token,
            link_bytes_per_s=link_gbit_per_s * 1e9 / 8,
            engine=self.engine,
            role=self.role,
            connector=self.connector_kind,
            model_seed=seed,
            step_tokens_max=self.step_tokens_max,
            running_max=self.running_max,
            queued_max=self.queued_max,
            context_tokens_max=self.context_tokens_max,
            lease_s=self.lease_s,
            handshake_s=self.handshake_s,
            pull_s_max=self.pull_timeout_s,
            load_failure_policy=self.kv_load_failure_policy,
            is_silent_corruption_stock=self.stock_silent_corruption,
            is_prefix_caching=self.prefix_caching,
            moves_bytes_always=self.kv_always,
            is_template_deaf=self.deaf_template,
            jitter_share=self.step_jitter_share,
        )


def _speed(base: SpeedFigures, spec: SpeedSpec | None) -> SpeedFigures:
    """A profile's figures with those that a fleet file gives in their place."""
    if spec is None:
        return base
    written = {
        "prefill_base_s": (spec.prefill_base_ms, 1e3),
        "prefill_s_per_token": (spec.prefill_ms_per_token, 1e3),
        "prefill_s_per_token_squared": (spec.prefill_ns_per_token_squared, 1e9),
        "step_base_s": (spec.step_base_ms, 1e3),
        "step_s_per_sequence": (spec.step_us_per_sequence, 1e6),
        "step_s_per_context_token": (spec.step_ns_per_context_token, 1e9),
    }
    return replace(
        base, **{name: value / scale for name, (value, scale) in written.items() if value is not None}
    )


class AdminSpec(Spec):
    """A listener for the whole process, which outlives the engines' crashes."""

    host: Host = Field(default="127.0.0.1", description="Address to listen on.")
    port: AnyPort = Field(description="0 lets the kernel pick one.")


class EmulatedFleet(Spec):
    """Engines to emulate, all of one model."""

    api_version: ApiVersion
    kind: Literal["EmulatedFleet"] = Field(description="Kind of this document.")
    seed: int = Field(
        default=0, ge=0, lt=1 << 63, description="Decides what the model answers and the jitter of steps."
    )
    model: ServedName = Field(description="Name under which the engines serve the model.")
    admin: AdminSpec | None = Field(
        default=None, description="Faults and state of every engine in one place."
    )
    engines: tuple[EngineSpec, ...] = Field(
        min_length=1, max_length=ENGINES_MAX, description="The engines; once read, one for each of a count."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        written = [(index, engine) for index, spec in enumerate(self.engines) for engine in spec.each()]
        faults = [*_count_faults(self, len(written)), *_name_faults(written), *_port_faults(self, written)]
        if faults:
            raise FaultsError(faults)
        # The class is frozen for whoever reads it; this is still its making.
        self.__dict__["engines"] = tuple(engine for _, engine in written)
        return self


Written = list[tuple[int, EngineSpec]]
"""Every engine with the index of the entry that it stands in."""


def _count_faults(fleet: EmulatedFleet, total: int) -> list[tuple[KeyPath, str]]:
    if total <= ENGINES_MAX:
        return []
    index = max(range(len(fleet.engines)), key=lambda index: fleet.engines[index].count or 1)
    message = f"makes {total} engines of the fleet, expected at most {ENGINES_MAX} in all"
    return [(("engines", index, "count"), message)]


def _name_faults(written: Written) -> list[tuple[KeyPath, str]]:
    faults: list[tuple[KeyPath, str]] = []
    owners: dict[str, int] = {}
    for index, engine in written:
        owner = owners.setdefault(engine.name, index)
        if owner != index:
            message = f'is "{engine.name}", which engines[{owner}] has; rename one'
            faults.append((("engines", index, "name"), message))
    return faults


_PORT_KEYS = (
    "port",
    "side_channel_port",
    "bootstrap_port",
    "kv_events_port",
    "kv_events_replay_port",
    "kv_port",
)
_PORT_MAX = 65_535


def _port_faults(fleet: EmulatedFleet, written: Written) -> list[tuple[KeyPath, str]]:
    faults: list[tuple[KeyPath, str]] = []
    taken: dict[tuple[str, int], str] = {}
    if fleet.admin is not None and fleet.admin.port:
        taken[fleet.admin.host, fleet.admin.port] = "admin.port"
    for number, (index, engine) in enumerate(written):
        for key in _PORT_KEYS:
            port = getattr(engine, key)
            if not port:
                continue
            mine = f"{number} engines[{index}].{key}"
            owner = taken.setdefault((engine.host, port), mine)
            if owner != mine:
                other = owner.partition(" ")[2] or owner
                faults.append((("engines", index, key), f"is {port}, which {other} has; change one"))
            if port > _PORT_MAX:
                message = f"reaches {port} with its count, expected at most {_PORT_MAX}"
                faults.append((("engines", index, key), message))
    return faults


@dataclass(frozen=True, slots=True)
class LoadedFleet:
    """A fleet file that was accepted."""

    file: str
    fleet: EmulatedFleet

    def chosen(self, names: list[str]) -> tuple[EngineSpec, ...]:
        """The engines of these names, or all.

        Raises:
            PolicyError: naming one that the file does not have.
        """
        known = {engine.name: engine for engine in self.fleet.engines}
        for name in names:
            if name not in known:
                message = f'has no engine "{name}"; it has {", ".join(known)}'
                raise PolicyError([Problem(self.file, None, ("engines",), message)])
        return tuple(known[name] for name in dict.fromkeys(names)) if names else self.fleet.engines


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one engine runs when that is not what its fleet file says, as in a pod; None leaves a value."""

    host: str | None = None
    port: int | None = None
    advertise_host: str | None = None

    def of(self, specs: tuple[EngineSpec, ...]) -> tuple[EngineSpec, ...]:
        """The engines, placed.

        Raises:
            PlacementError: if it is no place, or several engines would share it.
        """
        written = {name: value for name in _PLACES if (value := getattr(self, name)) is not None}
        if not written:
            return specs
        if len(specs) != 1:
            options = ", ".join("--" + name.replace("_", "-") for name in written)
            raise PlacementError(f"{options}: for one engine, not {len(specs)}; choose it with --engine")
        try:
            placed = EngineSpec.model_validate(specs[0].model_dump(exclude_unset=True) | written)
        except ValidationError as error:
            faults = [(str(fault["loc"][-1]), fault["input"], fault["msg"]) for fault in error.errors()]
            message = "; ".join(
                f"--{key.replace('_', '-')} is {given!r}: {text}" for key, given, text in faults
            )
            raise PlacementError(message) from error
        return (placed,)


_PLACES = ("host", "port", "advertise_host")


class PlacementError(ValueError):
    """A place that an engine cannot have; the message says which option and why."""


def load_fleet(path: Path) -> LoadedFleet:
    """Read a fleet file.

    Raises:
        PolicyError: with everything wrong with it, by file, line and key path.
    """
    documents = read_documents(path)
    if len(documents) > 1:
        extra = documents[1]
        raise PolicyError([extra.problem((), "is a second document; a fleet file holds one")])
    return LoadedFleet(str(path), validate(documents[0], EmulatedFleet))
