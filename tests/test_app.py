"""The endpoint over real adapters, a real registry and a real event loop: it answers with the champion, or says why not.

Every test crowns its own champions in the shared registry and uncrowns them at its end. A request is held in flight by
keeping the engine's thread busy; nothing waits for a clock.
"""

import asyncio
import json
import threading
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest
from tiny_adapters import CARDS, MAIL, MOOD, TEXTS, item_of

import serve.pyfunc_model as pyfunc_model
from multilora.artifact import CARD, WEIGHTS
from multilora.registry import CHAMPION
from serve.app import build_app
from serve.config import ServeConfig
from serve.engine import Engine, Work
from serve.replica import Replica

pytestmark = pytest.mark.anyio
CODE = Path(pyfunc_model.__file__)
CARDS_1, CARDS_2, MOOD_1, MAIL_1 = ("encoder", CARDS, 1), ("encoder", CARDS, 2), ("encoder", MOOD, 1), ("encoder", MAIL, 1)
CARDS_SEQ2SEQ = ("seq2seq", CARDS, 1)


@pytest.fixture
def anyio_backend():
    """The event loop that Ray Serve runs."""
    return "asyncio"


@pytest.fixture(scope="module")
def version_of(registry, tiny_adapter):
    """Register an adapter, once: version_of(("encoder", CARDS, 1)) -> its version."""

    def register(made_of):
        artifact = tiny_adapter(*made_of)
        key = artifact.digest[:16]
        task = artifact.card.task
        run = registry.find_run(task, key) or registry.start_run(task, key, {}, {})
        return registry.register(run, artifact.folder, artifact.digest, CODE, "", {})

    return register


@pytest.fixture
def crown(registry, version_of):
    """Make adapters the champions of their tasks until the test ends; returns the last one's version."""
    tasks = set()

    def crown_all(*adapters):
        for made_of in adapters:
            version = version_of(made_of)
            registry.set_alias(version, CHAMPION)
            tasks.add(version.task)
        return version

    yield crown_all
    for task in tasks:
        registry.drop_alias(task, CHAMPION)


@pytest.fixture
def serving(registry, tmp_path):
    """Run a replica with its routes: `async with serving(max_queue_inputs=4) as (replica, client)`."""

    @asynccontextmanager
    async def run(**settings):
        config = {"tracking_uri": registry.tracking_uri, "downloads_dir": tmp_path / "downloads", **settings}
        replica = Replica(ServeConfig(**config))
        transport = httpx.ASGITransport(build_app(replica), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://replica", timeout=60) as client:
            try:
                yield replica, client
            finally:
                await replica.close()

    return run


@pytest.fixture(scope="module")
def expected(fresh_base, tiny_adapter):
    """Probabilities that an adapter gives alone: expected(("encoder", CARDS, 1), texts)."""

    def answer(made_of, texts):
        engine = Engine(fresh_base(made_of[0]), num_slots=1, max_rank=8)
        key = engine.bind(tiny_adapter(*made_of), 1)
        works = [Work(key, engine.prompt(key, item_of(made_of[1], text))) for text in texts]
        return [dict(zip(a.labels, a.probabilities, strict=True)) for a in engine.classify(works)]

    return answer


async def ask(client, task, texts):
    return await client.post("/v1/classify", json={"model": task.name, "input": [item_of(task, text) for text in texts]})


async def until(is_true):
    """Let the event loop turn until the condition holds."""
    async with asyncio.timeout(60):
        while not is_true():
            await asyncio.sleep(0)


@contextmanager
def engine_held(replica, task):
    """Keep the engine that answers `task` busy, so that its requests stay in flight."""
    is_over = threading.Event()
    thread = replica._server_of[replica._keys[task.name]]._thread
    thread.submit(is_over.wait)
    try:
        yield
    finally:
        is_over.set()


def assert_probabilities(response, probabilities):
    assert response.status_code == 200, response.text
    for result, expected in zip(response.json()["results"], probabilities, strict=True):
        assert result["probabilities"] == pytest.approx(expected, abs=1e-3)
        assert result["label"] == max(result["probabilities"], key=result["probabilities"].get)


def error_of(response, status):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type"}
    return response.json()["error"]


# Answers


async def test_one_text_is_answered_by_the_champion(crown, serving, expected):
    version = crown(CARDS_1)
    async with serving() as (replica, client):
        await replica.sync()
        response = await client.post("/v1/classify", json={"model": "cards", "input": TEXTS[0]})
        assert_probabilities(response, expected(CARDS_1, TEXTS[:1]))
        body = response.json()
        assert (body["model"], body["version"], body["digest"]) == ("cards", version.version, version.digest)
        assert body["results"][0]["is_truncated"] is False


async def test_many_inputs_are_answered_in_order(crown, serving, expected):
    crown(MAIL_1)
    async with serving() as (replica, client):
        await replica.sync()
        assert_probabilities(await ask(client, MAIL, TEXTS), expected(MAIL_1, TEXTS))


async def test_long_input_says_that_it_was_cut(crown, serving):
    crown(CARDS_1)
    async with serving() as (replica, client):
        await replica.sync()
        body = (await ask(client, CARDS, ["card " * 15_000, "card"])).json()
        assert [result["is_truncated"] for result in body["results"]] == [True, False]


async def test_mixed_tasks_at_once_over_two_bases_with_few_slots(crown, serving, expected, registry, tiny_adapter):
    crown(CARDS_1, MOOD_1, MAIL_1)
    artifact = tiny_adapter(*CARDS_SEQ2SEQ)
    other = registry.register(registry.start_run("letters", "k", {}, {}), artifact.folder, artifact.digest, CODE, "", {})
    assert other.task == "letters"
    async with serving(num_slots=2, max_batch_tokens=64) as (replica, client):
        await replica.sync()
        tasks = [CARDS_1, MOOD_1, MAIL_1] * 4
        responses = await asyncio.gather(*(ask(client, made_of[1], TEXTS[:5]) for made_of in tasks))
        for made_of, response in zip(tasks, responses, strict=True):
            assert_probabilities(response, expected(made_of, TEXTS[:5]))
