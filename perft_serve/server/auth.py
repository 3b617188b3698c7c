"""API keys: who may use a route, and whose requests are whose.

In: the keys of the settings, and what a request says in `Authorization`. Out: the tenant's name, or an `ApiError`. The
operator's keys open everything, a tenant's what tenants need: generating, tokenising, listing models. Without any key,
everything is open to everybody.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Sequence

from fastapi import Request

from perft_serve.server.errors import ApiError
from perft_serve.server.keys import OPERATOR, parse_keys


class Gate:
    """The dependencies of routes that not everybody may use.

    Args:
        keys: as `parse_keys` takes them.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        # Keys are looked up by a hash that nobody outside can compute, so the time it takes tells nothing about them
        self._secret = secrets.token_bytes(32)
        self._tenants = {self._hash(key.encode()): tenant for key, tenant in parse_keys(keys).items()}

    @property
    def names(self) -> Collection[str]:
        """The tenants that have keys."""
        return set(self._tenants.values())

    @property
    def is_open(self) -> bool:
        """Whether there are no keys."""
        return not self._tenants

    async def tenant(self, request: Request) -> None:
        """Lets whoever has a key pass, and notes whose it is in `request.state.tenant`.

        Raises:
            ApiError: 401.
        """
        if self.is_open:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise _unauthorised("an API key is needed: send the header 'Authorization: Bearer KEY'")
        tenant = self._tenants.get(self._hash(key.strip().encode("latin-1")))
        if tenant is None:
            raise _unauthorised("this API key is not valid")
        request.state.tenant = tenant

    async def operator(self, request: Request) -> None:
        """Lets the operator pass.

        Raises:
            ApiError: 401, or 403 for a tenant.
        """
        await self.tenant(request)
        if request.state.tenant != OPERATOR:
            raise ApiError(403, f"this needs the operator's API key, not that of tenant {request.state.tenant!r}")

    def _hash(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._secret).digest()


def _unauthorised(message: str) -> ApiError:
    return ApiError(401, message, headers={"www-authenticate": "Bearer"})
