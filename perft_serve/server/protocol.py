"""The requests and replies of the OpenAI API as this server speaks it, and of the routes for adapters.

In: a request's body, as bytes. Out: a request whose every field has the declared type, or an `ApiError` that names the field.
Nothing is converted ("3" is not 3, `true` is not 1), nothing unknown is let through, and what OpenAI's or vLLM's clients
may send but this server cannot do is accepted only when it asks for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import ErrorDetails, from_json

from perft_serve.adapters.status import AdapterState
from perft_serve.engine.events import FinishReason
from perft_serve.engine.params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    RequestError,
    SamplingParams,
    StructuredOutputsParams,
)
from perft_serve.server.errors import ApiError

# Fields of OpenAI's and vLLM's APIs that this server does not implement, and the values that ask for nothing.
_NEUTRAL_IN_BOTH: dict[str, tuple[Any, ...]] = {
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1),
    "logits_processors": (None, []),
    "metadata": (None, {}),
    "service_tier": (None, "auto", "default"),
    "spaces_between_special_tokens": (None, True),
    "store": (None, False),
    "use_beam_search": (None, False),
    "vllm_xargs": (None, {}),
}
_NEUTRAL_IN_COMPLETIONS = {**_NEUTRAL_IN_BOTH, "prompt_embeds": (None,), "suffix": (None, "")}
_NEUTRAL_IN_CHAT = {
    **_NEUTRAL_IN_BOTH,
    "add_special_tokens": (None, False),
    "audio": (None,),
    "chat_template": (None,),
    "documents": (None, []),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}
_NEUTRAL_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "refusal": (None,),
}

# What to say where pydantic would list every branch of a union.
_EXPECTED = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of lists of token ids",
    "stop": "a string or a list of strings",
    "content": "a string or a list of text parts",
    "tool_choice": "none, auto, required, or a function by name",
    "guided_json": "a JSON schema, as an object or as text",
}


class _FirstErrorOnly(FailFast):
    """Pydantic's `FailFast`, as unions can hold it. One bad item is enough: millions of errors would cost gigabytes."""

    def __hash__(self) -> int:
        return hash(type(self))


ItemT = TypeVar("ItemT")
_List = Annotated[list[ItemT], _FirstErrorOnly()]

# Of messages and their parts: far more than a context holds, and checked in a fraction of a second, in which nothing else runs.
MAX_PARTS = 1 << 14
MAX_TOOLS = 128


class _Request(BaseModel):
    """A body that is taken as it is written: no conversions, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    def check(self) -> None:
        """What no single field can tell.

        Raises:
            RequestError: naming the field.
        """


class StreamOptions(_Request):
    """What a stream carries beside the text."""

    include_usage: bool | None = Field(default=None, description="Send a last chunk with the token counts.")
    continuous_usage_stats: bool | None = Field(default=None, description="Send the token counts in every chunk.")


class JsonSchemaFormat(_Request):
    """A JSON schema with a name. It is always kept to, strict or not."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Request):
    """What the text must look like, as OpenAI's API says it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(_Request):
    """What the text must look like, as vLLM's API says it: exactly one of the first five."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "disable_additional_properties": (None, False),
        "disable_fallback": (None, False),
        "structural_tag": (None,),
    }

    json_: dict[str, Any] | str | None = Field(default=None, alias="json", description="A JSON schema.")
    regex: str | None = None
    choice: _List[str] | None = None
    grammar: str | None = Field(default=None, description="In llguidance's Lark syntax, or GBNF.")
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None


