"""The API's description: OpenAPI for programs, and a page for people that needs no network.

In: the application, whose endpoints parse their bodies and write their replies themselves. Out: the document with the schemas
of both and an example of each body, and the same as HTML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from perft_serve.server.protocol import (
    AdapterRequest,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    ErrorReply,
    LoadLoraRequest,
    TokenizeRequest,
    UnloadLoraRequest,
)

_SCHEMA = "#/components/schemas/{name}"
_MESSAGES = [{"role": "user", "content": "Which products have price more than 50?"}]

# Of each body: what it is an example of, and the fields; "{base}" is the base's name.
_EXAMPLES: Mapping[type, Mapping[str, Mapping[str, Any]]] = {
    CompletionRequest: {
        "a completion": {"model": "{base}", "prompt": "Once upon a time", "max_tokens": 32},
        "a stream on an adapter": {
            "model": "support",
            "prompt": "Ticket: my watch will not start.",
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        "scoring a prompt": {"model": "{base}", "prompt": "Two and two", "echo": True, "logprobs": 1, "max_tokens": 0},
    },
    ChatRequest: {
        "a conversation": {"model": "{base}", "messages": _MESSAGES, "max_completion_tokens": 64},
        "a stream": {"model": "{base}", "messages": _MESSAGES, "stream": True},
    },
    TokenizeRequest: {
        "a prompt": {"prompt": "Once upon a time", "return_token_strs": True},
        "a conversation": {"messages": _MESSAGES},
    },
    DetokenizeRequest: {"tokens": {"tokens": [5, 6, 7]}},
    AdapterRequest: {
        "register or reload": {"name": "support", "source": "adapters/support-v2"},
        "keep in memory": {"name": "support", "pin": True},
    },
    LoadLoraRequest: {"load": {"lora_name": "support", "lora_path": "adapters/support"}},
    UnloadLoraRequest: {"unload": {"lora_name": "support"}},
}

# Of the replies that can be streamed, what each event holds.
_STREAMS: Mapping[type, type] = {Completion: Completion, ChatCompletion: ChatChunk}

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ background: #f4f4f4; padding: .6rem; overflow-x: auto; white-space: pre-wrap }}
td, th {{ text-align: left; vertical-align: top; padding: .1rem 1rem .1rem 0 }}
</style>
<h1>{title} {version}</h1>
<p>{summary} The whole description: <a href="openapi.json">openapi.json</a>.</p>
{routes}
</html>
"""


def content(kind: type | str | None) -> dict[str, Any]:
    """The OpenAPI entry for a body that the endpoint parses itself, or a reply that it writes itself.

    Args:
        kind: its type, or the media type of a text; `None`: JSON of no type in particular.
    """
    if kind is None:
        return {"description": "OK"}
    if isinstance(kind, str):
        return {"description": "OK", "content": {kind: {"schema": {"type": "string"}}}}
    entry: dict[str, Any] = {"application/json": {"schema": {"$ref": _SCHEMA.format(name=kind.__name__)}}}
    if kind in _STREAMS:
        chunk = {"$ref": _SCHEMA.format(name=_STREAMS[kind].__name__)}
        data = {
            "description": "A chunk or an error, and `[DONE]` at the end.",
            "anyOf": [
                {"const": "[DONE]"},
                {"type": "string", "contentMediaType": "application/json", "contentSchema": chunk},
            ],
        }
        entry["text/event-stream"] = {"schema": {"type": "object", "required": ["data"], "properties": {"data": data}}}
    return {"description": kind.__name__, "content": entry}


def describe(app: FastAPI, kinds: Sequence[type], *, base_name: str, has_keys: bool) -> dict[str, Any]:
    """The OpenAPI document.

    Args:
        kinds: the bodies and replies that the routes refer to: pydantic's models and msgspec's structs.
        base_name: the base's name in requests, for the examples.
        has_keys: whether requests need an API key.
    """
    document = get_openapi(
        title=app.title,
        summary=app.summary,
        version=app.version,
        routes=app.routes,
        openapi_version=app.openapi_version,
    )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    template = _SCHEMA.format(name="{model}")
    kinds = sorted({*kinds, *_STREAMS.values(), ErrorReply}, key=lambda kind: kind.__name__)
    models = [kind for kind in kinds if issubclass(kind, BaseModel)]
    for mode, shown in (
        ("validation", [kind for kind in models if kind in _EXAMPLES]),
        ("serialization", [kind for kind in models if kind not in _EXAMPLES]),
    ):
        _, found = models_json_schema([(kind, mode) for kind in shown], ref_template=template)  # type: ignore[misc]
        schemas.update(found.get("$defs", {}))
    _, structs = msgspec.json.schema_components(
        [kind for kind in kinds if not issubclass(kind, BaseModel)], ref_template=_SCHEMA
    )
    schemas.update(structs)
    examples = {
        _SCHEMA.format(name=kind.__name__): {
            name: {"value": {key: base_name if value == "{base}" else value for key, value in fields.items()}}
            for name, fields in examples.items()
        }
        for kind, examples in _EXAMPLES.items()
    }
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's, in place of which our own is sent
        schemas.pop(name, None)
    for operations in document["paths"].values():
        for operation in operations.values():
            if operation["responses"].get("422", {}).get("description") == "Validation Error":
                del operation["responses"]["422"]
            for media in operation.get("requestBody", {}).get("content", {}).values():
                media["examples"] = examples[media["schema"]["$ref"]]
            if has_keys and "401" in operation["responses"]:
                operation["security"] = [{"key": []}]
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def page(document: Mapping[str, Any]) -> str:
    """An OpenAPI document as HTML: routes, their fields, and their examples as command lines."""
    routes = [
        _route(path, method.upper(), operation, document["components"]["schemas"])
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    info = document["info"]
    return _PAGE.format(
        title=escape(info["title"]),
        version=escape(info["version"]),
        summary=escape(info["summary"]),
        routes="\n".join(routes),
    )


def _route(path: str, method: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    lines = [f"<h2>{method} {escape(path)}</h2>", f"<p>{escape(operation.get('description', ''))}</p>"]
    rows = [
        (each["name"], each["schema"], each.get("description", ""), each["in"])
        for each in operation.get("parameters", ())
    ]
    for media in operation.get("requestBody", {}).get("content", {}).values():
        schema = schemas[media["schema"]["$ref"].rpartition("/")[2]]
        required = schema.get("required", ())
        rows += [
            (name, field, field.get("description", ""), "required" if name in required else "")
            for name, field in schema["properties"].items()
        ]
        lines += [
            f"<p>{escape(name)}:</p><pre>curl -s $SERVER{escape(path)} -H 'content-type: application/json' -d "
            f"'{escape(json.dumps(example['value']), quote=False)}'</pre>"
            for name, example in media["examples"].items()
        ]
    if rows:
        lines.append("<table><tr><th>field<th>type<th><th>")
        lines += [
            f"<tr><td><code>{escape(name)}</code><td>{escape(_type(schema))}<td>{escape(note)}<td>{escape(text)}"
            for name, schema, text, note in rows
        ]
        lines.append("</table>")
    return "\n".join(lines)


def _type(schema: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", schema.get("const", "anything")))
