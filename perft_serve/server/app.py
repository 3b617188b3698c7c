"""The HTTP application: its routes, and what surrounds each of them.

In: a running engine client. Out: `build_app(...)`, an ASGI application as a value; importing this file changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perft.errors import AdapterError
from perft_serve.adapters.sources import SourcePolicy
from perft_serve.engine.params import RequestError
from perft_serve.server.adapters import AdapterEndpoints
from perft_serve.server.chat import ChatEndpoint
from perft_serve.server.client import EngineBusyError, EngineClient, EngineDeadError
from perft_serve.server.completions import CompletionEndpoint
from perft_serve.server.config import ServerConfig
from perft_serve.server.errors import ApiError, to_api_error
from perft_serve.server.metrics import CONTENT_TYPE, Metrics
from perft_serve.server.models import ModelNames
from perft_serve.server.protocol import (
    AdapterCard,
    AdapterList,
    AdapterRequest,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    DeletedAdapter,
    ErrorReply,
    LoadLoraRequest,
    ModelCard,
    ModelList,
    UnloadLoraRequest,
    refusal,
)
from perft_serve.server.service import Service, new_request_id
from perft_serve.server.sse import CLIENT_CLOSED_REQUEST
from perft_serve.text import TextTokenizer

# What is answered with an envelope where it was raised; anything else is caught by `Surroundings`.
_EXPECTED_ERRORS = (ApiError, AdapterError, RequestError, HTTPException, EngineBusyError, EngineDeadError)

_BODIES = (CompletionRequest, ChatRequest, AdapterRequest, LoadLoraRequest, UnloadLoraRequest)
_REPLIES = (Completion, ChatCompletion, ErrorReply)
_STRUCT_REPLIES = (ModelCard, ModelList, AdapterCard, AdapterList, DeletedAdapter)
_SCHEMA = "#/components/schemas/{name}"


def build_app(
    client: EngineClient,
    tokenizer: TextTokenizer | None,
    metrics: Metrics,
    config: ServerConfig,
    *,
    base_name: str,
    sources: SourcePolicy,
    version: str,
) -> FastAPI:
    """The application.

    Args:
        client: started already; the caller closes it.
        tokenizer: the base's, if it has one.
        base_name: the base's name in requests.
        sources: where clients may have adapters loaded from.
        version: of this project.

    Raises:
        ValueError: an adapter has the base's name.
    """
    models = ModelNames(base_name, client)
    service = Service(client, tokenizer, models, max_body_size=config.max_body_size)
    status = _Status(client, models, metrics, version)
    app = FastAPI(
        title="PERFT Serve",
        summary="One Mixture-of-Experts base model and its PERFT adapters behind the OpenAI API.",
        version=version,
        redirect_slashes=False,
    )
    adapters = AdapterEndpoints(service, sources)
    for path, endpoint, method, request, reply in (
        ("/v1/completions", CompletionEndpoint(service).create, "POST", CompletionRequest, Completion),
        ("/v1/chat/completions", ChatEndpoint(service).create, "POST", ChatRequest, ChatCompletion),
        ("/v1/models", status.list_models, "GET", None, ModelList),
        ("/v1/models/{model:path}", status.get_model, "GET", None, ModelCard),
        ("/v1/adapters", adapters.create, "POST", AdapterRequest, AdapterCard),
        ("/v1/adapters", adapters.list, "GET", None, AdapterList),
        ("/v1/adapters/{name:path}", adapters.get, "GET", None, AdapterCard),
        ("/v1/adapters/{name:path}", adapters.delete, "DELETE", None, DeletedAdapter),
        ("/v1/load_lora_adapter", adapters.load_lora, "POST", LoadLoraRequest, None),
        ("/v1/unload_lora_adapter", adapters.unload_lora, "POST", UnloadLoraRequest, None),
        ("/health", status.health, "GET", None, None),
        ("/ready", status.ready, "GET", None, None),
        ("/metrics", status.metrics, "GET", None, None),
        ("/version", status.version, "GET", None, None),
    ):
        app.add_api_route(
            path,
            endpoint,
            methods=[method],
            response_model=None,
            responses={200: _content(reply), "default": _content(ErrorReply)},
            openapi_extra=None if request is None else {"requestBody": {"required": True, **_content(request)}},
        )
    for error in _EXPECTED_ERRORS:
        app.add_exception_handler(error, _reply_to)
    app.add_exception_handler(RequestValidationError, _reply_to_bad_query)
    app.add_exception_handler(ClientDisconnect, _reply_to_nobody)
    app.add_middleware(Surroundings, metrics=metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    return app


class _Status:
    """The endpoints that only tell."""

    def __init__(self, client: EngineClient, models: ModelNames, metrics: Metrics, version: str) -> None:
        self._client = client
        self._models = models
        self._metrics = metrics
        self._version = version

    async def list_models(
        self, limit: Annotated[int | None, Query(ge=1)] = None, after: Annotated[str | None, Query()] = None
    ) -> Response:
        """The base and the adapters: all, or at most `limit` of those that follow `after`."""
        return Response(msgspec.json.encode(self._models.page(after, limit)), media_type="application/json")

    async def get_model(self, model: str) -> Response:
        """The base or an adapter."""
        return Response(msgspec.json.encode(self._models.card(model)), media_type="application/json")

    async def health(self) -> Response:
        """200 while the server can answer or will be able to again, 503 once its engine is given up: restart the server."""
        return self._engine(503 if self._client.engine_state == "dead" else 200)

    async def ready(self) -> Response:
        """200 while requests are answered, 503 while the engine is down: send them elsewhere."""
        return self._engine(200 if self._client.engine_state == "ready" else 503)

    def _engine(self, status: int) -> Response:
        client = self._client
        again = client.retry_after if status == 503 else None
        return JSONResponse(
            {"engine": client.engine_state, "restarts": client.num_restarts, "error": client.error},
            status_code=status,
            headers=None if again is None else {"retry-after": str(again)},
        )

    async def metrics(self) -> Response:
        """Metrics for Prometheus."""
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def version(self) -> Response:
        """The server's version."""
        return JSONResponse({"version": self._version})


