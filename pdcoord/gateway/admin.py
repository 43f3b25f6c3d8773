"""The admin listener: fleet, paths, policy and decisions as JSON, for operators and `pdcoord explain`.

It shows addresses and loads, so it listens on loopback unless told otherwise, and never shows a prompt.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query, Response

from pdcoord.core.pathview import PATHS_SHOWN_MAX
from pdcoord.gateway import schemas
from pdcoord.gateway.decisionviews import DecisionsView, DecisionView
from pdcoord.gateway.pages import PagesApp, add_error_handlers, json_response, refusal_response
from pdcoord.gateway.views import FleetView, PathsView, PolicyView
from pdcoord.protocol.errors import Refusal, RefuseReason

DECISIONS_MAX = 65_536


class AdminState(Protocol):
    """What the admin listener shows; the runtime implements it."""

    def fleet_view(self) -> FleetView: ...

    def paths_view(self, limit: int) -> PathsView: ...

    def policy_view(self) -> PolicyView: ...

    def decisions_view(self, limit: int) -> DecisionsView: ...

    def decision_view(self, request_id: str) -> DecisionView | None: ...


def make_admin_app(state: AdminState) -> FastAPI:
    """The admin listener's ASGI app."""
    app = PagesApp(
        title="pdcoord admin",
        summary="What the coordinator knows and why it decided so.",
        version=version("pdcoord"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )

    async def fleet() -> Response:
        return json_response(state.fleet_view())

    async def paths(limit: Annotated[int, Query(ge=1, le=PATHS_SHOWN_MAX)] = 1_000) -> Response:
        return json_response(state.paths_view(limit))

    async def policy() -> Response:
        return json_response(state.policy_view())

    async def decisions(limit: Annotated[int, Query(ge=1, le=DECISIONS_MAX)] = 100) -> Response:
        return json_response(state.decisions_view(limit))

    async def decision(request_id: str) -> Response:
        found = state.decision_view(request_id)
        if found is None:
            message = (
                f"No decision is kept for '{request_id[:128]}'; GET /decisions lists the latest. "
                "Only calls that reached the core have one, and only the last ones are kept."
            )
            return refusal_response(Refusal(RefuseReason.PATH_UNKNOWN, message))
        return json_response(found)

    pages: list[tuple[str, Callable[..., Any], str]] = [
        ("/fleet", fleet, "Every endpoint with its last signals"),
        ("/paths", paths, "Every path with its verdict, breaker and last probe"),
        ("/policy", policy, "The policy in force, and why a newer one is not"),
        ("/decisions", decisions, "The latest decisions"),
        ("/decisions/{request_id:path}", decision, "One decision with the full plan"),
    ]
    for path, endpoint, summary in pages:
        app.add_api_route(
            path,
            endpoint,
            methods=["GET"],
            summary=summary,
            response_class=Response,
            responses=schemas.json_answer("As asked.", {"type": "object"}) | schemas.errors(schemas.ERROR),
        )
    add_error_handlers(app, lambda _reason: None)
    return app
