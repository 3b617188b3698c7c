"""The routes for adapters: register, warm, reload, list, delete; and the same under vLLM's names.

In: HTTP requests. Out: `AdapterCard`s. Names belong to the catalogue, memory to the engine; this file keeps the order between
the two: a version is in memory before its name is given to it, and its name is gone before it is taken from memory. What has
begun is finished, whether its client waits or not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Annotated, Any
from weakref import WeakValueDictionary

import msgspec
from fastapi import Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import PlainTextResponse, Response

from perft.errors import AdapterError
from perft_serve.adapters.catalog import AdapterRef, DeletedAdapterError, UnknownAdapterError, check_name
from perft_serve.adapters.sources import SourcePolicy
from perft_serve.adapters.status import AdapterState
from perft_serve.server.client import EngineDeadError
from perft_serve.server.errors import ApiError
from perft_serve.server.protocol import (
    AdapterCard,
    AdapterList,
    AdapterRequest,
    DeletedAdapter,
    LoadLoraRequest,
    UnloadLoraRequest,
)
from perft_serve.server.service import Service

logger = logging.getLogger(__name__)

MAX_PAGE = 1000


class ListQuery(BaseModel):
    """What `GET /v1/adapters` may be asked."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=100, ge=1, le=MAX_PAGE, description="So many at most.")
    after: str | None = Field(default=None, description="The adapters whose names follow this one: the last `last_id`.")
    state: AdapterState | None = Field(default=None, description="Only those in this state.")


class DeleteQuery(BaseModel):
    """How `DELETE /v1/adapters/{name}` is to treat requests in flight."""

    model_config = ConfigDict(extra="forbid")

    force: bool = Field(default=False, description="End its requests with an error; otherwise they are waited for.")


