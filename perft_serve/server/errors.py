"""What can go wrong with a request, as clients see it: the OpenAI error envelope and its HTTP status.

In: exceptions. Out: `ApiError`s, which are the only errors that turn into replies.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from perft.errors import AdapterError
from perft_serve.engine.params import RequestError
from perft_serve.server.client import EngineBusyError, EngineDeadError, SlowReaderError, TenantBusyError

logger = logging.getLogger(__name__)

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    431: "RequestHeadersTooLargeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """An error as the client will see it.

    Args:
        status: HTTP status; also the envelope's `code`.
        message: what is wrong and what to do.
        param: the request's field at fault.
        headers: further headers of the reply.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = headers

    def envelope(self) -> dict[str, Any]:
        """The reply's body."""
        message = _presentable(self.message, at_most=2000)
        param = None if self.param is None else _presentable(self.param, at_most=200)
        kind = _TYPES.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        return {"error": {"message": message, "type": kind, "param": param, "code": self.status}}

    def response(self) -> JSONResponse:
        """The reply."""
        return JSONResponse(self.envelope(), status_code=self.status, headers=self.headers)


def _presentable(text: str, *, at_most: int) -> str:
    """`text`, which may quote anything that the client sent: megabytes, and lone surrogates, which have no UTF-8."""
    shown = text if len(text) <= at_most else text[:at_most] + "..."
    return shown.encode("utf-8", "backslashreplace").decode()


def to_api_error(error: Exception) -> ApiError:
    """The reply to any exception; what is not the client's doing, nor a known state of the server, is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AdapterError):
        # Not a 5xx, though the operator may have to mend it: balancers take those as the whole server's failure
        return ApiError(422, str(error), param="model")
    if isinstance(error, RequestError):
        if error.param == "model":  # the adapter was there when the request came, and has gone since
            return ApiError(404, str(error), param=error.param)
        return ApiError(400, str(error), param=error.param)
    if isinstance(error, HTTPException):
        reason = HTTPStatus(error.status_code).phrase if error.detail is None else error.detail
        return ApiError(error.status_code, str(reason), headers=dict(error.headers) if error.headers else None)
    if isinstance(error, EngineBusyError):
        return ApiError(503, str(error), headers={"retry-after": "1"})
    if isinstance(error, TenantBusyError):
        return ApiError(429, str(error), headers={"retry-after": "1"})
    if isinstance(error, EngineDeadError):
        again = None if error.retry_after is None else {"retry-after": str(error.retry_after)}
        return ApiError(503, str(error), headers=again)
    if isinstance(error, SlowReaderError):
        return ApiError(503, str(error))
    logger.error("internal error", exc_info=error)
    return ApiError(500, "internal error: the server's log has the details")
