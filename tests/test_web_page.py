"""The page at `/`: open, empty of data, strict about where anything comes from; and in a real browser, by keyboard alone."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from playwright.sync_api import Page, expect, sync_playwright
from tiny_adapters import MAIL, SHORTEN, TinyTask

import serve.pyfunc_model as pyfunc_model
from multilora.registry import CHAMPION
from orchestrator.config import OrchestratorConfig
from orchestrator.services import mlflow_url
from serve.app import build_app
from serve.auth import Doorkeeper, create_key
from serve.config import ServeConfig
from serve.guard import OPEN_PATHS
from serve.models_api import judgement_of
from serve.replica import Replica
from serve.web_page import PAGE_FILES, WEB, newest_report

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
EVIL = "<img src=x onerror=document.title='owned'>"
TONE = TinyTask("tone", (("glad", "is happy"), (EVIL, ""), ("<b>angry</b>", "")))
MANY = TinyTask("many", tuple((f"label-{number}", "") for number in range(9)))
TASKS = (("seq2seq", TONE), ("seq2seq", MANY), ("seq2seq", MAIL), ("seq2seq", SHORTEN))
REPORT = "<!doctype html><title>The report</title><p>all of it"


@pytest.fixture(scope="module")
def champions(registry, tiny_adapter):
    """Champions of four tasks and one that cannot be bound, until the module's tests end."""
    names = []
    for kind, task in TASKS:
        artifact = tiny_adapter(kind, task)
        run = registry.start_run(task.name, artifact.digest[:16], {}, {})
        version = registry.register(run, artifact.folder, artifact.digest, Path(pyfunc_model.__file__), "", {})
        if task is TONE:
            tags = {"verdict": "NON_INFERIOR", "accuracy": "0.9375", "num_gate_examples": "144"}
            registry.tag_version(version, tags)
        registry.set_alias(version, CHAMPION)
        names.append(task.name)
    artifact = tiny_adapter("seq2seq", MANY)
    run = registry.start_run("wrong", artifact.digest[:16], {}, {})
    version = registry.register(run, artifact.folder, artifact.digest, Path(pyfunc_model.__file__), "", {})
    registry.set_alias(version, CHAMPION)
    yield
    for name in (*names, "wrong"):
        registry.drop_alias(name, CHAMPION)


@pytest.fixture
def reports_dir(tmp_path):
    """A finished report, an older one, and one that is being written."""
    for name in ("20260101T000000", "20260202T000000", "20260303T000000"):
        (tmp_path / "reports" / name).mkdir(parents=True)
        (tmp_path / "reports" / name / "report.html").write_text(f"{REPORT} {name}", encoding="utf-8")
    for name in ("20260101T000000", "20260202T000000"):
        (tmp_path / "reports" / name / "report.json").write_text("{}", encoding="utf-8")
    return tmp_path / "reports"


@pytest.fixture
def endpoint(registry, tmp_path):
    """Run the endpoint on a free port: `with endpoint(keys_file=...) as url`."""

    @contextmanager
    def run(**settings):
        config = ServeConfig(tracking_uri=registry.tracking_uri, downloads_dir=tmp_path / "downloads", **settings)
        listener = socket.create_server(("127.0.0.1", 0))
        server: list[uvicorn.Server] = []

        async def serve_it():
            replica = Replica(config)
            await replica.sync()
            app = build_app(replica, Doorkeeper(config.keys_file), config)
            server.append(uvicorn.Server(uvicorn.Config(app, log_level="warning")))
            await server[0].serve([listener])
            await replica.close()

        thread = threading.Thread(target=asyncio.run, args=(serve_it(),))
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            # The listener takes connections from the start; they are answered once the champions are bound.
            assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200
            yield url
        finally:
            server[0].should_exit = True
            thread.join()

    return run


# What the server sends


def test_the_pages_files_are_open_and_strict(endpoint, tmp_path):
    with endpoint(keys_file=tmp_path / "keys.json") as url:
        for path, (_, media_type) in PAGE_FILES.items():
            answer = httpx.get(url + path)
            assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)
            assert answer.headers["content-security-policy"] == (
                "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
                "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
            )
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert httpx.post(url + path).status_code == 401, "only reading is open"
    assert {*PAGE_FILES} | {"/healthz", "/readyz"} == OPEN_PATHS


