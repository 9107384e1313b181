"""The page that a person opens at `/`, and the newest regression report at `/report`.

The page's files hold no data, so they need no API key; whatever they show comes through the routes that ask for one.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException

from multilora.errors import ForbiddenError
from serve.auth import ALL_TASKS
from serve.config import ServeConfig
from serve.error_table import RESPONSES
from serve.schema import Body

WEB = Path(__file__).parent / "web"
PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""The report is one file with its style inside, and no script."""


class Links(Body):
    """Where else to look."""

    report: str | None
    """Path of the newest regression report; null where there is none, or the key does not open it."""
    mlflow: str | None
    """Address of MLflow's pages; null where it is not known."""


def add_page(app: FastAPI, config: ServeConfig) -> None:
    """Add the page, the report and the links between them."""
    for path, (name, media_type) in PAGE_FILES.items():
        _add_file(app, path, (WEB / name).read_bytes(), media_type)

    @app.get("/v1/links", responses=RESPONSES)
    def links(request: Request) -> Links:
        """Say where the newest regression report and MLflow are."""
        has_report = _opens_report(request) and newest_report(config.reports_dir) is not None
        return Links(report="/report" if has_report else None, mlflow=config.mlflow_url)

    @app.get("/report", include_in_schema=False)
    def report(request: Request) -> FileResponse:
        if not _opens_report(request):
            raise ForbiddenError(f"the report shows every task, and key {request.state.key.id} does not open all of them")
        file = newest_report(config.reports_dir)
        if file is None:
            raise HTTPException(404, "there is no report here yet; it is written by: orchestrator submit tasks/*.yaml")
        headers = _headers(REPORT_POLICY) | {"Cache-Control": "no-store"}
        return FileResponse(file, media_type="text/html; charset=utf-8", headers=headers)


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    headers = _headers(PAGE_POLICY) | {"Cache-Control": "no-cache"}

    @app.get(path, include_in_schema=False)
    async def page_file() -> Response:
        return Response(content, media_type=media_type, headers=headers)


def newest_report(reports_dir: Path | None) -> Path | None:
    """The newest report's HTML file; report.json is written last, so its folder is whole."""
    found = sorted(reports_dir.glob("*/report.json")) if reports_dir else []
    return found[-1].with_name("report.html") if found else None


def _opens_report(request: Request) -> bool:
    """The report quotes examples of all tasks, so a key for some of them does not open it."""
    return request.state.key is None or request.state.key.opens(ALL_TASKS)


def _headers(policy: str) -> dict[str, str]:
    return {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
