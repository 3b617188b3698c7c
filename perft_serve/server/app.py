"""The HTTP application: its routes, and what surrounds each of them.

In: a running engine client. Out: `build_app(...)`, an ASGI application as a value; importing this file changes nothing.
"""

from __future__ import annotations

import re
import time
from typing import Annotated, Any

import msgspec
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perft.errors import AdapterError
from perft_serve.adapters.sources import SourcePolicy
from perft_serve.engine import logs
from perft_serve.engine.params import RequestError
from perft_serve.server import openapi
from perft_serve.server.adapters import AdapterEndpoints
from perft_serve.server.auth import Gate
from perft_serve.server.chat import ChatEndpoint
from perft_serve.server.client import EngineBusyError, EngineClient, EngineDeadError, TenantBusyError
from perft_serve.server.completions import CompletionEndpoint
from perft_serve.server.config import ServerConfig
from perft_serve.server.errors import ApiError, to_api_error
from perft_serve.server.exchange import Exchange
from perft_serve.server.keys import OPERATOR, AdapterAccess
from perft_serve.server.metrics import CONTENT_TYPE, UNKNOWN, Metrics
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
    DetokenizeRequest,
    ErrorReply,
    LoadLoraRequest,
    ModelCard,
    ModelList,
    Text,
    TokenizeRequest,
    Tokens,
    UnloadLoraRequest,
    refusal,
)
from perft_serve.server.service import Service, new_request_id
from perft_serve.server.sse import CLIENT_CLOSED_REQUEST
from perft_serve.server.tokenization import TokenizationEndpoints
from perft_serve.server.tracing import OPERATIONS, Tracing
from perft_serve.text import TextTokenizer

# What is answered with an envelope where it was raised; anything else is caught by `Surroundings`.
_EXPECTED_ERRORS = (
    ApiError,
    AdapterError,
    RequestError,
    HTTPException,
    EngineBusyError,
    TenantBusyError,
    EngineDeadError,
)