def test_the_files_name_no_other_host_and_no_inline_code():
    html, css, script = ((WEB / name).read_text(encoding="utf-8") for name in ("index.html", "page.css", "page.js"))
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", html + css + script)
    assert not re.findall(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=\"page.js\"></script>)", html)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage|cookie", script)


def test_without_a_key_there_is_no_data_and_no_other_file(champions, endpoint, tmp_path, reports_dir):
    _, some = create_key(tmp_path / "keys.json", "tone only", ["tone"], None, "")
    _, every = create_key(tmp_path / "keys.json", "all", ["*"], None, "")
    with endpoint(keys_file=tmp_path / "keys.json", reports_dir=reports_dir, mlflow_url="http://mlflow") as url:
        for path in ("/v1/models", "/v1/links", "/report", "/page.html", "/web/page.js", "/page.js/", "/../app.py",
                     "/%2e%2e/app.py", "/..%2fapp.py", "/page.js%2f..%2f..%2fapp.py", "//page.js"):  # fmt: skip
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as raw:
                # httpx would tidy the path up.
                raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                answer = b"".join(iter(lambda raw=raw: raw.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 401"), path
            assert b"tone" not in answer
        for path, (name, _) in PAGE_FILES.items():
            assert httpx.get(url + path).content == (WEB / name).read_bytes(), "the same for everybody"
        limited, whole = ({"Authorization": f"Bearer {secret}"} for secret in (some, every))
        assert httpx.get(f"{url}/v1/links", headers=limited).json() == {"report": None, "mlflow": "http://mlflow"}
        refused = httpx.get(f"{url}/report", headers=limited)
        assert refused.status_code == 403
        assert "does not open all of them" in refused.json()["error"]["message"]
        assert httpx.get(f"{url}/v1/links", headers=whole).json() == {"report": "/report", "mlflow": "http://mlflow"}
        assert httpx.get(f"{url}/report", headers=whole).text.endswith("20260202T000000")


def test_the_report_is_the_newest_whole_one_and_runs_no_script(endpoint, reports_dir, tmp_path):
    with endpoint(reports_dir=reports_dir) as url:
        answer = httpx.get(f"{url}/report")
        assert answer.text == f"{REPORT} 20260202T000000"
        assert "script-src" not in answer.headers["content-security-policy"]
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; style-src 'unsafe-inline'")
        assert (answer.headers["x-content-type-options"], answer.headers["cache-control"]) == ("nosniff", "no-store")
        shutil.rmtree(reports_dir)
        assert httpx.get(f"{url}/v1/links").json() == {"report": None, "mlflow": None}
        missing = httpx.get(f"{url}/report")
        assert missing.status_code == 404
        assert "there is no report here yet" in missing.json()["error"]["message"]
    assert newest_report(None) is None


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, (None, None, None)),
        ({"verdict": "NON_INFERIOR", "accuracy": "0.93", "num_gate_examples": "144"}, ("NON_INFERIOR", 0.93, 144)),
        ({"verdict": "REGRESSED", "macro_f1": "0.5"}, ("REGRESSED", None, None)),
        ({"accuracy": "good", "num_gate_examples": "9" * 5000}, (None, None, None)),
        ({"accuracy": "nan", "num_gate_examples": "-"}, (None, None, None)),
    ],
)
def test_what_anybody_wrote_into_a_tag_breaks_nothing(tags, expected):
    assert tuple(judgement_of(tags).values()) == expected


def test_a_version_tells_what_the_gate_found(champions, endpoint):
    with endpoint() as url:
        models = {model["id"]: model for model in httpx.get(f"{url}/v1/models").json()["data"]}
    assert [models["tone"][name] for name in ("verdict", "accuracy", "num_gate_examples")] == ["NON_INFERIOR", 0.9375, 144]
    assert [models["many"][name] for name in ("verdict", "accuracy", "num_gate_examples")] == [None, None, None]


