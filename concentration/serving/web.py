"""The web page of `concentrate demo`, which answers an image that is dropped on it. It loads nothing from other sites."""

from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from concentration.serving.answering import Answerer
from concentration.serving.export_folder import ExportFolder
from concentration.serving.inputs import ImageInMemory
from concentration.serving.output import describe_answer

#: The largest image that is accepted, in bytes. A photograph has a few million.
MOST_BYTES = 2**26

#: The page may use no scripts, styles or pictures but its own.
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'"
_TYPES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}


def build_app(answerer: Answerer, export: ExportFolder, name: str, hosts: list[str]) -> Starlette:
    """The web application.

    Args:
        answerer: answers the images; it should rank inside each vertical.
        export: the export, which the page describes.
        name: what the page calls the network.
        hosts: the host names under which the page may be requested. Requests for others are refused, so that another site cannot
            reach the page through a visitor's browser (DNS rebinding).
    """
    about = {"name": name, "num_classes": export.taxonomy.num_classes, "verticals": list(export.taxonomy.verticals)}

    async def answer(request: Request) -> JSONResponse:
        try:
            content = await _read_body(request)
        except ClientDisconnect:
            return JSONResponse({"error": "did not arrive whole"}, status_code=400)  # nobody reads this any more
        if content is None:
            return JSONResponse({"error": f"is larger than {MOST_BYTES // 2**20} MB"}, status_code=413)
        [found] = await run_in_threadpool(answerer.answer, [ImageInMemory("image", content)])
        return JSONResponse(describe_answer(found), status_code=200 if found.error is None else 415)

    async def describe(request: Request) -> JSONResponse:
        return JSONResponse(about)

    routes = [Route("/answer", answer, methods=["POST"]), Route("/about", describe)]
    routes += [Route("/" if file == "page.html" else f"/{file}", _serve(file)) for file in _TYPES]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)])


async def _read_body(request: Request) -> bytes | None:
    """The content of a request; None if it is too large.

    Even then it is read to its end, since a browser does not listen to an answer while it is still sending.
    """
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes <= MOST_BYTES:
            parts.append(part)
        else:
            parts.clear()
    return b"".join(parts) if num_bytes <= MOST_BYTES else None


def _serve(file: str):
    content = Path(__file__).with_name(file).read_bytes()
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}

    async def serve(request: Request) -> Response:
        return Response(content, media_type=_TYPES[file], headers=headers)

    return serve
