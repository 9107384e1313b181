"""Keys: hashed on disk, compared whole, for their tasks and rate alone; without one only the health checks answer."""

import asyncio
import hashlib
import json
import logging
import stat
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from typer.testing import CliRunner

from multilora.errors import ForbiddenError, RateLimitError, RequestError, SpecError, UnauthorizedError
from orchestrator.cli import app as command_line
from orchestrator.config import OrchestratorConfig
from orchestrator.services import check_host
from serve.auth import Doorkeeper, create_key, read_keys, revoke_key
from serve.guard import Guard

WHEN = "2026-11-25T00:00:00+00:00"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "workspace" / "api_keys.json"


def bearer(secret):
    return f"Bearer {secret}"


def test_what_is_stored_tells_nobody_the_key(file):
    key, secret = create_key(file, "billing", ["mood"], 60, WHEN)
    other, _ = create_key(file, "other", [], None, WHEN)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret not in file.read_text(encoding="utf-8")
    assert secret.rpartition("-")[2] not in file.read_text(encoding="utf-8")
    assert key.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert read_keys(file) == (key, other)
    assert other.tasks == ("*",)
    assert not list(file.parent.glob(".*"))  # no draft is left


def test_a_key_opens_its_tasks_until_it_is_revoked(file):
    key, secret = create_key(file, "billing", ["mood", "mail"], None, WHEN)
    door = Doorkeeper(file)
    found = door.key_of(bearer(secret))
    assert found == key == door.key_of(f"bearer {secret}")
    found.check_task("mail")
    with pytest.raises(ForbiddenError, match=f"key {key.id} does not open task cards; it opens mood, mail"):
        found.check_task("cards")
    _, second = create_key(file, "later", ["*"], None, WHEN)
    assert door.key_of(bearer(second)).opens("anything")
    assert revoke_key(file, key.id) == key
    with pytest.raises(UnauthorizedError, match="not known here"):
        door.key_of(bearer(secret))
    with pytest.raises(RequestError, match=f"there is no key {key.id}; keys are "):
        revoke_key(file, key.id)


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Basic {secret}", "{secret}", "Bearer {secret}x", "Bearer {start}",
     "Bearer ak-00000000-{end}", "Bearer ak-{id}-", "Bearer -", "Bearer --", "Bearer ak-{id}-\u00e4", "Bearer {hash}"],
)  # fmt: skip
def test_what_is_not_the_whole_key_opens_nothing(file, header):
    key, secret = create_key(file, "billing", ["*"], None, WHEN)
    parts = {"secret": secret, "start": secret[:-1], "end": secret.rpartition("-")[2], "id": key.id, "hash": key.sha256}
    with pytest.raises(UnauthorizedError):
        Doorkeeper(file).key_of(header and header.format(**parts))


def test_a_keys_file_that_is_gone_or_broken_lets_nobody_in_and_tells_nobody_of_it(file, caplog):
    _, secret = create_key(file, "billing", ["*"], None, WHEN)
    door = Doorkeeper(file)
    assert door.key_of(bearer(secret))
    file.write_text('[{"id": "private"}]', encoding="utf-8")
    for _ in range(2):
        with pytest.raises(UnauthorizedError, match="not known here") as refused:
            door.key_of(bearer(secret))
        assert "private" not in str(refused.value)
    assert caplog.text.count(f"{file} is broken") == 1
    file.unlink()
    with pytest.raises(UnauthorizedError):
        door.key_of(bearer(secret))
    assert Doorkeeper(None).key_of(None) is None


def test_a_rate_is_a_minutes_worth_that_refills(file):
    key, _ = create_key(file, "billing", ["*"], 60, WHEN)
    now = [0.0]
    door = Doorkeeper(file, clock=lambda: now[0])
    door.count(key, 50)
    door.count(key, 10)
    with pytest.raises(RateLimitError, match=f"key {key.id} may ask 60 inputs a minute; come again in 5 s") as refused:
        door.count(key, 5)
    assert refused.value.retry_after_s == pytest.approx(5)
    now[0] = 5.0
    door.count(key, 5)
    now[0] = 1000.0
    door.count(key, 500)  # more than a minute's worth at once takes all there is
    with pytest.raises(RateLimitError):
        door.count(key, 1)
    unlimited, _ = create_key(file, "other", ["*"], None, WHEN)
    for _ in range(1000):
        door.count(unlimited, 100)


def test_only_with_keys_does_it_listen_for_other_machines(file):
    check_host("127.0.0.1", has_keys=False)
    check_host("0.0.0.0", has_keys=True)
    with pytest.raises(SpecError, match=r"will not listen on 0.0.0.0 without API keys.*orchestrator key create"):
        check_host("0.0.0.0", has_keys=False)


