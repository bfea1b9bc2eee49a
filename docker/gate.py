"""The only port that nodes reach: it passes the calls of SuperNodes and no others.

A SuperLink serves three APIs on one port. Only Fleet, which SuperNodes call, asks for a
key. Control (submit runs, register keys) and Runtime (fetch tasks) do not. So anyone
who reaches that port could register a key and run code on every node. The gate stands
between the SuperLink and the network.
"""

import os
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

ALLOWED = re.compile(r"/v1/fleet/[a-z-]+|/health")
# Headers of one connection, not of the message (RFC 9110, 7.6.1).
HOP_BY_HOP = b"connection host keep-alive te transfer-encoding upgrade".split()


@asynccontextmanager
async def superlink(app: Starlette) -> AsyncIterator[None]:
    """Hold the connections to the SuperLink while the gate runs."""
    async with httpx.AsyncClient(
        base_url=os.environ["SUPERLINK"],
        verify=ssl.create_default_context(cafile=os.environ["SUPERLINK_CA"]),
        timeout=httpx.Timeout(300, connect=10),
        trust_env=False,
    ) as app.state.superlink:
        yield


async def forward(request: Request) -> Response:
    """Pass a call to the SuperLink unchanged, and its answer back as it arrives."""
    # The decoded path is both checked and sent, so nothing decodes it a second time.
    path: str = request.scope["path"]
    if not ALLOWED.fullmatch(path):
        return PlainTextResponse("Only the Fleet API passes this gate.", 403)
    client: httpx.AsyncClient = request.app.state.superlink
    headers = [pair for pair in request.headers.raw if pair[0] not in HOP_BY_HOP]
    call = client.build_request(
        request.method, path, headers=headers, content=request.stream()
    )
    try:
        answer = await client.send(call, stream=True)
    except httpx.TransportError as error:
        # SuperNodes try again after a 503.
        return PlainTextResponse(f"The SuperLink does not answer: {error!r}", 503)
    response = StreamingResponse(
        answer.aiter_raw(), answer.status_code, background=BackgroundTask(answer.aclose)
    )
    response.raw_headers = [
        pair for pair in answer.headers.raw if pair[0].lower() not in HOP_BY_HOP
    ]
    return response


app = Starlette(
    routes=[Route("/{path:path}", forward, methods=["GET", "POST"])], lifespan=superlink
)
