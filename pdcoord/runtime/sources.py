"""Where a process has its policies and endpoints from: files, or a Kubernetes API server."""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING

from structlog.typing import FilteringBoundLogger

from pdcoord.feeds.declared import EndpointsFile, EndpointsSource, PolicySource, Source
from pdcoord.feeds.kubewatch import WatchLimits, WatchTrouble
from pdcoord.feeds.podspec import SkipReason
from pdcoord.policy.errors import PolicyError, Problem
from pdcoord.policy.registry import PolicyRegistry
from pdcoord.runtime import catalog
from pdcoord.runtime.metricspec import MetricSpec
from pdcoord.runtime.observe import GaugeSample, Metrics
from pdcoord.runtime.settings import CoordinatorSettings

if TYPE_CHECKING:  # They need the kubernetes package, which few processes do.
    from pdcoord.feeds.kubeapi import KubeApi
    from pdcoord.feeds.kubefollow import Follower, FollowHooks
    from pdcoord.feeds.kubernetes import PodsSource


STATUS = "poolpolicies/status"
"""As RBAC names it."""


class Sources:
    """A process's policy source and endpoints source, and what keeps them up to date.

    Attributes:
        pushed: set when a source has told of a change, which then need not wait for the next look.
        followers: of the collections that are followed, for the metrics.

    Raises:
        PolicyError: from the constructor, if a source cannot exist here.
    """

    def __init__(self, settings: CoordinatorSettings, metrics: Metrics, log: FilteringBoundLogger) -> None:
        self._metrics = metrics
        self._log = log
        self.followers: list[Follower] = []
        self._parts: list[Callable[[], Coroutine[None, None, None]]] = []
        self._api: KubeApi | None = None
        self._pods: PodsSource | None = None
        self._rng = random.Random()  # noqa: S311  # spreads retries
        self._began_s = time.monotonic()
        self.pushed = asyncio.Event()
        self._changed: set[Source] = set()
        self.policies: PolicySource
        self.endpoints: EndpointsSource | None = None
        if settings.endpoints is not None:
            self.endpoints = EndpointsFile(settings.endpoints)
        if settings.policy is not None:
            self.policies = PolicyRegistry(settings.policy)
        if settings.kubernetes_pods or settings.kubernetes_policies:
            self._use_kubernetes(settings)
            metrics.read_state_from(self._gauges)

    @property
    def has_pods(self) -> bool:
        """Whether endpoints are pods."""
        return self._pods is not None

    def take_changed(self) -> frozenset[Source]:
        """Which sources pushed a change since the last call."""
        changed, self._changed = frozenset(self._changed), set()
        self.pushed.clear()
        return changed

    async def run(self) -> None:
        """Keep the sources up to date until cancelled; at once done where there are files only."""
        if self._api is None:
            return
        async with self._api, asyncio.TaskGroup() as group:
            for part in self._parts:
                group.create_task(part())

    def _use_kubernetes(self, settings: CoordinatorSettings) -> None:
        try:
            from pdcoord.feeds.kubeapi import (  # noqa: PLC0415  # an extra of its own
                KubeApi,
                KubeConfigError,
                own_namespace,
                require_way_in,
            )
        except ModuleNotFoundError as error:
            message = f"PDCOORD_KUBERNETES_* needs {error.name}: pip install 'pdcoord[kubernetes]'"
            raise _refused(message) from error
        try:
            require_way_in()
        except KubeConfigError as error:
            raise _refused(str(error)) from error
        namespace = settings.kubernetes_namespace or own_namespace()
        if namespace is None:
            raise _refused("which namespace is meant is not known: set PDCOORD_KUBERNETES_NAMESPACE")
        self._api = api = KubeApi()
        if settings.kubernetes_policies:
            self._follow_policies(api, namespace)
        if settings.kubernetes_pods:
            self._follow_pods(api, settings, namespace)

    def _follow_pods(self, api: "KubeApi", settings: CoordinatorSettings, namespace: str) -> None:
        from pdcoord.feeds.kubernetes import PodsSource, PodsWanted  # noqa: PLC0415

        wanted = PodsWanted(namespace, settings.kubernetes_selector, settings.inference_pool)
        self._pods = self.endpoints = PodsSource(
            api, wanted, hooks=self._hooks(Source.ENDPOINTS), clock=time.monotonic, rng=self._rng
        )
        self.followers += self._pods.followers
        self._parts.append(self._pods.run)

    def _follow_policies(self, api: "KubeApi", namespace: str) -> None:
        from pdcoord.feeds.kubefollow import Follower  # noqa: PLC0415
        from pdcoord.feeds.policies import POLICIES_MAX, KubePolicies, policies_of  # noqa: PLC0415
        from pdcoord.feeds.policystatus import StatusWriter  # noqa: PLC0415

        of = policies_of(namespace)
        follower = Follower(
            api,
            of,
            hooks=self._hooks(Source.POLICY),
            clock=time.monotonic,
            rng=self._rng,
            limits=WatchLimits(objects_max=POLICIES_MAX),
        )
        self.policies = policies = KubePolicies(lambda: follower.objects if follower.listed else None)
        writer = StatusWriter(
            api,
            of,
            judgement=lambda: policies.judgement,
            clock=time.monotonic,
            rng=self._rng,
            troubled=self._status_troubled,
        )
        self.followers.append(follower)
        self._parts += [follower.run, writer.run]

    def _hooks(self, source: Source) -> "FollowHooks":
        from pdcoord.feeds.kubefollow import FollowHooks  # noqa: PLC0415

        def changed() -> None:
            self._changed.add(source)
            self.pushed.set()

        return FollowHooks(changed, self._troubled)

    def _troubled(self, resource: str, why: WatchTrouble, detail: str, retry_s: float) -> None:
        self._metrics.kubernetes_troubles.labels(resource, why).inc()
        tell = self._log.info if why is WatchTrouble.EXPIRED else self._log.warning
        silent = {f.collection.plural: f.silent_s() for f in self.followers}
        silent_s = silent.get(resource)
        tell(
            "kubernetes.trouble",
            resource=resource,
            why=why,
            detail=detail,
            retry_s=round(retry_s, 2),
            silent_s=None if silent_s is None else round(silent_s, 2),
        )

    def _status_troubled(self, name: str, why: WatchTrouble, detail: str) -> None:
        self._metrics.kubernetes_troubles.labels(STATUS, why).inc()
        self._log.warning(
            "kubernetes.trouble", resource="poolpolicies/status", name=name, why=why, detail=detail
        )

    def _gauges(self) -> Iterable[tuple[MetricSpec, Iterable[GaugeSample]]]:
        followers = {follower.collection.plural: follower for follower in self.followers}
        lists = [((name,), float(f.machine.list_count)) for name, f in followers.items()]
        yield catalog.KUBERNETES_LISTS, lists
        watches = [((name,), float(f.machine.watch_count)) for name, f in followers.items()]
        yield catalog.KUBERNETES_WATCHES, watches
        since_start_s = time.monotonic() - self._began_s
        silent = {name: f.silent_s() for name, f in followers.items()}
        # A server that never answered is as silent as one that no longer does.
        ages = [((name,), since_start_s if s is None else s) for name, s in silent.items()]
        yield catalog.KUBERNETES_SILENT, ages
        if self._pods is not None:
            left_out = self._pods.left_out
            yield catalog.PODS_LEFT_OUT, [((reason,), float(left_out[reason])) for reason in SkipReason]


def _refused(message: str) -> PolicyError:
    return PolicyError([Problem("Kubernetes", None, (), message)])
