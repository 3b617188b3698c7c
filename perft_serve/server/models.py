"""The names that requests may have in `model`: the base's, and those of the catalogue of adapters.

In: a name. Out: the version of an adapter that a request takes under it, and the cards of `GET /v1/models`. Ten thousand names
are a page like any other, so cards are msgspec structs: pydantic takes fifteen times as long.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from perft_serve.adapters.catalog import AdapterRef, UnknownAdapterError
from perft_serve.server.client import EngineClient
from perft_serve.server.errors import ApiError
from perft_serve.server.protocol import ModelAdapter, ModelCard, ModelList


class ModelNames:
    """The base and the adapters, by the names that requests give.

    Args:
        base_name: the base's.

    Raises:
        ValueError: an adapter has the base's name.
    """

    def __init__(self, base_name: str, client: EngineClient) -> None:
        self.base_name = base_name
        self._client = client
        self._created = int(time.time())
        if base_name in client.catalog:
            raise ValueError(
                f"an adapter and the base are both named {base_name!r}: give the base another --served-model-name"
            )

    def resolve(self, model: str) -> AdapterRef | None:
        """The version of an adapter that a request for `model` takes now; `None` for the base.

        Raises:
            ApiError: 404, there is no such model.
        """
        if model == self.base_name:
            return None
        try:
            return self._client.catalog.resolve(model)
        except UnknownAdapterError as error:
            raise ApiError(
                404, f"The model {model!r} does not exist; GET /v1/models lists those that do.", param="model"
            ) from error

    def card(self, model: str) -> ModelCard:
        """A model as `GET /v1/models` shows it.

        Raises:
            ApiError: 404, there is no such model.
        """
        return self._base_card() if self.resolve(model) is None else self._adapter_card(model)

    def page(self, after: str | None, limit: int | None) -> ModelList:
        """The models that follow `after`, at most `limit` of them: the base, then the adapters by name."""
        cards = [self._base_card()] if after is None else []
        refs = self.adapters_after(None if after == self.base_name else after, None if limit is None else limit + 1)
        cards += [self._adapter_card(ref.name) for ref in refs]
        shown = cards if limit is None else cards[:limit]
        return ModelList(
            data=shown,
            first_id=shown[0].id if shown else None,
            last_id=shown[-1].id if shown else None,
            has_more=len(shown) < len(cards),
        )

    def adapters_after(self, after: str | None, limit: int | None = None) -> Sequence[AdapterRef]:
        """The adapters whose names follow `after`, in order. A new folder with the base's name is none."""
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
                num_parameters=status.num_parameters,
                digest=status.digest,
            )
        return card
