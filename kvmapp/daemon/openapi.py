"""docs/openapi.json, made from routes.py and shapes.py: `python -m kvmapp.daemon.openapi > docs/openapi.json`.

OpenAPI 3.1.0. A test holds the file in docs/ to what this module makes.
"""
from __future__ import annotations

import json
import re

from kvmapp import __version__
from kvmapp.daemon import shapes
from kvmapp.daemon.routes import ROUTES, STATUS, Route

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

WIDTH = 120
ABOUT = ("The kvmapp daemon: HTTP/1.1 and JSON over UNIX sockets. /run/kvmapp/kvmapp.sock takes everything from members of group "
         "kvmapp; /run/kvmapp/kvmapp-sock-ro takes what changes nothing from everybody. A failed request answers with an Error.")


def description() -> dict:
    paths: dict[str, dict] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvmapp", "version": __version__,
                 "description": f"{ABOUT} HTTP statuses by code: {status_lines()}."},
        "servers": [{"url": "http://localhost", "description": "the host's name is not looked at"}],
        "paths": paths,
        "components": {"schemas": shapes.SCHEMAS},
    }


def status_lines() -> str:
    by_status: dict[int, list[str]] = {}
    for code, status in STATUS.items():
        by_status.setdefault(status, []).append(code)
    return "; ".join(f"{status}: {', '.join(codes)}" for status, codes in sorted(by_status.items())) + "; 500: any other"


def operation(route: Route) -> dict:
    parameters = [{"name": name, "in": "path", "required": True, "schema": shapes.text(),
                   "description": {"domain": "Id, UUID or name", "interface": "name"}.get(name, "UUID or name")}
                  for name in re.findall(r"{(\w+)}", route.path)]
    parameters += [{"name": name, "in": "query", "schema": shape} for name, shape in route.query.items()]
    kind = "application/jsonl" if route.name == "events" else "application/json"
    schema = shapes.ref(route.answer) if route.answer else {"type": "object"}
    one: dict[str, object] = {
        "operationId": route.name,
        "summary": route.help,
        "x-access": route.access,
        "responses": {
            str(route.status): {"description": route.answer or "OpenAPI", "content": {kind: {"schema": schema}}},
            "default": {"description": "It failed.",
                        "content": {"application/json": {"schema": shapes.record(error=shapes.ref("Error"))}}},
        },
    }
    if parameters:
        one["parameters"] = parameters
    if route.request:
        one["requestBody"] = {"content": {"application/json": {"schema": route.request}}}
    return one


def render() -> str:
    return "".join(layout(description())) + "\n"


def layout(value, indent: str = "", before: int = 0) -> Iterator[str]:
    """JSON where whatever fits on a line stands on one."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict) or len(indent) + before + len(line) <= WIDTH:
        yield line
        return
    yield "{"
    for number, (key, one) in enumerate(value.items()):
        start = f"{json.dumps(key)}: "
        yield f"{',' if number else ''}\n{indent}  {start}"
        yield from layout(one, indent + "  ", len(start))
    yield f"\n{indent}}}"


if __name__ == "__main__":
    print(render(), end="")
