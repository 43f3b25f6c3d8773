"""The Kubernetes API as the feeds use it: one page of a list, a watch's lines, a change of a status.

Authentication and TLS are the official client's (kubernetes 37, `kubernetes.aio`). Objects stay the plain
data that the server sent: they are judged here, not by a model that a newer server's fields would break.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec
import yaml
from kubernetes.aio import config as kube_config
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.config import ConfigException
from kubernetes.aio.config.kube_config import KubeConfigMerger

from pdcoord.feeds.kubewatch import KubeObject, WatchTrouble, trouble_of_status

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
ANSWER_BYTES_MAX = 64 << 20
LINE_BYTES_MAX = 4 << 20
"""An object in etcd has at most 1.5 MiB; as JSON on the wire it may be longer."""
_READ_BYTES = 1 << 16
_UNUSABLE = (ConfigException, OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError)
"""What the client raises for a configuration that it cannot use."""
_config: Any = kube_config
_merger: Any = KubeConfigMerger
"""Have no types."""


class KubeError(Exception):
    """A call to the API server that gave nothing: wait, then ask again.

    Attributes:
        retry_after_s: what the server asks to wait; None where it says nothing.
    """

    def __init__(self, trouble: WatchTrouble, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.trouble = trouble
        self.retry_after_s = retry_after_s


class KubeConfigError(ValueError):
    """There is no way to an API server: neither KUBECONFIG nor a pod's service account."""


@dataclass(frozen=True, slots=True)
class Collection:
    """Objects of one kind in one namespace.

    Attributes:
        group: empty for the core API.
        plural: as in the path, such as `pods`.
        labels: label selector; empty for all.
        fields: field selector; empty for all.
    """

    group: str
    version: str
    plural: str
    namespace: str
    labels: str = ""
    fields: str = ""

    @property
    def path(self) -> str:
        """Where it is on the server."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        return f"{root}/namespaces/{self.namespace}/{self.plural}"

    def query(self) -> list[tuple[str, str]]:
        """The selectors as query parameters."""
        given = (("labelSelector", self.labels), ("fieldSelector", self.fields))
        return [(name, text) for name, text in given if text]


def own_namespace(environ: Mapping[str, str] = os.environ) -> str | None:
    """The namespace of the pod that this runs in, or of KUBECONFIG's current context; None if unknown."""
    kubeconfig = environ.get("KUBECONFIG")
    if not kubeconfig:
        try:
            return NAMESPACE_FILE.read_text(encoding="ascii").strip() or None
        except OSError:
            return None
    try:
        _, current = _config.list_kube_config_contexts(kubeconfig)
    except _UNUSABLE:
        return None
    namespace = current.get("context", {}).get("namespace")
    return str(namespace) if namespace else None


def require_way_in(environ: Mapping[str, str] = os.environ) -> None:
    """Tell before a process starts whether it could reach an API server.

    Raises:
        KubeConfigError: if neither a file nor a service account says how, or the file cannot be used.
    """
    kubeconfig = environ.get("KUBECONFIG")
    if kubeconfig:
        for path in kubeconfig.split(os.pathsep):
            if path and not Path(path).is_file():
                raise KubeConfigError(f"KUBECONFIG names {path}, which is no file")
        _check_kubeconfig(kubeconfig)
    elif not environ.get("KUBERNETES_SERVICE_HOST"):
        raise KubeConfigError(
            "no API server is known: KUBECONFIG is not set, nor KUBERNETES_SERVICE_HOST, which every pod has"
        )


def _check_kubeconfig(kubeconfig: str) -> None:
    """Load it as far as no plugin is run.

    Raises:
        KubeConfigError: if it names no context, cluster or server.
    """
    try:
        _, current = _config.list_kube_config_contexts(kubeconfig)
        cluster = _merger(kubeconfig).config["clusters"].get_with_name(current["context"]["cluster"])
        if not cluster["cluster"].safe_get("server"):
            raise KeyError("the current context's cluster has no server")
    except _UNUSABLE as error:
        # Of a file that is something else altogether the client says how it stumbled.
        is_other = isinstance(error, TypeError | AttributeError)
        why = "it is not a mapping of the known keys" if is_other else " ".join(str(error).split())
        message = f"KUBECONFIG names {kubeconfig}, which is no kubeconfig: {why[:300]}"
        raise KubeConfigError(f"{message}; give one that kubectl takes") from error


