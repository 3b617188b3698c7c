"""The HTTP application: its routes, and what surrounds each of them.

In: a running engine client. Out: `build_app(...)`, an ASGI application as a value; importing this file changes nothing.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perft_serve.engine.params import RequestError
from perft_serve.server.chat import ChatEndpoint
from perft_serve.server.client import EngineBusyError, EngineClient, EngineDeadError
from perft_serve.server.completions import CompletionEndpoint
from perft_serve.server.config import ServerConfig
from perft_serve.server.errors import ApiError, to_api_error
from perft_serve.server.metrics import CONTENT_TYPE, Metrics
from perft_serve.server.protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorReply,
    ModelCard,
    ModelList,
)
from perft_serve.server.service import ModelNames, Service, new_request_id
from perft_serve.text import TextTokenizer

# What is answered with an envelope where it was raised; anything else is caught by `Surroundings`.
_EXPECTED_ERRORS = (ApiError, RequestError, HTTPException, EngineBusyError, EngineDeadError)


def build_app(
    client: EngineClient,
    tokenizer: TextTokenizer | None,
    metrics: Metrics,
    config: ServerConfig,
    *,
    base_name: str,
    version: str,
) -> FastAPI:
    """The application.

    Args:
        client: started already; the caller closes it.
        tokenizer: the base's, if it has one.
        base_name: the base's name in requests.
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
    for path, endpoint, method, request, reply in (
        ("/v1/completions", CompletionEndpoint(service).create, "POST", CompletionRequest, Completion),
        ("/v1/chat/completions", ChatEndpoint(service).create, "POST", ChatRequest, ChatCompletion),
        ("/v1/models", status.list_models, "GET", None, ModelList),
        ("/v1/models/{model:path}", status.get_model, "GET", None, ModelCard),
        ("/health", status.health, "GET", None, None),
        ("/metrics", status.metrics, "GET", None, None),
        ("/version", status.version, "GET", None, None),
    ):
        app.add_api_route(
            path,
            endpoint,
            methods=[method],
            response_model=None,
            responses={200: {"model": reply} if reply else {}, "default": {"model": ErrorReply}},
            openapi_extra=None if request is None else _body_of(request.__name__),
        )
    for error in _EXPECTED_ERRORS:
        app.add_exception_handler(error, _reply_to)
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

    async def list_models(self) -> Response:
        """The base and the adapters."""
        return Response(self._models.list().to_json(), media_type="application/json")

    async def get_model(self, model: str) -> Response:
        """The base or an adapter."""
        return Response(self._models.card(model).to_json(), media_type="application/json")

    async def health(self) -> Response:
        """200 while the engine works, 503 once it has failed."""
        if self._client.error is not None:
            raise EngineDeadError(f"the engine has stopped: {self._client.error}")
        return JSONResponse({})

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


def _body_of(schema: str) -> dict[str, Any]:
    """The OpenAPI entry for a body that the endpoint parses itself."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": True, "content": content}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, with the bodies that FastAPI does not parse."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, summary=app.summary, version=app.version, routes=app.routes)
        _, bodies = models_json_schema(
            [(CompletionRequest, "validation"), (ChatRequest, "validation")],
            ref_template="#/components/schemas/{model}",
        )
        schema["components"]["schemas"].update(bodies["$defs"])
        app.openapi_schema = schema
    return app.openapi_schema