# What clients may call a request by themselves: it goes back to them, and is the name of nothing here.
_CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def build_app(
    client: EngineClient,
    tokenizer: TextTokenizer | None,
    metrics: Metrics,
    config: ServerConfig,
    *,
    base_name: str,
    sources: SourcePolicy,
    version: str,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application.

    Args:
        client: started already; the caller closes it.
        tokenizer: the base's, if it has one.
        base_name: the base's name in requests.
        sources: where clients may have adapters loaded from.
        version: of this project.
        tracing: where requests to generate leave spans; the caller closes it.

    Raises:
        ValueError: an adapter has the base's name.
    """
    gate = Gate(config.api_keys)
    models = ModelNames(base_name, client, AdapterAccess(config.tenant_adapters, gate.names))
    service = Service(client, tokenizer, models, config)
    app = FastAPI(
        title="PERFT Serve",
        summary="One Mixture-of-Experts base model and its PERFT adapters behind the OpenAI API.",
        version=version,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's pages come from another server
        redoc_url=None,
    )
    status = _Status(client, models, metrics, version)
    adapters, tokens = AdapterEndpoints(service, sources), TokenizationEndpoints(service)
    # Whom a route is for: without keys, everybody
    everybody, tenants, operator = None, gate.tenant, gate.operator
    kinds: list[type] = []
    for path, endpoint, method, guard, request, reply in (
        ("/v1/completions", CompletionEndpoint(service).create, "POST", tenants, CompletionRequest, Completion),
        ("/v1/chat/completions", ChatEndpoint(service).create, "POST", tenants, ChatRequest, ChatCompletion),
        ("/v1/models", status.list_models, "GET", tenants, None, ModelList),
        ("/v1/models/{model:path}", status.get_model, "GET", tenants, None, ModelCard),
        ("/tokenize", tokens.tokenize, "POST", tenants, TokenizeRequest, Tokens),
        ("/detokenize", tokens.detokenize, "POST", tenants, DetokenizeRequest, Text),
        ("/tokenizer_info", tokens.info, "GET", tenants, None, None),
        ("/v1/adapters", adapters.create, "POST", operator, AdapterRequest, AdapterCard),
        ("/v1/adapters", adapters.list, "GET", operator, None, AdapterList),
        ("/v1/adapters/{name:path}", adapters.get, "GET", operator, None, AdapterCard),
        ("/v1/adapters/{name:path}", adapters.delete, "DELETE", operator, None, DeletedAdapter),
        ("/v1/load_lora_adapter", adapters.load_lora, "POST", operator, LoadLoraRequest, "text/plain"),
        ("/v1/unload_lora_adapter", adapters.unload_lora, "POST", operator, UnloadLoraRequest, "text/plain"),
        ("/metrics", status.metrics, "GET", operator, None, "text/plain"),  # its labels name adapters
        ("/health", status.health, "GET", everybody, None, None),
        ("/ping", status.health, "GET", everybody, None, None),
        ("/ready", status.ready, "GET", everybody, None, None),
        ("/version", status.version, "GET", everybody, None, None),
    ):
        guards = [] if guard is None else [Depends(guard)]
        responses: dict[int | str, dict[str, Any]] = {
            200: openapi.content(reply),
            "default": openapi.content(ErrorReply),
        }
        if guard is not None:
            responses[401] = openapi.content(ErrorReply)
        app.add_api_route(
            path,
            endpoint,
            methods=[method],
            dependencies=guards,
            response_model=None,
            response_class=PlainTextResponse if isinstance(reply, str) else JSONResponse,
            responses=responses,
            openapi_extra=None if request is None else {"requestBody": {"required": True, **openapi.content(request)}},
        )
        if method == "GET":  # uvicorn leaves the body out
            app.add_api_route(
                path, endpoint, methods=["HEAD"], dependencies=guards, response_model=None, include_in_schema=False
            )
        kinds += [kind for kind in (request, reply) if isinstance(kind, type)]
    app.add_route("/docs", _docs, methods=["GET"], include_in_schema=False)
    for error in _EXPECTED_ERRORS:
        app.add_exception_handler(error, _reply_to)
    app.add_exception_handler(RequestValidationError, _reply_to_bad_query)
    app.add_exception_handler(ClientDisconnect, _reply_to_nobody)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-client-request-id", "retry-after"],
        )
    app.add_middleware(Surroundings, metrics=metrics, access_log=config.access_log == "on", tracing=tracing)

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = openapi.describe(app, kinds, base_name=base_name, has_keys=not gate.is_open)
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    return app


class ModelQuery(BaseModel):
    """What `GET /v1/models` may be asked."""

    model_config = ConfigDict(extra="forbid")

    limit: int | None = Field(default=None, ge=1, description="So many at most; default: all.")
    after: str | None = Field(default=None, description="The models whose names follow this one: the last `last_id`.")


class _Status:
    """The endpoints that only tell."""

    def __init__(self, client: EngineClient, models: ModelNames, metrics: Metrics, version: str) -> None:
        self._client = client
        self._models = models
        self._metrics = metrics
        self._version = version

    async def list_models(self, request: Request, query: Annotated[ModelQuery, Query()]) -> Response:
        """The base and the adapters that can be used: all, or at most `limit` of those that follow `after`."""
        page = self._models.page(query.after, query.limit, request.state.tenant)
        return Response(msgspec.json.encode(page), media_type="application/json")

    async def get_model(self, request: Request, model: str) -> Response:
        """The base or an adapter."""
        card = self._models.card(model, request.state.tenant)
        return Response(msgspec.json.encode(card), media_type="application/json")

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
    """ASGI middleware: an id for each request, a count of it, a line in the log, and a reply whatever happens.

    The id is `request.state.request_id`, the header `x-request-id`, and part of a completion's `id`. It is always ours: what a
    client calls its request (`x-client-request-id` or `x-request-id`) could be anybody's. If that is short and plain, it is
    `request.state.client_request_id`, and goes back as `x-client-request-id`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, *, access_log: bool, tracing: Tracing | None) -> None:
        self._app = app
        self._metrics = metrics
        self._access_log = access_log
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_request_id()
        exchange = Exchange(request_id)
        given = Headers(scope=scope)
        client_id = given.get("x-client-request-id") or given.get("x-request-id") or ""
        if not _CLIENT_REQUEST_ID.fullmatch(client_id):
            client_id = ""
        scope.setdefault("state", {}).update(
            request_id=request_id, client_request_id=client_id, tenant=OPERATOR, exchange=exchange
        )
        current = logs.request_id.set(request_id)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if client_id:
                    headers["x-client-request-id"] = client_id
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
            handler = getattr(route, "path", UNKNOWN)
            seconds = time.monotonic() - exchange.began
            self._metrics.count_http(handler, scope["method"], status, seconds)
            if self._access_log:
                exchange.log(scope, status, seconds)
            if self._tracing is not None and handler in OPERATIONS:
                self._tracing.record(scope, exchange, handler, status, seconds)
            logs.request_id.reset(current)


async def _reply_to(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 405:
        return _reply_to_wrong_method(request)
    return to_api_error(error).response()


def _reply_to_wrong_method(request: Request) -> Response:
    """What may be done with this path: the answer to OPTIONS, and a hint for anything else. (Starlette names one route's.)"""
    methods = {"OPTIONS"}
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= set(route.methods)
    headers = {"allow": ", ".join(sorted(methods))}
    if request.method == "OPTIONS":
        return Response(status_code=204, headers=headers)
    message = f"{request.method} is not for {request.url.path}, which takes {headers['allow']}"
    return ApiError(405, message, headers=headers).response()


async def _docs(request: Request) -> Response:
    return HTMLResponse(openapi.page(request.app.openapi()))


async def _reply_to_nobody(request: Request, error: Exception) -> Response:
    """The client has hung up while it sent the body: nothing is wrong here, and only the metrics will see this."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _reply_to_bad_query(request: Request, error: Exception) -> Response:
    """The reply to a query that FastAPI has parsed and refused; bodies are parsed by the endpoints."""
    assert isinstance(error, RequestValidationError)
    errors: list[Any] = [{**each, "loc": each["loc"][1:]} for each in error.errors()]  # without "query"
    return refusal(errors).response()