def test_where_mlflow_is(tmp_path):
    def found(uri, host="0.0.0.0"):
        return mlflow_url(OrchestratorConfig(workspace=tmp_path, tracking_uri=uri), host)

    assert found("https://me:secret@mlflow.example:5000/x") == "https://mlflow.example:5000/x"
    assert found("sqlite:////tmp/mlflow.db") is None
    assert found(None, "127.0.0.1") is None


# In a browser


@pytest.fixture(scope="module")
def chromium():
    """A headless browser that every test opens pages of its own in."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Open a page that must stay without errors and must ask no other host: opened(url, width=360)."""
    pages, troubles = [], []

    def open_page(url, width=1280, allowed="nothing", **settings) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": 900}, **settings)
        page = context.new_page()
        pages.append(page)

        def hear(message):
            # Chromium itself reports every request that failed; such a one is what some tests are about.
            if message.type in ("error", "warning") and allowed not in message.text:
                troubles.append(message.text)

        page.on("console", hear)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: request.url.startswith((url, "data:", "blob:")) or troubles.append(request.url))
        page.add_init_script(
            "document.addEventListener('securitypolicyviolation', e => console.error('CSP ' + e.violatedDirective))"
        )
        page.goto(url)
        return page

    yield open_page
    for page in pages:
        page.context.close()
    assert troubles == []


def tab_to(page: Page, selector: str) -> None:
    """Press Tab until the element has the focus."""
    for _ in range(30):
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab never reaches {selector}")


def shown(share: float) -> str:
    """A probability as the page writes it."""
    return "<0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


@needs_browser
def test_it_lists_the_tasks_and_the_broken_champion(champions, endpoint, opened, reports_dir):
    with endpoint(reports_dir=reports_dir, mlflow_url="http://127.0.0.1:5000") as url:
        page = opened(url)
        expect(page.locator("#tasks th")).to_have_text(["mail", "many", "shorten", "tone"])
        row = page.locator("#tasks tr", has_text="tone")
        for text in ("NON_INFERIOR", "93.8 %", "of 144", "version 1", "in a slot", EVIL):
            expect(row).to_contain_text(text)
        expect(page.locator("#tasks tr", has_text="many")).to_contain_text("not judged")
        expect(page.locator("#tasks tr", has_text="many")).to_contain_text("and 5 more")
        expect(page.locator("#tasks tr", has_text="shorten")).to_contain_text("free text")
        expect(page.locator("#broken-list li")).to_contain_text("wrong@1")
        expect(page.locator("#broken-list li")).to_contain_text("register it under that name")
        assert [link.get_attribute("href") for link in page.locator("#links a").all()] == ["report", "http://127.0.0.1:5000"]
        with page.expect_popup() as report:
            page.get_by_role("link", name="Newest regression report").click()
        expect(report.value).to_have_title("The report")


@needs_browser
def test_a_text_is_tried_by_keyboard_alone_against_one_and_all(champions, endpoint, opened):
    with endpoint() as url:
        page = opened(url)
        expect(page.locator("#task option")).to_have_count(5)
        tab_to(page, "#task")
        page.keyboard.type("tone")
        tab_to(page, "#field-0")
        page.keyboard.type("the card is late")
        tab_to(page, "#ask button")
        page.keyboard.press("Enter")
        expect(page.locator("[role=status]")).to_contain_text("1 of 1 task answered. tone: ")
        asked = {"model": "tone", "input": "the card is late"}
        (result,) = httpx.post(f"{url}/v1/classify", json=asked).json()["results"]
        rows = page.locator(".bars li").all()
        shares = {row.locator(".label").inner_text(): row.locator(".number").inner_text() for row in rows}
        assert shares == {label: shown(share) for label, share in result["probabilities"].items()}
        expect(page.locator(".bars .best .label")).to_have_text(result["label"])

        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Home")  # all tasks
        expect(page.locator("#fields label")).to_have_text(["Text", "subject", "body"])
        tab_to(page, "[name=text]")
        expect(page.locator("[name=text]")).to_have_value("the card is late")
        page.keyboard.press("Control+Enter")
        expect(page.locator("[role=status]")).to_contain_text("3 of 4 tasks answered. mail: Not asked: subject and body are")
        expect(page.locator("#results h3")).to_have_text(["mail", "many", "shorten", "tone"])
        tab_to(page, "[name=subject]")
        page.keyboard.type("win")
        page.keyboard.press("Control+Enter")
        expect(page.locator("[role=status]")).to_contain_text("4 of 4 tasks answered")
        text = httpx.post(f"{url}/v1/generate", json={"model": "shorten", "input": "the card is late"}).json()["results"][0]
        assert page.locator("#results .text").text_content() == text["text"]
        tab_to(page, "#results summary")
        page.keyboard.press("Enter")
        expect(page.locator("details .bars li")).to_have_count(4)


