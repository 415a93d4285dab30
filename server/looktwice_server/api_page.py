"""The API reference: the server's OpenAPI in, docs/api.md out.

`python -m looktwice_server.api_page > docs/api.md` writes it; a test compares it with the OpenAPI
of a running server.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI

from looktwice_server import schemas
from looktwice_server.routes import TAG, InspectionRoutes

HEAD = """# API reference

Made from the server's own OpenAPI by `python -m looktwice_server.api_page > docs/api.md`; the
server shows the same at `/docs`. Errors are OpenAI's error object with the HTTP status they
deserve: [what bad input gets](bad-input.md). With `--api-key KEY` every route under `/v1` wants
the header `Authorization: Bearer KEY`.
"""

CHAT = """All other keys are
those of vLLM's chat completions, which are OpenAI's.

The answer is OpenAI's chat completion with one key more: `inspections`, a list of
[Inspection](#inspection), one for each picture of the conversation but those of
`reference_images`, in order of appearance; `image` says which. In a stream it stands on the last
chunk that has choices.
"""


def api_page(spec: Mapping[str, Any]) -> str:
    """The reference of our routes and objects in Markdown.

    Args:
        spec: an OpenAPI document; routes without our tag are left out.
    """
    parts = [HEAD]
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            if TAG in operation.get("tags", ()):
                parts.append(_route(f"{method.upper()} {path}", operation, spec))
    objects = spec["components"]["schemas"]
    parts += [_object(name, objects[name]) for name in _our_objects() if name in objects]
    return "\n".join(parts)


def _our_objects() -> list[str]:
    """Names of the wire's own objects, in the order in which they are written down."""
    classes = [value for value in vars(schemas).values() if isinstance(value, type)]
    return [one.__name__ for one in classes if issubclass(one, schemas.Strict)]


def _route(title: str, operation: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    lines = [f"## {title}\n", operation.get("description", "").strip() + "\n"]
    if parameters := operation.get("parameters"):
        schema = {
            "properties": {p["name"]: p["schema"] | p for p in parameters},
            "required": [p["name"] for p in parameters if p.get("required")],
        }
        lines += ["In the address:\n", *_table(schema)]
    if body := _json(operation.get("requestBody", {})):
        name = body["$ref"].rpartition("/")[2]
        schema = spec["components"]["schemas"][name]
        if name in _our_objects():
            lines += [f"The body: {_type(body)}.\n"]
        else:
            ours = _type(schema["properties"]["inspection"])
            lines += [f"Our key in the body: `inspection`, {ours}. {CHAT}"]
    if answer := _json(operation["responses"].get("200", {})):
        lines += [f"The answer: {_type(answer)}.\n"]
    return "\n".join(lines)


def _json(part: Mapping[str, Any]) -> Any:
    """The schema of a body or an answer; empty where there is none."""
    return part.get("content", {}).get("application/json", {}).get("schema", {})


def _object(name: str, schema: Mapping[str, Any]) -> str:
    about = " ".join(schema.get("description", "").split())
    return "\n".join([f"## {name}\n", f"{about}\n", *_table(schema)])


def _table(schema: Mapping[str, Any]) -> Iterator[str]:
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        default = "" if name in required else f"`{json.dumps(field.get('default'))}`"
        meaning = " ".join(field.get("description", "").split())
        yield f"| `{name}` | {_type(field)} | {default} | {meaning} |"
    yield ""


def _type(schema: Mapping[str, Any]) -> str:
    """A schema in words, with links to our objects."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "prefixItems" in schema:
        return f"[{', '.join(map(_type, schema['prefixItems']))}]"
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    kind = str(schema.get("type", "any"))
    if "minimum" in schema and "maximum" in schema:
        return f"{kind}, {schema['minimum']:g} to {schema['maximum']:g}"
    return kind


def main() -> None:
    """Print the page of this version's routes."""
    app = FastAPI()
    InspectionRoutes().attach_router(app)
    sys.stdout.write(api_page(app.openapi()))


if __name__ == "__main__":
    main()