def test_keys_on_the_command_line(tmp_path):
    def run(*words):
        return CliRunner().invoke(command_line, ["key", *words, "--workspace", str(tmp_path)])

    first = run("create", "billing", "--tasks", "mood, mail", "--rate", "60")
    assert first.exit_code == 0
    assert "It is the first key" in first.output
    second = json.loads(run("create", "ops", "--tasks", "*", "--json").output)
    keys_file = OrchestratorConfig(workspace=tmp_path).keys_file
    assert Doorkeeper(keys_file).key_of(bearer(first.output.splitlines()[0])).tasks == ("mood", "mail")
    assert Doorkeeper(keys_file).key_of(bearer(second["key"])).id == second["id"]
    listed = json.loads(run("list", "--json").output)["keys"]
    assert [(key["name"], key["tasks"], key["max_inputs_per_minute"]) for key in listed] == [
        ("billing", ["mood", "mail"], 60), ("ops", ["*"], None)]  # fmt: skip
    assert "sha256" not in listed[0]
    assert "billing" in run("list").output
    assert run("create", "nobody", "--tasks", " , ").exit_code == 2
    assert run("revoke", second["id"]).exit_code == 0
    assert run("revoke", second["id"]).exit_code == 1


async def echo(scope, receive, send):
    """An application that says what it got, in the parts that it got."""
    message = await receive()
    scope["state"]["audit"] |= {"task": "mood", "version": 3, "digest": "d" * 64, "num_inputs": 2}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def refusal(error):
    return (
        {"UnauthorizedError": 401, "TooLargeError": 413, "CapacityError": 429}[type(error).__name__],
        {"error": str(error)},
        {"X-Kind": "refused"},
    )


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.mark.anyio
async def test_a_body_is_read_no_further_than_allowed(file):
    transport = httpx.ASGITransport(Guard(echo, Doorkeeper(None), 10, 12, refusal, lambda *of: None))

    async def endless():
        for _ in range(3):
            yield b"12345"
        raise AssertionError("read on after it was too much")

    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
        assert (await client.post("/", content=b"0123456789")).content == b"0123456789"
        for content in (b"0123456789a", endless()):
            answer = await client.post("/", content=content)
            assert (answer.status_code, answer.headers["x-kind"]) == (413, "refused")
            assert "at most 10 bytes" in answer.json()["error"]


@pytest.mark.anyio
async def test_bodies_that_wait_are_bounded_together():
    """Two requests of 8 bytes are more than 12; the second is told so, and the bytes of both are given back."""
    has_one, may_go = asyncio.Event(), asyncio.Event()

    async def slow(scope, receive, send):
        has_one.set()
        await may_go.wait()
        await echo(scope, receive, send)

    transport = httpx.ASGITransport(Guard(slow, Doorkeeper(None), 10, 12, refusal, lambda *of: None))
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
        for _ in range(2):
            first = asyncio.create_task(client.post("/", content=b"01234567"))
            await has_one.wait()
            second = await client.post("/", content=b"01234567")
            assert (second.status_code, second.headers["x-kind"]) == (429, "refused")
            may_go.set()
            assert (await first).content == b"01234567"
            has_one.clear()
            may_go.clear()


@pytest.mark.anyio
async def test_every_path_wants_the_key_and_leaves_a_line_without_the_text(file, caplog):
    key, secret = create_key(file, "billing", ["*"], None, WHEN)
    transport = httpx.ASGITransport(Guard(echo, Doorkeeper(file), 1000, 1000, refusal, lambda *of: None))
    caplog.set_level(logging.INFO, logger="serve.audit")
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
        for path in (
            "/",
            "/docs",
            "/openapi.json",
            "/v1/classify",
            "/healthz/",
            "/healthz%2f",
            "//healthz",
            "/readyz/x",
            "/HEALTHZ",
        ):
            assert (await client.post(path, content=b"x")).status_code == 401, path
        caplog.clear()
        answer = await client.post("/v1/classify", content=b"private words", headers={"Authorization": bearer(secret)})
    assert answer.content == b"private words"
    (line,) = caplog.messages
    digest = hashlib.sha256(b"private words").hexdigest()[:16]
    assert line.startswith("POST /v1/classify status=200 ms=")
    assert line.endswith(f"key={key.id} task=mood version=3 digest=dddddddddddd inputs=2 body={digest}")
    assert "private" not in line
    assert secret not in line


@pytest.mark.anyio
async def test_what_a_caller_sends_forges_no_line_and_no_field(caplog):
    async def tells_its_task(scope, receive, send):
        scope["state"]["audit"]["task"] = "mood status=200 key=admin\nPOST /v1/classify \u2028 task=other"
        await echo({**scope, "state": {"audit": {}}}, receive, send)

    caplog.set_level(logging.INFO, logger="serve.audit")
    transport = httpx.ASGITransport(Guard(tells_its_task, Doorkeeper(None), 1000, 1000, refusal, lambda *of: None))
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
        await client.post("/a%0Ab key=x", content=b"")
    (line,) = caplog.messages
    assert len(line.splitlines()) == 1
    fields = line.split(" ")
    assert [field.partition("=")[0] for field in fields[2:]] == [
        "status",
        "ms",
        "key",
        "task",
        "version",
        "digest",
        "inputs",
        "body",
    ]
    assert (fields[1], fields[4]) == ("/a\\nb\\x20key=x", "key=-")


def test_two_keys_created_at_once_are_both_kept(file):
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda number: create_key(file, f"team {number}", ["*"], None, WHEN)[0], range(24)))
    assert {key.id for key in read_keys(file)} == {key.id for key in made}
