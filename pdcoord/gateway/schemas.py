"""The API as OpenAPI documents it: request bodies as `parse_call` reads them, answers, errors; pure.

JSON Schema 2020-12, as OpenAPI 3.1 has it.
"""

from typing import Any

from pdcoord.front.intake import RESERVED_FIELDS
from pdcoord.protocol.headers import CACHE_SALT_FIELD
from pdcoord.protocol.openai import CHOICE_COUNT_MAX, TOKEN_ID_MAX, Api

Schema = dict[str, Any]

ERROR_REF = "#/components/schemas/Error"
ERROR: Schema = {
    "type": "object",
    "description": "OpenAI's error body. `code` is a reason of pdcoord's closed list, or an engine's own.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": ["string", "null"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}

_TOKEN_ID: Schema = {"type": "integer", "minimum": 0, "maximum": TOKEN_ID_MAX}
_ANYTHING: Schema = {"type": ["string", "number", "boolean", "array", "object"]}
_FIELDS: dict[str, Schema] = {
    "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
}
_COMPLETIONS_PROMPT: Schema = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": _TOKEN_ID},
        {"type": "array", "items": {"type": "array", "items": _TOKEN_ID}},
    ]
}

_EVENT: Schema = {
    "type": "object",
    "description": "One event of the stream, sent when the call says `stream: true`; the last is `[DONE]`.",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}

_SUMMARIES = {
    "/v1/chat/completions": "Chat completion",
    "/v1/completions": "Completion",
    "/v1/responses": "Response",
    "/v1/messages": "Message, as Anthropic's API has it",
    "/v1/embeddings": "Embeddings",
    "/v1/rerank": "Rerank documents by a query",
    "/v1/score": "Score pairs of texts",
    "/tokenize": "Tokenize",
    "/detokenize": "Detokenize",
}


def summary(api: Api) -> str:
    return _SUMMARIES.get(api.path, api.path)


def request_body(api: Api) -> Schema:
    """The OpenAPI request body of a call: what pdcoord itself checks; the engine checks the rest."""
    return {"required": True, "content": {"application/json": {"schema": body_schema(api)}}}


def body_schema(api: Api) -> Schema:
    """What `parse_call` accepts; fields that it does not read may be anything."""
    fields = {name: _field(api, name) for group in api.required for name in group}
    fields |= {name: _field(api, name) for name in api.prompt_fields if name in _FIELDS}
    sure = {group[0] for group in api.required if len(group) == 1}
    properties: Schema = {
        "model": {"type": "string", "minLength": 1},
        **{name: schema if name in sure else _or_null(schema) for name, schema in fields.items()},
        "stream": {"type": ["boolean", "null"]},
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": CHOICE_COUNT_MAX},
        CACHE_SALT_FIELD: {"type": ["string", "null"]},
        **{name: _token_limit(name) for name in api.token_limit_fields},
        **{name: {"type": "null", "description": "Reserved."} for name in RESERVED_FIELDS},
    }
    schema: Schema = {"type": "object", "required": ["model", *sorted(sure)], "properties": properties}
    choices = [
        {"anyOf": [{"required": [name], "properties": {name: fields[name]}} for name in group]}
        for group in api.required
        if len(group) > 1
    ]
    if choices:
        schema["allOf"] = choices
    return schema


def answers(api: Api) -> dict[int | str, Schema]:
    """Responses of a call by status: an engine's own, or pdcoord's error."""
    content: Schema = {"application/json": {"schema": {"type": "object"}}}
    if api.is_generative:
        content["text/event-stream"] = {"schema": _EVENT}
    return {200: {"description": "The engine's answer, byte for byte.", "content": content}, **errors()}


def errors(schema: Schema | None = None) -> dict[int | str, Schema]:
    """Responses of whatever can fail; by default they refer to the gateway's error component."""
    content = {"application/json": {"schema": schema if schema is not None else {"$ref": ERROR_REF}}}
    return {
        "4XX": {
            "description": "The request is at fault, or the fleet is at its limits (429).",
            "content": content,
        },
        "5XX": {"description": "The request could not be served.", "content": content},
    }


MODEL: Schema = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "root"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "root": {"type": "string", "description": "The name that engines serve; differs for an alias."},
        "parent": {"type": ["string", "null"], "description": "The model that an adapter belongs to."},
    },
}
MODELS: Schema = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": MODEL}},
}
STATUS: Schema = {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}


def json_answer(description: str, schema: Schema) -> dict[int | str, Schema]:
    return {200: {"description": description, "content": {"application/json": {"schema": schema}}}}


def text_answer(description: str) -> dict[int | str, Schema]:
    return {200: {"description": description, "content": {"text/plain": {"schema": {"type": "string"}}}}}


def _field(api: Api, name: str) -> Schema:
    if api.path == "/v1/completions" and name == "prompt":
        return _COMPLETIONS_PROMPT
    return _FIELDS.get(name, _ANYTHING)


def _token_limit(name: str) -> Schema:
    limit: Schema = {"type": ["integer", "null"]}
    return limit if name == "min_tokens" else limit | {"minimum": 0}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}
