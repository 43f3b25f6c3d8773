"""The OpenAI front door as a FastAPI app: routes, their OpenAPI, errors, health.

Calls of the API do not pass through FastAPI's middlewares and routing: each of those wraps `send`, so
each would run once per token. `GatewayApp.__call__` hands them to the relay first; the same calls are
registered as routes too, which documents them and serves them where the app is mounted in another.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import Request, Response

from pdcoord.core.model import Model
from pdcoord.front.intake import client_request_id, model_unknown
from pdcoord.front.ports import Coordination, Observer
from pdcoord.gateway import schemas
from pdcoord.gateway.pages import (
    PagesApp,
    add_error_handlers,
    json_response,
    refusal_response,
    with_request_id,
)
from pdcoord.gateway.relay import Relay
from pdcoord.protocol.errors import Refusal, RefusedError
from pdcoord.protocol.openai import APIS, Api
from pdcoord.wire.asgi import Receive, Scope, Send

METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ModelCard(msgspec.Struct, kw_only=True):
    """One model as GET /v1/models lists it.

    Attributes:
        root: the name that engines serve.
        parent: the model of a LoRA adapter.
    """

    id: str
    object: str = "model"
    created: int
    owned_by: str = "pdcoord"
    root: str
    parent: str | None = None


class ModelList(msgspec.Struct, kw_only=True):
    """The answer of GET /v1/models."""

    object: str = "list"
    data: list[ModelCard]


class RelayResponse(Response):
    """A response that serves the call itself when the server runs it."""

    def __init__(self, relay: Relay, api: Api) -> None:
        super().__init__()
        self._relay = relay
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._relay.serve(self._api, scope, receive, send)


class GatewayApp(PagesApp):
    """The gateway's public listener.

    Args:
        created_unix_s: the time that model cards give as theirs.
        metrics: this process's metrics in Prometheus' text format.
    """

    def __init__(self, relay: Relay, *, metrics: Callable[[], bytes], created_unix_s: int) -> None:
        super().__init__(
            title="pdcoord",
            summary="One OpenAI endpoint over a fleet of prefill and decode pools.",
            version=version("pdcoord"),
            docs_url=None,  # Both pages load scripts from other hosts.
            redoc_url=None,
            redirect_slashes=False,
        )
        self._relay = relay
        self._coordination: Coordination = relay.coordination
        self._observer: Observer = relay.observer
        self._metrics = metrics
        self._created_unix_s = created_unix_s
        self._add_calls()
        self._add_pages()
        add_error_handlers(self, relay.observer.refused)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        if scope["method"] == "POST":
            api = APIS.get(scope["path"])
            if api is not None:
                await self._relay.serve(api, scope, receive, send)
                return
        request_id = client_request_id(scope["headers"]) or self._relay.new_id()
        try:
            await super().__call__(scope, receive, with_request_id(send, request_id))
        except Exception as error:  # noqa: BLE001  # The handler below has answered; the log has the rest.
            self._observer.crashed(error, request_id)

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, with the error body under the name that the routes refer to."""
        document = super().openapi()
        document.setdefault("components", {}).setdefault("schemas", {})["Error"] = schemas.ERROR
        return document

    def _add_calls(self) -> None:
        for api in APIS.values():
            self.add_api_route(
                api.path,
                self._call_endpoint(api),
                methods=["POST"],
                summary=schemas.summary(api),
                operation_id=api.path.strip("/").replace("/", "_"),
                response_class=Response,
                responses=schemas.answers(api),
                openapi_extra={"requestBody": schemas.request_body(api)},
                tags=["api"],
            )

    def _call_endpoint(self, api: Api) -> Callable[..., Any]:
        async def serve_call() -> RelayResponse:
            return RelayResponse(self._relay, api)

        return serve_call

    def _add_pages(self) -> None:
        pages: list[tuple[str, Callable[..., Any], str, dict[int | str, schemas.Schema]]] = [
            (
                "/v1/models",
                self._list_models,
                "Models",
                schemas.json_answer("All models that the key is for.", schemas.MODELS) | schemas.errors(),
            ),
            (
                "/v1/models/{model_id:path}",
                self._show_model,
                "One model",
                schemas.json_answer("The model.", schemas.MODEL) | schemas.errors(),
            ),
            (
                "/livez",
                self._livez,
                "Whether the process runs",
                schemas.json_answer("It does.", schemas.STATUS),
            ),
            (
                "/readyz",
                self._readyz,
                "Whether traffic should be sent here",
                schemas.json_answer("It should.", schemas.STATUS) | schemas.errors(),
            ),
            ("/metrics", self._show_metrics, "Metrics", schemas.text_answer("Prometheus text format 0.0.4.")),
        ]
        for path, endpoint, summary, responses in pages:
            self.add_api_route(
                path,
                endpoint,
                methods=["GET"],
                summary=summary,
                response_class=Response,
                responses=responses,
                tags=["api" if path.startswith("/v1/") else "operation"],
            )

    async def _list_models(self, request: Request) -> Response:
        try:
            visa = self._relay.door.gate.identify(request.headers.raw)
        except RefusedError as error:
            return self._refuse(error.refusal)
        names = [(name, model) for model in self._coordination.models() for name in model.names]
        cards = [self._card(name, model) for name, model in names if visa.may_use(model, name)]
        return json_response(ModelList(data=cards))

    async def _show_model(self, model_id: str, request: Request) -> Response:
        model = self._coordination.model(model_id)
        try:
            visa = self._relay.door.gate.identify(request.headers.raw)
            if model is not None:
                visa.check_model(model, model_id)
        except RefusedError as error:
            return self._refuse(error.refusal)
        if model is None:
            return self._refuse(model_unknown(model_id))
        return json_response(self._card(model_id, model))

    def _refuse(self, refusal: Refusal) -> Response:
        self._observer.refused(refusal.reason)
        return refusal_response(refusal)

    async def _livez(self) -> Response:
        return json_response({"status": "ok"})

    async def _readyz(self) -> Response:
        refusal = self._coordination.unready()
        return json_response({"status": "ready"}) if refusal is None else refusal_response(refusal)

    async def _show_metrics(self) -> Response:
        return Response(self._metrics(), headers={"content-type": METRICS_CONTENT_TYPE})

    def _card(self, name: str, model: Model) -> ModelCard:
        adapter = model.adapter_of(name)
        parent = model.name if adapter else None
        return ModelCard(id=name, created=self._created_unix_s, root=adapter or model.name, parent=parent)
