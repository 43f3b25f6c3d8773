"""Settings of coordinator processes: environment variables `PDCOORD_*`, or what the command line says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import SettingsConfigDict

from pdcoord.feeds.scrapes import ScrapeLimits
from pdcoord.feeds.tokens import TokenLimits
from pdcoord.front.ports import Limits
from pdcoord.runtime.secured import SecuredSettings

ENV_PREFIX = "PDCOORD_"
NAMESPACE = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
REPLICA = r"^[A-Za-z0-9._-]{1,128}$"
OBJECT_NAME = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"
PATHS_BACKOFF_S_MAX = 30.0
"""A sidecar that does not tell of its paths is asked half as often each time, down to this."""


AnySettings = TypeVar("AnySettings", bound="CoordinatorSettings")


class SettingsError(ValueError):
    """Settings that a process cannot start with; the message is one line naming each and its value."""


Seconds = Annotated[float, Field(gt=0, le=86_400)]
PortNumber = Annotated[int, Field(ge=0, le=65_535)]


class CoordinatorSettings(SecuredSettings):
    """What any coordinator process can be told, whatever its front; times in seconds, sizes in bytes.

    Attributes:
        policy: the policy file; one of this and `kubernetes_policies`.
        endpoints: the endpoints file, for pools that have a selector.
        kubernetes_policies: whether policies are the PoolPolicy objects of the namespace.
        kubernetes_pods: whether endpoints are the pods of the namespace.
        kubernetes_namespace: the namespace; None for that of the own pod, or of KUBECONFIG.
        kubernetes_selector: label selector of the pods that are looked at.
        inference_pool: InferencePool whose selector and ports are used in place of that.
        admin_host: loopback by default: the admin listener shows addresses and loads. Elsewhere it needs
            `admin_key_file`.
        admin_key_file: the key that the admin listener asks for.
        keys_file: the API keys that calls are let in by; None to let every call in.
        engine_key_file: the key that engines ask for, sent to them in place of what a client sent.
        drain_notice_s: after SIGTERM, how long to serve on while /readyz already says no, so that
            whatever sends traffic here notices first.
        drain_s: then, how long calls under way may take to end.
        paths_interval_s: how often sidecars are asked about their paths, where the policy gives their
            metrics port.
        reload_interval_s: how often the files are looked at; SIGHUP does it at once.
        decisions_max: decisions kept for GET /decisions.
        control_port: where sidecars tell of their requests; None for nowhere, 0 lets the kernel pick one.
        control_key_file: the key that sidecars share with coordinators.
        control_cert_file, control_cert_key_file: with them control streams are encrypted.
        control_ca_file: with it sidecars need a certificate that it has signed.
        replica: name of this replica; None for the host's.
        tokenizer_threads: prompts tokenized at a time, where a policy names a tokenizer's file.
        tokenizer_cache_bytes_max: tokens of recent prompts kept, per tokenizer.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", frozen=True)

    policy: Path | None = None
    endpoints: Path | None = None
    kubernetes_policies: bool = False
    kubernetes_pods: bool = False
    kubernetes_namespace: Annotated[str, Field(pattern=NAMESPACE)] | None = None
    kubernetes_selector: Annotated[str, Field(max_length=4_096)] = "llm-d.ai/inference-serving=true"
    inference_pool: Annotated[str, Field(pattern=OBJECT_NAME, max_length=253)] | None = None
    admin_host: str = "127.0.0.1"
    admin_port: PortNumber = 8081
    admin_key_file: Path | None = None
    keys_file: Path | None = None
    engine_key_file: Path | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    connect_timeout_s: Seconds = 3.0

    scrape_interval_s: Annotated[float, Field(ge=0.02, le=60)] = 0.2
    scrape_deadline_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    scrape_backoff_s_max: Annotated[float, Field(gt=0, le=300)] = 2.0
    scrape_concurrent_max: Annotated[int, Field(ge=1, le=1_024)] = 64
    paths_interval_s: Annotated[float, Field(ge=0.02, le=3_600)] = 2.0

    control_host: str = "127.0.0.1"
    control_port: PortNumber | None = None
    control_key_file: Path | None = None
    control_cert_file: Path | None = None
    control_cert_key_file: Path | None = None
    control_ca_file: Path | None = None
    replica: Annotated[str, Field(pattern=REPLICA)] | None = None

    tokenizer_threads: Annotated[int, Field(ge=1, le=64)] = 2
    tokenizer_cache_bytes_max: Annotated[int, Field(ge=0, le=1 << 34)] = 64 << 20

    drain_notice_s: Annotated[float, Field(ge=0, le=3_600)] = 0.0
    drain_s: Annotated[float, Field(ge=0, le=3_600)] = 30.0
    reload_interval_s: Annotated[float, Field(ge=0.05, le=3_600)] = 1.0
    decisions_max: Annotated[int, Field(ge=1, le=65_536)] = 4_096

    @model_validator(mode="before")
    @classmethod
    def _ignore_service_links(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Kubernetes gives every pod beside a Service named pdcoord PDCOORD_PORT=tcp://10.0.0.1:8080."""
        return {
            name: value
            for name, value in given.items()
            if not (isinstance(value, str) and value.startswith("tcp://"))
        }

    @model_validator(mode="after")
    def _sources_agree(self) -> Self:
        """Policies come from one place, endpoints from at most one, and what says where is of use."""
        if self.policy is None and not self.kubernetes_policies:
            raise ValueError(
                "PDCOORD_POLICY is not set and PDCOORD_KUBERNETES_POLICIES is not true: name a policy file, "
                "or use the PoolPolicy objects of a namespace"
            )
        if self.policy is not None and self.kubernetes_policies:
            raise ValueError(
                f"PDCOORD_POLICY is {str(self.policy)!r} and PDCOORD_KUBERNETES_POLICIES is true: "
                "set one of them"
            )
        if self.endpoints is not None and self.kubernetes_pods:
            raise ValueError(
                f"PDCOORD_ENDPOINTS is {str(self.endpoints)!r} and PDCOORD_KUBERNETES_PODS is true: "
                "set one of them"
            )
        if self.inference_pool is not None and not self.kubernetes_pods:
            raise ValueError(
                f"PDCOORD_INFERENCE_POOL is {self.inference_pool!r}, which needs PDCOORD_KUBERNETES_PODS=true"
            )
        if self.inference_pool is not None and "kubernetes_selector" in self.model_fields_set:
            raise ValueError(
                f"PDCOORD_INFERENCE_POOL is {self.inference_pool!r} and PDCOORD_KUBERNETES_SELECTOR is "
                f"{self.kubernetes_selector!r}: the pool has a selector, so set one of them"
            )
        return self

    @model_validator(mode="after")
    def _control_agrees(self) -> Self:
        """A certificate has its key, and what says who may come in has a port to come in by."""
        if (self.control_cert_file is None) != (self.control_cert_key_file is None):
            raise ValueError(
                f"PDCOORD_CONTROL_CERT_FILE is {_path(self.control_cert_file)} and "
                f"PDCOORD_CONTROL_CERT_KEY_FILE is {_path(self.control_cert_key_file)}: set both or neither"
            )
        if self.control_ca_file is not None and self.control_cert_file is None:
            raise ValueError(
                f"PDCOORD_CONTROL_CA_FILE is {_path(self.control_ca_file)}, which needs "
                "PDCOORD_CONTROL_CERT_FILE: sidecars show certificates on encrypted streams only"
            )
        if self.control_port is None and (self.control_key_file or self.control_cert_file):
            field = "KEY_FILE" if self.control_key_file else "CERT_FILE"
            value = _path(self.control_key_file or self.control_cert_file)
            raise ValueError(
                f"PDCOORD_CONTROL_{field} is {value}, and without PDCOORD_CONTROL_PORT nothing uses it: "
                "set the port, or leave the file out"
            )
        return self

    def scrape_limits(self) -> ScrapeLimits:
        """How endpoints are scraped."""
        return ScrapeLimits(
            interval_s=self.scrape_interval_s,
            deadline_s=self.scrape_deadline_s,
            backoff_s_max=self.scrape_backoff_s_max,
            concurrent_max=self.scrape_concurrent_max,
        )

    def token_limits(self) -> TokenLimits:
        """Bounds on tokenizing prompts."""
        return TokenLimits(threads=self.tokenizer_threads, cache_bytes_max=self.tokenizer_cache_bytes_max)

    def paths_limits(self) -> ScrapeLimits:
        """How sidecars are asked about their paths: as endpoints are scraped, at an interval of its own."""
        return ScrapeLimits(
            interval_s=self.paths_interval_s,
            deadline_s=self.scrape_deadline_s,
            backoff_s_max=max(self.paths_interval_s, PATHS_BACKOFF_S_MAX),
            concurrent_max=self.scrape_concurrent_max,
        )


class GatewaySettings(CoordinatorSettings):
    """Everything that `pdcoord serve` can be told.

    Attributes:
        port: 0 lets the kernel pick one.
        bodies_bytes_max: bodies of all calls together that wait for their answers.
        resume_bytes_max: streams that are kept in all, so that they can be continued elsewhere.
    """

    host: str = "127.0.0.1"
    port: PortNumber = 8080

    body_bytes_max: Annotated[int, Field(ge=1_024, le=1 << 30)] = 32 << 20
    bodies_bytes_max: Annotated[int, Field(ge=1_024, le=1 << 36)] = 256 << 20
    body_timeout_s: Seconds = 60.0
    head_timeout_s: Seconds = 900.0
    answer_timeout_s: Seconds = 1_800.0
    stream_idle_s: Seconds = 90.0
    request_deadline_s: Seconds = 3_600.0
    resume_bytes_max: Annotated[int, Field(ge=0, le=1 << 36)] = 256 << 20

    def limits(self) -> Limits:
        """Bounds on one call."""
        return Limits(
            body_bytes_max=self.body_bytes_max,
            bodies_bytes_max=self.bodies_bytes_max,
            body_timeout_s=self.body_timeout_s,
            head_timeout_s=self.head_timeout_s,
            answer_timeout_s=self.answer_timeout_s,
            stream_idle_s=self.stream_idle_s,
            request_deadline_s=self.request_deadline_s,
            resume_bytes_max=self.resume_bytes_max,
        )


def load_settings(**given: Any) -> GatewaySettings:
    """Settings of the gateway; see `load`."""
    return load(GatewaySettings, given)


def load(kind: type[AnySettings], given: Mapping[str, Any]) -> AnySettings:
    """Settings from the environment, with what is given (and is not None) in place of it.

    Raises:
        SettingsError: naming every variable at fault, its value and what is expected.
    """
    try:
        return kind(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        faults = [
            f"{ENV_PREFIX}{str(fault['loc'][0]).upper()} is {_shown(fault)}: {fault['msg']}"
            if fault["loc"]
            else fault["msg"].removeprefix("Value error, ")
            for fault in error.errors()
        ]
        raise SettingsError("; ".join(faults)) from error


def _path(path: Path | None) -> str:
    return "not set" if path is None else repr(str(path))


def _shown(fault: Any) -> str:
    return "not set" if fault["type"] == "missing" else repr(fault["input"])
