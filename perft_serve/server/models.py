"""The names that requests may have in `model`: the base's, and those of the catalogue of adapters.

In: a name, and the tenant that says it. Out: the version of an adapter that a request takes under it, and the cards of `GET
/v1/models`. What a tenant may not use is to it as if it were not there. Ten thousand names are a page like any other, so cards
are msgspec structs: pydantic takes fifteen times as long.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice

from perft_serve.adapters.catalog import AdapterRef, UnknownAdapterError
from perft_serve.server.client import EngineClient
from perft_serve.server.errors import ApiError
from perft_serve.server.keys import OPERATOR, AdapterAccess
from perft_serve.server.protocol import ModelAdapter, ModelCard, ModelList


class ModelNames:
    """The base and the adapters, by the names that requests give.

    Args:
        base_name: the base's.
        access: which adapters each tenant may use.

    Raises:
        ValueError: an adapter has the base's name.
    """

    def __init__(self, base_name: str, client: EngineClient, access: AdapterAccess) -> None:
        self.base_name = base_name
        self._access = access
        self._client = client
        self._created = int(time.time())
        if base_name in client.catalog:
            raise ValueError(
                f"an adapter and the base are both named {base_name!r}: give the base another --served-model-name"
            )

    def resolve(self, model: str, tenant: str) -> AdapterRef | None:
        """The version of an adapter that a tenant's request for `model` takes now; `None` for the base.

        Raises:
            ApiError: 404, there is no such model, or not for this tenant; which of the two is not said.
        """
        if model == self.base_name:
            return None
        try:
            if self._access.allows(tenant, model):  # else nobody looks whether there is one, which would take its time
                return self._client.catalog.resolve(model)
        except UnknownAdapterError:
            pass
        raise ApiError(
            404,
            f"The model {model!r} does not exist or you do not have access to it; GET /v1/models lists those that you can use.",
            param="model",
        )

    def card(self, model: str, tenant: str) -> ModelCard:
        """A model as `GET /v1/models` shows it to a tenant.

        Raises:
            ApiError: 404, as `resolve`.
        """
        return self._base_card() if self.resolve(model, tenant) is None else self._adapter_card(model)

    def page(self, after: str | None, limit: int | None, tenant: str) -> ModelList:
        """The models for a tenant that follow `after`, at most `limit` of them: the base, then the adapters by name."""
        cards = [self._base_card()] if after is None else []
        refs = self.adapters_after(
            None if after == self.base_name else after, None if limit is None else limit + 1, tenant
        )
        cards += [self._adapter_card(ref.name) for ref in refs]
        shown = cards if limit is None else cards[:limit]
        return ModelList(
            data=shown,
            first_id=shown[0].id if shown else None,
            last_id=shown[-1].id if shown else None,
            has_more=len(shown) < len(cards),
        )

    def adapters_after(
        self, after: str | None, limit: int | None = None, tenant: str = OPERATOR
    ) -> Sequence[AdapterRef]:
        """A tenant's adapters whose names follow `after`, in order. A new folder with the base's name is none."""
        if self._access.is_bound(tenant):
            refs = self._client.adapters(after)
            found = (ref for ref in refs if self._access.allows(tenant, ref.name) and ref.name != self.base_name)
            return list(islice(found, limit))
        refs = self._client.adapters(after, None if limit is None else limit + 1)
        return [ref for ref in refs if ref.name != self.base_name][:limit]

    def _base_card(self) -> ModelCard:
        return ModelCard(
            id=self.base_name,
            created=self._created,
            root=self.base_name,
            parent=None,
            max_model_len=self._client.limits.max_model_len,
        )

    def _adapter_card(self, name: str) -> ModelCard:
        status = self._client.status(name)
        card = ModelCard(
            id=name,
            created=self._created,
            root=self.base_name,
            parent=self.base_name,
            max_model_len=self._client.limits.max_model_len,
        )
        if status.digest is not None:  # it has been read
            card.adapter = ModelAdapter(
                variant=status.variant,
                unit=status.unit,
                num_experts=status.num_experts,
                top_k=status.top_k,
                r=status.r,
                targets=status.targets,
                num_parameters=status.num_parameters,
                digest=status.digest,
            )
        return card