@needs_browser
def test_what_looks_like_markup_is_text(champions, endpoint, opened):
    with endpoint() as url:
        page = opened(url)
        page.locator("#task").select_option("tone")
        page.locator("#field-0").fill("<script>document.title='owned'</script>")
        page.get_by_role("button", name="Ask").click()
        expect(page.locator(".bars .label", has_text=EVIL)).to_be_visible()
        assert page.locator("img").count() == page.locator("td b img, .label b").count() == 0
        assert page.title() == "Adapter orchestrator"


@needs_browser
def test_the_key_opens_its_tasks_and_stays_in_the_tab(champions, endpoint, opened, tmp_path, reports_dir):
    key, secret = create_key(tmp_path / "keys.json", "tone only", ["tone"], 1, "")
    _, every = create_key(tmp_path / "keys.json", "all", ["*"], None, "")
    with endpoint(keys_file=tmp_path / "keys.json", reports_dir=reports_dir) as url:
        page = opened(url, allowed="responded with a status of 4")
        expect(page.get_by_role("alert")).to_have_text("send your API key as the header Authorization: Bearer ak-...")
        expect(page.locator("#key")).to_be_focused()
        assert not page.locator("#try, #list").first.is_visible()
        page.keyboard.type(secret + "x")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("this API key is not known here; it may have been revoked")
        page.keyboard.type(secret)
        page.keyboard.press("Enter")
        expect(page.locator("#tasks th")).to_have_text(["tone"])
        expect(page.locator("#key-name")).to_have_text(f"Key ak-{key.id}-… in use.")
        assert secret not in page.content()
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.locator("#field-0").fill("late")
        page.keyboard.press("Control+Enter")
        expect(page.locator("[role=status]")).to_contain_text("1 of 1 task answered")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#results .error")).to_contain_text("may ask 1 inputs a minute; come again in")
        page.reload()
        expect(page.locator("#tasks th")).to_have_text(["tone"])
        page.get_by_role("button", name="Forget the key").click()
        expect(page.locator("#key")).to_be_focused()
        assert "tone" not in page.content()
        page.keyboard.type(every)
        page.keyboard.press("Enter")
        expect(page.locator("#tasks th")).to_have_count(4)
        with page.expect_download() as download:
            page.get_by_role("button", name="Download the newest regression report").click()
        assert download.value.path().read_text(encoding="utf-8").startswith(REPORT)


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (820, "light"), (1081, "light")])
def test_every_width_scrolls_in_one_direction_alone(champions, endpoint, opened, width, scheme):
    with endpoint() as url:
        page = opened(url, width=width, color_scheme=scheme, reduced_motion="reduce")
        page.locator("[name=text]").fill("the card is late " * 20)
        page.locator("[name=subject]").fill("a" * 300)
        page.keyboard.press("Control+Enter")
        expect(page.locator("[role=status]")).to_contain_text("4 of 4 tasks answered")
        page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("document.getAnimations().length") == 0
        heights = page.evaluate("[...document.querySelectorAll('#ask button, select')].map(part => part.offsetHeight)")
        assert min(heights) >= 40, "large enough for a thumb"


@needs_browser
def test_an_endpoint_that_went_away_is_said(champions, endpoint, opened):
    with endpoint() as url:
        page = opened(url, allowed="ERR_INTERNET_DISCONNECTED")
        page.locator("#task").select_option("tone")
        page.locator("#field-0").fill("late")
        page.context.set_offline(True)
        page.get_by_role("button", name="Ask").click()
        expect(page.locator("#results .error")).to_have_text("The endpoint does not answer. Is it still running?")