class KubeApi:
    """One API server, through one pool of connections; opened at the first call, closed on exit.

    Every call is bounded in time and size, and fails with KubeError only. A token that has expired is read
    again: a service account's by the client once a minute, KUBECONFIG's after a 401.
    """

    def __init__(self, *, deadline_s: float = 15.0, environ: Mapping[str, str] = os.environ) -> None:
        self._deadline_s = deadline_s
        self._environ = environ
        self._client: ApiClient | None = None
        self._is_opening = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        client, self._client = self._client, None
        if client is not None:
            async with asyncio.timeout(self._deadline_s):
                await _rest_of(client).close()

    async def list_page(self, of: Collection, *, size: int, page: str = "") -> KubeObject:
        """One page of at most `size` objects, as the server's List object.

        Raises:
            KubeError: whatever happened.
        """
        query = [*of.query(), ("limit", str(size)), *([("continue", page)] if page else [])]
        return await self._exchange("GET", of.path, query, None)

    async def patch_status(self, of: Collection, name: str, patch: KubeObject) -> KubeObject:
        """Merge into one object's status subresource (JSON merge patch, RFC 7396); the object after it.

        Raises:
            KubeError: whatever happened.
        """
        return await self._exchange("PATCH", f"{of.path}/{name}/status", [], patch)

    @asynccontextmanager
    async def watch(
        self, of: Collection, resource_version: str, *, last_s: int
    ) -> AsyncIterator[AsyncIterator[list[KubeObject]]]:
        """Watch since a version, for about `last_s` seconds: the lines that came together, parsed.

        Raises:
            KubeError: on entering or while lines are read, also if nothing ends it in time.
        """
        query = [
            *of.query(),
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", resource_version),
            ("timeoutSeconds", str(last_s)),
        ]
        response = None
        try:
            with _translated():
                async with asyncio.timeout(self._deadline_s):
                    response = await self._send("GET", of.path, query, None, last_s + self._deadline_s)
                    if response.status != 200:
                        raise _error_of(response.status, response.headers, await _read(response))
            yield _lines(response)
        finally:
            if response is not None:
                response.close()  # Not `release`: a watch has no end that could be read to.

    async def _exchange(
        self, method: str, path: str, query: list[tuple[str, str]], body: KubeObject | None
    ) -> KubeObject:
        with _translated():
            async with asyncio.timeout(self._deadline_s):
                response = await self._send(method, path, query, body, self._deadline_s)
                async with response:
                    raw = await _read(response)
                if response.status >= 300:
                    raise _error_of(response.status, response.headers, raw)
                return _object(raw)

    async def _send(
        self, method: str, path: str, query: list[tuple[str, str]], body: KubeObject | None, total_s: float
    ) -> aiohttp.ClientResponse:
        client = await self._opened()
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/merge-patch+json"
        verb, url, headers, sent, _ = await client.param_serialize(
            method, path, query_params=query, header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        timeout = aiohttp.ClientTimeout(total=total_s, sock_connect=self._deadline_s)
        answer = await _rest_of(client).request(
            verb, url, headers=headers, body=sent, _request_timeout=timeout
        )
        if answer.status == 401:
            await self._load(client.configuration)
        response = answer.response
        assert isinstance(response, aiohttp.ClientResponse)
        return response

    async def _opened(self) -> ApiClient:
        async with self._is_opening:
            if self._client is None:
                configuration = Configuration()
                await self._load(configuration)
                configuration.retries = None  # Who calls decides, with a pause that grows.
                self._client = ApiClient(configuration)
                self._client.user_agent = "pdcoord"
            return self._client

    async def _load(self, configuration: Configuration) -> None:
        kubeconfig = self._environ.get("KUBECONFIG")
        try:
            if kubeconfig:
                await _config.load_kube_config(
                    config_file=kubeconfig, client_configuration=configuration, persist_config=False
                )
            else:
                _config.load_incluster_config(client_configuration=configuration)
        except _UNUSABLE as error:
            raise KubeError(WatchTrouble.DENIED, f"no way to an API server: {error}") from error


class _translated:  # noqa: N801  # reads as a verb where it stands: with _translated()
    """Turns what the libraries raise into KubeError."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        match error:
            case None | KubeError():
                return
            case TimeoutError():
                raise KubeError(WatchTrouble.TIMEOUT, "no answer in time") from error
            case aiohttp.ClientConnectorError():
                raise KubeError(WatchTrouble.UNREACHABLE, str(error)) from error
            case aiohttp.ClientError() | OSError():
                raise KubeError(WatchTrouble.BROKEN, str(error) or type(error).__name__) from error
            case ApiException():
                raise _error_of(error.status or 0, error.headers or {}, b"") from error
            case ConfigException():  # The service account's token could not be read again.
                raise KubeError(WatchTrouble.DENIED, str(error)) from error
            case _:
                return


def _rest_of(client: ApiClient) -> Any:
    """The client's own HTTP client, which has no types."""
    return client.rest_client


async def _read(response: aiohttp.ClientResponse) -> bytes:
    raw = bytearray()
    async for chunk in response.content.iter_chunked(_READ_BYTES):
        raw += chunk
        if len(raw) > ANSWER_BYTES_MAX:
            raise KubeError(WatchTrouble.UNREADABLE, f"an answer is longer than {ANSWER_BYTES_MAX} bytes")
    return bytes(raw)


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[list[KubeObject]]:
    """Whole lines as they come; the timeout of the response bounds the wait."""
    rest = b""
    with _translated():
        async for chunk in response.content.iter_any():
            *whole, rest = (rest + chunk).split(b"\n")
            if len(rest) > LINE_BYTES_MAX:
                raise KubeError(WatchTrouble.UNREADABLE, f"a line is longer than {LINE_BYTES_MAX} bytes")
            told = [_object(line) for line in whole if line.strip()]
            if told:
                yield told


def _object(raw: bytes) -> KubeObject:
    try:
        decoded: Any = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise KubeError(WatchTrouble.UNREADABLE, f"an answer is no JSON: {error}") from error
    if not isinstance(decoded, dict):
        raise KubeError(WatchTrouble.UNREADABLE, "an answer is no JSON object")
    return decoded


def _error_of(status: int, headers: Mapping[str, str], raw: bytes) -> KubeError:
    """An answer that refuses: its status, the server's own words, and how long to wait."""
    try:
        said = json.loads(raw or b"{}")
        message = str(said.get("message", "")) if isinstance(said, dict) else ""
    except ValueError:
        message = ""
    after = str(headers.get("Retry-After", "")).strip()
    retry_after_s = float(after) if after.isascii() and after.isdigit() and len(after) < 7 else None
    return KubeError(trouble_of_status(status), f"status {status}: {message[:200]}", retry_after_s)
