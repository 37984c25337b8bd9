"""An application that has some operators' routes alone, asked as a key."""

from collections.abc import Sequence
from typing import Any

import httpx
from fastapi import FastAPI, Request
from starlette.responses import Response

from service.caller import Caller, Role
from service.endpoint import Call, Handler, json_response
from service.errors import SluicegateError
from service.policy import Policy

Routes = Sequence[tuple[str, str, Handler, Role]]


def client_of(routes: Routes, key_id: str | None = "key-a") -> httpx.AsyncClient:
    """Asks them as ``key_id``; who may ask is the endpoint's matter, not theirs."""
    app = FastAPI()
    for method, path, handler, _ in routes:
        app.api_route(path, methods=[method], response_class=Response)(_endpoint(handler, key_id))
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://sluicegate")


def _endpoint(handler: Handler, key_id: str | None) -> Any:
    async def answer(request: Request) -> Response:
        caller = Caller(Policy(), key_id)
        try:
            return await handler(Call(request, "id", await request.body(), caller))
        except SluicegateError as error:
            return json_response(error.body(), error.status)

    return answer


def data(answer: httpx.Response) -> Any:
    """What was answered, where it was no error."""
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(answer: httpx.Response) -> tuple[int, str, str | None]:
    """Status, code and the key at fault."""
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]