class AdapterEndpoints:
    """Answers requests about adapters.

    Args:
        sources: which sources a client may name.
    """

    def __init__(self, service: Service, sources: SourcePolicy) -> None:
        self._service = service
        self._client = service.client
        self._catalog = service.client.catalog
        self._models = service.models
        self._sources = sources
        # Of the names that are being registered now: whoever works on a name holds its lock
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._work: set[asyncio.Task[Any]] = set()
        self._deleting: dict[str, int] = {}  # the last version of names whose deletion waits for requests

    async def create(self, request: Request) -> Response:
        """Registers, loads, reloads or pins an adapter."""
        body = await self._service.parse(AdapterRequest, await self._service.read_json(request))
        card, is_new = await self._finish(self._create(body))
        return _json(card, 201 if is_new else 200)

    async def list(self, query: Annotated[ListQuery, Query()]) -> Response:
        """The adapters, by name."""
        cards: list[AdapterCard] = []
        # One more than is shown, to know whether there are more
        num_wanted = query.limit + 1
        for ref in self._models.adapters_after(query.after, num_wanted if query.state is None else None):
            card = self._card(ref.name)
            if query.state in (None, card.state):
                cards.append(card)
                if len(cards) == num_wanted:
                    break
        shown = cards[: query.limit]
        page = AdapterList(
            data=shown,
            first_id=shown[0].id if shown else None,
            last_id=shown[-1].id if shown else None,
            has_more=len(cards) > len(shown),
        )
        return _json(page)

    async def get(self, name: str) -> Response:
        """One adapter."""
        return _json(self._card(name))

    async def delete(self, name: str, query: Annotated[DeleteQuery, Query()]) -> Response:
        """Deletes an adapter; replies when its memory is free."""
        await self._delete(name, force=query.force)
        return _json(DeletedAdapter(id=name))

    async def load_lora(self, request: Request) -> Response:
        """vLLM's way to register and load an adapter."""
        body = await self._service.parse(LoadLoraRequest, await self._service.read_json(request))
        await self._finish(self._load_lora(body))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload_lora(self, request: Request) -> Response:
        """vLLM's way to delete an adapter; its requests are waited for."""
        body = await self._service.parse(UnloadLoraRequest, await self._service.read_json(request))
        await self._delete(body.lora_name, force=False, param="lora_name")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def _create(self, body: AdapterRequest) -> tuple[AdapterCard, bool]:
        """Does what a body asks; gives the adapter's card, and whether the name is new."""
        name = body.name
        async with self._lock(name):
            is_new = False
            if body.source is None:
                ref = self._resolve(name, param="name")
                if body.load or (body.pin is False and self._is_pinned(name)):
                    await self._warm(ref, pin=body.pin, param="name")
            else:
                self._check_name(name, param="name")
                self._check_source(body.source, param="source")
                is_new = name not in self._catalog
                if body.load:
                    await self._load(name, body.source, pin=body.pin, param="source")
                elif body.pin is None and self._is_pinned(name):
                    raise ApiError(
                        400,
                        f"adapter {name!r} is pinned, and what is pinned is in memory: leave out load, or set pin to false",
                        param="load",
                    )
                else:
                    self._retire_older(self._catalog.register(name, body.source))
            return self._card(name), is_new

    async def _load_lora(self, body: LoadLoraRequest) -> None:
        name = body.lora_name
        async with self._lock(name):
            self._check_name(name, param="lora_name")
            if not body.load_inplace and name in self._catalog:
                raise ApiError(
                    400,
                    f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                    "'load_inplace' to True.",
                    param="lora_name",
                )
            self._check_source(body.lora_path, param="lora_path")
            try:
                await self._load(name, body.lora_path, pin=None, param="lora_path")
            except ApiError as error:
                if error.status != 422:
                    raise
                # vLLM's status for what cannot be loaded
                raise ApiError(400, error.message, param=error.param) from error

    async def _load(self, name: str, source: str, *, pin: bool | None, param: str) -> None:
        """Brings a new version into memory, then gives the name to it; if it fails, the name is as it was.

        Args:
            pin: `None`: if the version before it is. Since there need not be room for both, that one gives its pin back first.
        """
        hands_over = pin is None and self._is_pinned(name)
        ref = self._catalog.prepare(name, source)
        try:
            await self._warm(ref, pin=pin, param=param)
            self._catalog.commit(ref)
        except DeletedAdapterError as error:
            raise _deleted(error) from error
        finally:
            self._catalog.abandon(ref)
        logger.info("adapter %r is now version %d", name, ref.version)
        self._retire_older(ref)
        if hands_over:
            try:
                await self._warm(ref, pin=True, param="pin")
            except ApiError as error:
                message = f"version {ref.version} is in use, but no longer pinned: {error.message}"
                raise ApiError(error.status, message, param=error.param) from error

    def _is_pinned(self, name: str) -> bool:
        return name in self._catalog and self._client.status(name).pinned

    def _retire_older(self, ref: AdapterRef) -> None:
        """Lets the versions before this one go when their requests have ended, which nobody waits for."""
        if ref.version > 1:
            self._client.let_go(ref.name, ref.version - 1)

    async def _delete(self, name: str, *, force: bool, param: str | None = None) -> None:
        try:
            if name == self._models.base_name:
                raise UnknownAdapterError
            self._catalog.remove(name)
            # With what is being loaded for the name
            version = self._catalog.last_version(name)
        except UnknownAdapterError as error:
            if not (force and name in self._deleting):
                raise _unknown(name, param=param) from error
            version = self._deleting[name]
        logger.info("adapter %r is being deleted", name)
        await self._finish(self._retire(name, version, force=force))

    async def _retire(self, name: str, version: int, *, force: bool) -> None:
        self._deleting[name] = version
        try:
            await self._client.retire_adapter(name, version, force=force)
        except EngineDeadError:  # and the adapter with it
            logger.info("adapter %r has gone with the engine", name)
        finally:
            if self._deleting.get(name) == version:
                del self._deleting[name]

    async def _warm(self, ref: AdapterRef, *, pin: bool | None, param: str) -> None:
        """Returns when a version is in memory."""
        try:
            status = await self._client.warm_adapter(ref, pin=pin)
        except DeletedAdapterError as error:
            raise _deleted(error) from error
        except AdapterError as error:
            raise ApiError(422, f"adapter {ref.name!r}: {error}", param=param) from error
        if pin and not status.pinned:
            raise ApiError(422, f"adapter {ref.name!r}: {status.error}", param="pin")

    def _check_name(self, name: str, *, param: str) -> None:
        if name == self._models.base_name:
            raise ApiError(409, f"{name!r} is the base's name: choose another for the adapter", param=param)
        try:
            check_name(name)
        except AdapterError as error:
            raise ApiError(400, str(error), param=param) from error

    def _check_source(self, source: str, *, param: str) -> None:
        try:
            self._sources.check(source)
        except AdapterError as error:
            raise ApiError(403, str(error), param=param) from error

    def _resolve(self, name: str, *, param: str | None = None) -> AdapterRef:
        try:
            if name != self._models.base_name:
                return self._catalog.resolve(name)
        except UnknownAdapterError:
            pass
        raise _unknown(name, param=param)

    def _card(self, name: str) -> AdapterCard:
        """What is known of the name's present version."""
        self._resolve(name)  # it may have been deleted meanwhile
        status = self._client.status(name)
        return AdapterCard(
            id=name,
            parent=self._models.base_name,
            state=status.state,
            error=status.error,
            version=status.version,
            pinned=status.pinned,
            num_in_flight=status.num_in_flight,
            last_used=status.last_used,
            variant=status.variant,
            unit=status.unit,
            num_experts=status.num_experts,
            top_k=status.top_k,
            r=status.r,
            targets=status.targets,
            num_parameters=status.num_parameters,
            num_bytes=status.num_bytes,
            digest=status.digest,
        )

    def _lock(self, name: str) -> asyncio.Lock:
        """The lock of a name; it lives as long as somebody holds it or waits for it."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Has `work` done in the background."""
        task = asyncio.ensure_future(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    async def _finish(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Does `work` to its end, even if whoever waits for it is cancelled."""
        return await asyncio.shield(self._start(work))


def _unknown(name: str, *, param: str | None) -> ApiError:
    return ApiError(404, f"there is no adapter {name!r}; GET /v1/adapters lists those that are", param=param)


def _deleted(error: DeletedAdapterError) -> ApiError:
    return ApiError(409, str(error), param="name")


def _json(reply: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(reply), status_code=status, media_type="application/json")