class Surroundings:
    """ASGI middleware: an id for each request, a count of it, and a reply whatever happens.

    The id is `request.state.request_id`, the header `x-request-id`, and part of a completion's `id`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # it becomes a reply, and is logged there
            response = to_api_error(error).response()
            if status:  # too late for another status: the reply breaks off
                raise
            await response(scope, receive, send_with_id)
        finally:
            route = scope.get("route")
            self._metrics.count_http(getattr(route, "path", "<unknown>"), status)


async def _reply_to(request: Request, error: Exception) -> Response:
    return to_api_error(error).response()


async def _reply_to_nobody(request: Request, error: Exception) -> Response:
    """The client has hung up while it sent the body: nothing is wrong here, and only the metrics will see this."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _reply_to_bad_query(request: Request, error: Exception) -> Response:
    """The reply to a query that FastAPI has parsed and refused; bodies are parsed by the endpoints."""
    assert isinstance(error, RequestValidationError)
    errors: list[Any] = [{**each, "loc": each["loc"][1:]} for each in error.errors()]  # without "query"
    return refusal(errors).response()


def _content(kind: type | None) -> dict[str, Any]:
    """The OpenAPI entry for a body that the endpoint parses itself, or a reply that it writes itself."""
    if kind is None:
        return {"description": "OK"}
    reference = {"$ref": _SCHEMA.format(name=kind.__name__)}
    return {"description": kind.__name__, "content": {"application/json": {"schema": reference}}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, with the bodies and replies that FastAPI neither parses nor writes."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, summary=app.summary, version=app.version, routes=app.routes)
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        template = _SCHEMA.format(name="{model}")
        _, bodies = models_json_schema([(kind, "validation") for kind in _BODIES], ref_template=template)
        _, replies = models_json_schema([(kind, "serialization") for kind in _REPLIES], ref_template=template)
        _, structs = msgspec.json.schema_components(_STRUCT_REPLIES, ref_template=_SCHEMA)
        components.update({**bodies["$defs"], **replies["$defs"], **structs})
        app.openapi_schema = schema
    return app.openapi_schema