class _SamplingRequest(_Request):
    """The fields that both endpoints share."""

    model: str = Field(description="The base's name, or an adapter's.")
    temperature: float | None = Field(default=None, description="0 is greedy; default 1.")
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | _List[str] | None = Field(
        default=None, description="Strings that end the text; they are left out of it."
    )
    stop_token_ids: _List[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = Field(default=None, description="Go on after the end-of-sequence token.")
    min_tokens: int | None = Field(default=None, description="Nothing ends the text before so many tokens.")
    logit_bias: dict[str, float] | None = Field(
        default=None,
        description=f"Added to the logits of at most {MAX_LOGIT_BIAS} tokens, by token id, in [-100, 100].",
    )
    presence_penalty: float | None = Field(default=None, description="Off the logit of what was generated, in [-2, 2].")
    frequency_penalty: float | None = Field(default=None, description="The same, for each time, in [-2, 2].")
    repetition_penalty: float | None = Field(
        default=None, description="Above 1 makes tokens of prompt and completion less likely, below 1 more."
    )
    allowed_token_ids: _List[int] | None = Field(default=None, description="No other tokens are taken.")
    bad_words: _List[str] | None = Field(
        default=None, description="Never generated, with a space before them or without."
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = Field(
        default=None, description="Older name of `structured_outputs.json`."
    )
    guided_regex: str | None = Field(default=None, description="Older name of `structured_outputs.regex`.")
    guided_choice: _List[str] | None = Field(default=None, description="Older name of `structured_outputs.choice`.")
    guided_grammar: str | None = Field(default=None, description="Older name of `structured_outputs.grammar`.")
    best_of: int | None = Field(default=None, description="As `n`: all that are generated are returned.")
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = Field(
        default=None,
        description=f"Of each token of the prompt, and of so many of the likeliest, at most {MAX_LOGPROBS}.",
    )
    prompt_logprobs_start: int | None = Field(
        default=None,
        description="Index of the first token of the prompt to have log-probabilities, also with `echo`; those before it have "
        "`null`, and may come from the prefix cache. Default 0.",
    )
    truncate_prompt_tokens: int | None = Field(
        default=None, description="Cut a longer prompt to so many tokens; -1: to what leaves room for the completion."
    )
    truncation_side: Literal["left", "right"] | None = Field(
        default=None, description="Which side of such a prompt is cut off; default left."
    )
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = Field(
        default=None, description="Lower starts first, on a server with `--scheduling-policy priority`."
    )
    return_routing: bool | None = Field(
        default=None, description="Send which adapter experts each token took in each layer, and with what weights."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = Field(default=None, description="Send the token ids of prompt and completions.")
    return_tokens_as_token_ids: bool | None = Field(
        default=None,
        description="Name tokens `token_id:N` in log-probabilities, which tells apart those of equal text.",
    )
    # A client can write what it likes here: it is no ground for a share of the machine (`EngineRequest.tenant`).
    user: str | None = Field(default=None, description="Whom the request is for. Has no effect.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        default=None, description="Requests share cached prompts only with requests of the same salt."
    )

    def cache_scope(self, tenant: str) -> str:
        """Which requests this one may share cached prompts with: those of the tenant, and of them those of the same salt."""
        return f"{tenant}\n{self.cache_salt or ''}"  # a tenant's name has no newline

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is for streams only: set stream to true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError(
                "prompt_logprobs are not sent in streams: leave it out, or set stream to false", param="prompt_logprobs"
            )
        if self.best_of not in (None, self.n or 1):
            raise RequestError(
                f"best_of={self.best_of} is not supported by this server unless it is n: leave it out", param="best_of"
            )

    def structured(self) -> StructuredOutputsParams | None:
        """What the text must look like, whichever way the request says so.

        Raises:
            RequestError: it says so in two ways, or what it says makes no sense.
        """
        asked: dict[str, dict[str, Any]] = {}
        wanted = self.response_format
        if wanted is not None and wanted.type == "json_schema":
            if wanted.json_schema is None:
                raise RequestError("response_format.json_schema is missing", param="response_format.json_schema")
            asked["response_format"] = {"json": wanted.json_schema.schema_}
        elif wanted is not None and wanted.json_schema is not None:
            raise RequestError(
                f"response_format.json_schema is for the type json_schema, not {wanted.type}", param="response_format"
            )
        elif wanted is not None and wanted.type == "json_object":
            asked["response_format"] = {"json_object": True}
        if self.structured_outputs is not None:
            fields = {name.rstrip("_"): value for name, value in self.structured_outputs}
            asked["structured_outputs"] = {name: value for name, value in fields.items() if value is not None}
        for name in ("json", "regex", "choice", "grammar"):
            value = getattr(self, f"guided_{name}")
            if value is not None:
                asked[f"guided_{name}"] = {name: value}
        if len(asked) > 1:
            first, second, *_ = asked
            raise RequestError(
                f"{first} and {second} both say what the text must look like: leave one out", param=second
            )
        return next((StructuredOutputsParams(**fields, param=name) for name, fields in asked.items()), None)

    def _params(self, **further: Any) -> SamplingParams:
        """The sampling parameters that were given; the defaults are those of `SamplingParams`."""
        given = {name: value for name in _PARAMS if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            given["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        further.setdefault("structured_outputs", self.structured())
        return SamplingParams(**given, **further)


# What has the same name and meaning in a request and in `SamplingParams`
_PARAMS = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "stop_token_ids", "ignore_eos", "min_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "allowed_token_ids", "bad_words"),
    *(
        "include_stop_str_in_output",
        "skip_special_tokens",
        "truncate_prompt_tokens",
        "truncation_side",
        "return_routing",
        "prompt_logprobs_start",
    ),
)


def _token_id(key: str) -> int:
    """The token id that a key of an object stands for: keys are strings in JSON."""
    if key.isascii() and key.isdecimal() and len(key) <= 10 and str(int(key)) == key:
        return int(key)
    raise RequestError(f"logit_bias: the key {_shown(key)} is not a token id", param="logit_bias")


class CompletionRequest(_SamplingRequest):
    """Body of `POST /v1/completions`."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = _NEUTRAL_IN_COMPLETIONS

    prompt: str | _List[str] | _List[int] | _List[_List[int]]
    max_tokens: int | None = Field(default=None, description="Default 16; 0 with `echo` only scores the prompt.")
    logprobs: int | None = Field(
        default=None, description=f"Log-probabilities of so many of the likeliest tokens, at most {MAX_LOGPROBS}."
    )
    echo: bool | None = Field(default=None, description="Put the prompt before the completion.")
    add_special_tokens: bool | None = Field(
        default=None, description="Add the tokenizer's special tokens to a text prompt; default true."
    )

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, also if there is one only."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise RequestError("the prompt is empty: send at least one token", param="prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def scores_echo(self) -> bool:
        """Whether the prompt is sent back with log-probabilities."""
        return bool(self.echo) and self.logprobs is not None

    def params(self, *, room: int) -> SamplingParams:
        """Sampling parameters for a prompt after which the context has room for `room` tokens.

        Raises:
            RequestError: a value is out of its range.
        """
        default = SamplingParams().max_tokens
        assert default is not None
        max_tokens = self.max_tokens if self.max_tokens is not None else max(1, min(default, room))
        scored = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            scored = max(self.logprobs, scored or 0)
        if self.echo and max_tokens == 0 and scored is None:
            scored = 0  # the engine runs a prompt without generating only to score it
        return self._params(max_tokens=max_tokens, logprobs=self.logprobs, prompt_logprobs=scored)


class TextPart(_Request):
    """A part of a message's content; there is only text."""

    type: Literal["text"]
    text: str


class CalledFunction(_Request):
    """What an answer has called: `arguments` is a JSON object as text."""

    name: str
    arguments: str


class ToolCall(_Request):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    # As streams have it; means nothing here
    index: int | None = None


class Function(_Request):
    """Something that a model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema; left out: any object.")
    # A forced call keeps to the schema, strict or not
    strict: bool | None = None


class Tool(_Request):
    """A tool; there are only functions."""

    type: Literal["function"]
    function: Function

    def as_dict(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"type": "function", "function": self.function.model_dump(exclude_unset=True, exclude={"strict"})}


class ChosenFunction(_Request):
    """The function that must be called."""

    name: str


class NamedToolChoice(_Request):
    """A function must be called."""

    type: Literal["function"]
    function: ChosenFunction


class Message(_Request):
    """One message of a conversation."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = _NEUTRAL_IN_MESSAGES

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[_List[TextPart], Field(max_length=MAX_PARTS)] | None = None
    name: str | None = None
    tool_calls: Annotated[_List[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None

    def check_at(self, where: str) -> None:
        """What no single field can tell; `where` the message stands.

        Raises:
            RequestError: naming the field.
        """
        if self.tool_calls and self.role != "assistant":
            raise RequestError(f"{where}.tool_calls: only an assistant calls tools", param=f"{where}.tool_calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise RequestError(f"{where}.tool_call_id is for the role tool", param=f"{where}.tool_call_id")
        if self.role == "tool" and self.tool_call_id is None:
            raise RequestError(f"{where}.tool_call_id is missing", param=f"{where}.tool_call_id")
        if self.content is None and not self.tool_calls:
            raise RequestError(f"{where}.content is missing", param=f"{where}.content")

    def as_dict(self, where: str) -> dict[str, Any]:
        """As chat templates take it; `developer` is OpenAI's newer word for `system`.

        Raises:
            RequestError: the arguments of a call are not a JSON object.
        """
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content or ()]
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": "\n".join(parts),
        }
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(call, f"{where}.tool_calls[{position}].function.arguments"),
                    },
                }
                for position, call in enumerate(self.tool_calls)
            ]
        return message


def _arguments(call: ToolCall, where: str) -> dict[str, Any]:
    """The arguments of a call as the object that chat templates want; no arguments may be written as no text."""
    try:
        value = from_json(call.function.arguments or "{}", allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON: {error}", param=where) from error
    if not isinstance(value, dict):
        raise RequestError(f"{where} must be a JSON object, as text", param=where)
    return value


class _Templated(_Request):
    """What a request says about how the model's chat template is to be used."""

    add_generation_prompt: bool | None = Field(default=None, description="Open the prompt for an answer; default true.")
    continue_final_message: bool | None = Field(default=None, description="The answer continues the last message.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Variables of the model's chat template; it must know them."
    )
    tools: Annotated[_List[Tool], Field(max_length=MAX_TOOLS)] | None = None

    @property
    def offered_tools(self) -> Sequence[Tool]:
        """The tools that the model may call."""
        return self.tools or ()

    def check_conversation(self, messages: Sequence[Message]) -> None:
        """What no single field can tell.

        Raises:
            RequestError: naming the field.
        """
        for position, message in enumerate(messages):
            message.check_at(f"messages[{position}]")
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError(
                "add_generation_prompt begins an answer, continue_final_message continues one: leave one out",
                param="continue_final_message",
            )

    def rendering(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The arguments of `TextTokenizer.render_chat`.

        Raises:
            RequestError: a message is not as templates want it.
        """
        continues = bool(self.continue_final_message)
        return {
            "messages": [message.as_dict(f"messages[{position}]") for position, message in enumerate(messages)],
            "tools": [tool.as_dict() for tool in self.offered_tools],
            "add_generation_prompt": not continues and self.add_generation_prompt is not False,
            "continue_final_message": continues,
            "variables": self.chat_template_kwargs,
        }


class ChatRequest(_SamplingRequest, _Templated):
    """Body of `POST /v1/chat/completions`."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = _NEUTRAL_IN_CHAT

    messages: Annotated[_List[Message], Field(min_length=1, max_length=MAX_PARTS)]
    max_tokens: int | None = Field(default=None, description="Default: as many as the context holds.")
    max_completion_tokens: int | None = Field(default=None, description="OpenAI's newer name of `max_tokens`.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = Field(
        default=None, description="Default: auto if there are tools."
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="Whether there may be several calls; default true."
    )

    def check(self) -> None:
        super().check()
        self.check_conversation(self.messages)
        self._check_tools()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: set it to true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError(
                "max_tokens and max_completion_tokens mean the same, but differ: leave one out", param="max_tokens"
            )

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise RequestError("two tools have the same name", param="tools")
        if self.forced_tools() is None:
            return
        if not names:
            raise RequestError("tool_choice wants a call, but there are no tools", param="tool_choice")
        if not self.forced_tools():
            raise RequestError("tool_choice names a function that is not among the tools", param="tool_choice")
        if self.structured() is not None:
            raise RequestError(
                "tool_choice wants a call, but another field says what the text must look like: leave one out",
                param="tool_choice",
            )

    @property
    def offered_tools(self) -> Sequence[Tool]:
        """The tools that the model may call."""
        return () if self.tools is None or self.tool_choice == "none" else self.tools

    def forced_tools(self) -> list[Tool] | None:
        """The tools of which one must be called; `None`: none must be."""
        if isinstance(self.tool_choice, NamedToolChoice):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools or () if tool.function.name == name]
        return list(self.tools or ()) if self.tool_choice == "required" else None

    def params(self, grammar: str | None = None) -> SamplingParams:
        """Sampling parameters; `grammar`, of tool calls, is what the text must look like.

        Raises:
            RequestError: a value is out of its range.
        """
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        further: dict[str, Any] = {}
        if grammar is not None:
            further["structured_outputs"] = StructuredOutputsParams(grammar=grammar, param="tools")
        return self._params(
            max_tokens=max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
            **further,
        )


_Source = Annotated[str, Field(min_length=1, max_length=1024)]


class TokenizeRequest(_Templated):
    """Body of `POST /tokenize`, as vLLM has it: a prompt or a conversation."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "chat_template": (None,),
        "media_io_kwargs": (None,),
        "mm_processor_kwargs": (None,),
    }

    model: str | None = Field(default=None, description="A name that requests may have; all have the base's tokenizer.")
    prompt: str | None = None
    messages: Annotated[_List[Message], Field(min_length=1, max_length=MAX_PARTS)] | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="Add the tokenizer's special tokens; default true for a prompt, false for messages."
    )
    return_token_strs: bool | None = Field(default=None, description="Also send the vocabulary's entry of each token.")

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("send either a prompt or messages", param="prompt")
        self.check_conversation(self.messages or ())


class DetokenizeRequest(_Request):
    """Body of `POST /detokenize`, as vLLM has it."""

    model: str | None = Field(default=None, description="A name that requests may have; all have the base's tokenizer.")
    tokens: _List[int]


class AdapterRequest(_Request):
    """Body of `POST /v1/adapters`."""

    name: str
    source: _Source | None = Field(
        default=None,
        description="A folder of the server, a Hugging Face Hub id (`org/name@revision`) or a URL (`s3://...`); under a "
        "name that is taken this is a reload. Left out: the adapter that has this name already.",
    )
    pin: bool | None = Field(
        default=None,
        description="Keep it in memory, whatever else wants the room; false: no longer. Default: as it is, over a reload too.",
    )
    load: bool = Field(default=True, description="Reply when it is in memory; false: read nothing yet.")

    def check(self) -> None:
        if self.pin and not self.load:
            raise RequestError("what is pinned is in memory: leave out load, or set it to true", param="pin")


class LoadLoraRequest(_Request):
    """Body of `POST /v1/load_lora_adapter`, as vLLM has it."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"is_3d_lora_weight": (None, False)}

    lora_name: str
    lora_path: _Source = Field(description="As `source` in `POST /v1/adapters`.")
    load_inplace: bool = Field(default=False, description="Reload an adapter whose name is taken.")


class UnloadLoraRequest(_Request):
    """Body of `POST /v1/unload_lora_adapter`, as vLLM has it."""

    lora_name: str
    lora_int_id: int | None = Field(default=None, description="Has no effect, as in vLLM: the name says which.")


ChatFinishReason = Literal[FinishReason, "tool_calls"]

RequestT = TypeVar("RequestT", bound=_Request)


def parse_request(kind: type[RequestT], body: bytes) -> RequestT:
    """A request from a body.

    Raises:
        ApiError: 400, saying what is wrong and where.
        RequestError: fields that do not go together.
    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error} (NaN and Infinity are not JSON)") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    value = _without_neutral(value, kind.neutral, "")
    outputs = value.get("structured_outputs")
    if isinstance(outputs, dict):
        value["structured_outputs"] = _without_neutral(outputs, StructuredOutputs.neutral, "structured_outputs.")
    messages = value.get("messages")
    if "messages" in kind.model_fields and isinstance(messages, list):
        value["messages"] = [
            _without_neutral(message, Message.neutral, f"messages[{position}].")
            if isinstance(message, dict)
            else message
            for position, message in enumerate(messages)
        ]
    try:
        request = kind.model_validate(value)
    except ValidationError as error:
        raise refusal(error.errors(include_url=False, include_context=False)) from error
    request.check()
    return request


def _without_neutral(value: dict[str, Any], neutral: dict[str, tuple[Any, ...]], where: str) -> dict[str, Any]:
    """`value` without the fields that this server does not implement; they must ask for nothing."""
    kept = {}
    for name, item in value.items():
        allowed = neutral.get(name)
        if allowed is None:
            kept[name] = item
        elif not any(item == each and isinstance(item, bool) == isinstance(each, bool) for each in allowed):
            raise ApiError(400, f"{where}{name} is not supported by this server: leave it out", param=f"{where}{name}")
    return kept


def refusal(errors: Sequence[ErrorDetails]) -> ApiError:
    """What pydantic found, said about one field: an unknown one if there is one, else the first."""
    first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    location = first["loc"]
    expected = None
    for depth, name in enumerate(location):
        if isinstance(name, str) and name in _EXPECTED:
            # The rest of the path goes into a union's branches
            location, expected = location[: depth + 1], _EXPECTED[name]
            break
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {param!r}: this server does not know it, leave it out", param=param)
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param)
    if expected is not None:
        return ApiError(400, f"{param} must be {expected}", param=param)
    message = first["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return ApiError(400, f"{param} must be {message}, got {_shown(first['input'])}", param=param)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Reply(BaseModel):
    """A reply; fields that were not set are left out, so a builder sets all that clients expect, `None` included."""

    model_config = ConfigDict(extra="forbid")

    def to_json(self) -> str:
        """As JSON text."""
        return self.model_dump_json(exclude_unset=True)


class PromptTokensDetails(_Reply):
    """Of the prompts' tokens, those that were found in the prefix cache."""

    cached_tokens: int


class Usage(_Reply):
    """Token counts of a request: each prompt counts once, however many completions it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class RequestMetrics(_Reply):
    """Times of a request of one completion, as vLLM's `metrics` has them; `None`: there was nothing to measure."""

    time_to_first_token_ms: float | None = Field(description="From its first step to its first token.")
    generation_time_ms: float | None = Field(description="From its first token to its last.")
    queue_time_ms: float | None = Field(description="From its arrival in the engine to its first step.")
    mean_itl_ms: float | None = Field(description="Mean gap between two tokens.")
    tokens_per_second: float | None = Field(
        description="Its tokens over the time from its first step to the last of them."
    )


class CompletionLogprobs(_Reply):
    """Log-probabilities, one entry per token in each list."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(_Reply):
    """A token at a place of the prompt: it is there, or might have been; `rank` 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str | None


class Routing(_Reply):
    """Which adapter experts tokens took, and with what weights.

    Token number `start + t`, prompt and completion counted as one, took in layer `layers[l]` the adapter experts `ids[t][l]`
    (-1: none) with `weights[t][l]`. The last token of a completion is not computed, and has no entry; the prompt's have
    theirs in the first choice for it. In a stream, each chunk has those of the tokens that were computed for it.
    """

    start: int
    layers: list[int]
    ids: list[list[list[int]]]
    weights: list[list[list[float]]]


# By token id, the one that is there first; a prompt's first token has none
PromptLogprobs: TypeAlias = list[dict[str, PromptLogprob] | None]


class CompletionChoice(_Reply):
    """A completion, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    routing: Routing | None = None


class Completion(_Reply):
    """Reply of `POST /v1/completions`, and a chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    metrics: RequestMetrics | None = None


class TopLogprob(_Reply):
    """A token that might have been."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Reply):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]


class FunctionDelta(_Reply):
    """A function's name and its arguments, or what a chunk adds to them."""

    name: str | None = None
    arguments: str


class ToolCallDelta(_Reply):
    """A call, or what a chunk adds to it; the number is there in chunks."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatMessage(_Reply):
    """An answer, or what a chunk adds to it."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(_Reply):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    routing: Routing | None = None


class ChatCompletion(_Reply):
    """Reply of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    metrics: RequestMetrics | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class ChatChunkChoice(_Reply):
    """What a chunk adds to one answer."""

    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    routing: Routing | None = None


class ChatChunk(_Reply):
    """A chunk of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    metrics: RequestMetrics | None = None
    prompt_token_ids: list[int] | None = None


class Tokens(_Reply):
    """Reply of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(_Reply):
    """Reply of `POST /detokenize`."""

    prompt: str


class ErrorBody(_Reply):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorReply(_Reply):
    """Every reply whose status is not 200."""

    error: ErrorBody


class ModelAdapter(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, gc=False):
    """What kind of adapter a model is; `targets` are the projections that a LoRA is on (`variant` is `LoRA`)."""

    variant: str | None
    unit: str | None
    num_experts: int | None
    top_k: int | None
    r: int | None
    targets: tuple[str, ...] | None
    num_parameters: int | None
    digest: str


class ModelCard(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A name that requests may have in `model`; `adapter` is there once the adapter has been read."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "perft-serve"
    root: str
    parent: str | None
    max_model_len: int
    adapter: ModelAdapter | msgspec.UnsetType = msgspec.UNSET


class ModelList(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Reply of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    first_id: str | None
    last_id: str | None
    has_more: bool


class AdapterCard(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An adapter, as `/v1/adapters` shows it; what only its files can tell is `None` until they have been read.

    `state` is `registered` (not read yet), `loading`, `host` (in host memory: a copy away from its first token),
    `resident` (on the device) or `failed` (`error` says why; the next request tries again). `num_bytes` is its weight on the
    device; `last_used` is Unix time.
    """

    id: str
    object: Literal["adapter"] = "adapter"
    parent: str
    state: AdapterState
    error: str | None
    version: int
    pinned: bool
    num_in_flight: int
    last_used: float | None
    variant: str | None
    unit: str | None
    num_experts: int | None
    top_k: int | None
    r: int | None
    targets: tuple[str, ...] | None
    num_parameters: int | None
    num_bytes: int | None
    digest: str | None


class AdapterList(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Reply of `GET /v1/adapters`."""

    object: Literal["list"] = "list"
    data: list[AdapterCard]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedAdapter(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Reply of `DELETE /v1/adapters/{name}`."""

    id: str
    object: Literal["adapter"] = "adapter"
    deleted: bool = True
