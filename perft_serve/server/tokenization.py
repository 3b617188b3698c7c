"""`POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`: the base's tokenizer over HTTP, in vLLM's shapes.

In: text, a conversation, or token ids. Out: the ids that a completion's or a chat's prompt would have, or the text of ids.
Nothing goes to the engine. What could not be a prompt, however it were tokenised, is refused before work is put into it.
"""

from __future__ import annotations

from fastapi import Request
from starlette.responses import JSONResponse, Response

from perft_serve.engine.params import RequestError
from perft_serve.server.errors import ApiError
from perft_serve.server.protocol import DetokenizeRequest, Text, TokenizeRequest, Tokens
from perft_serve.server.service import Service
from perft_serve.text import TextTokenizer


class TokenizationEndpoints:
    """Answers requests about tokens."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a prompt or a conversation."""
        service = self._service
        raw = await service.read_json(request)
        body = await service.parse(TokenizeRequest, raw)
        tokenizer = self._tokenizer(body.model, request)
        ids = await service.encode(raw, lambda: self._ids(body, tokenizer))
        reply = Tokens(
            count=len(ids),
            max_model_len=service.client.limits.max_model_len,
            tokens=ids,
            token_strs=tokenizer.pieces(ids) if body.return_token_strs else None,
        )
        return Response(reply.to_json(), media_type="application/json")

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        service = self._service
        raw = await service.read_json(request)
        body = await service.parse(DetokenizeRequest, raw)
        tokenizer = self._tokenizer(body.model, request)
        limits = service.client.limits
        if len(body.tokens) > limits.max_model_len:
            raise RequestError(
                f"{len(body.tokens)} tokens, but the context is {limits.max_model_len}: send them in parts",
                param="tokens",
            )
        for position, token_id in enumerate(body.tokens):
            if not 0 <= token_id < limits.vocab_size:
                raise RequestError(
                    f"token id {token_id} at position {position} is not in the vocabulary, which has ids 0 to "
                    f"{limits.vocab_size - 1}",
                    param="tokens",
                )
        text = await service.encode(raw, lambda: tokenizer.decode(body.tokens))
        return Response(Text(prompt=text).to_json(), media_type="application/json")

    async def info(self, request: Request) -> Response:
        """What the tokenizer's configuration says, and its chat template."""
        return JSONResponse(self._tokenizer(None, request).info())

    def _tokenizer(self, model: str | None, request: Request) -> TextTokenizer:
        if model is not None:
            self._service.models.resolve(model, request.state.tenant)
        if self._service.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer: prompts are token ids")
        return self._service.tokenizer

    def _ids(self, body: TokenizeRequest, tokenizer: TextTokenizer) -> list[int]:
        text, special = body.prompt, body.add_special_tokens is not False
        if body.messages is not None:
            text = tokenizer.render_chat(**body.rendering(body.messages))
            special = bool(body.add_special_tokens)
        assert text is not None
        self._service.client.limits.check_characters(len(text), tokenizer.max_token_characters)
        return tokenizer.encode(text, add_special_tokens=special)
