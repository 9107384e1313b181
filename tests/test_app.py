"""The endpoint over real adapters, a real registry and a real event loop: it answers with the champion, or says why not.

Every test crowns its own champions in the shared registry and uncrowns them at its end. A request is held in flight by
keeping the engine's thread busy; nothing waits for a clock.
"""

import asyncio
import json
import shutil
import threading
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file
from tiny_adapters import CARDS, MAIL, MOOD, SHORTEN, TEXTS, item_of

import serve.pyfunc_model as pyfunc_model
from multilora.artifact import CARD, WEIGHTS, read_artifact
from multilora.registry import CHAMPION
from serve.app import build_app
from serve.auth import Doorkeeper, create_key
from serve.config import ServeConfig
from serve.engine import Engine, Work
from serve.replica import Replica

pytestmark = pytest.mark.anyio
CODE = Path(pyfunc_model.__file__)
CARDS_1, CARDS_2, MOOD_1, MAIL_1 = ("encoder", CARDS, 1), ("encoder", CARDS, 2), ("encoder", MOOD, 1), ("encoder", MAIL, 1)
LETTERS_1 = ("seq2seq", replace(CARDS, name="letters"), 1)
SHORTEN_1 = ("seq2seq", SHORTEN, 1)
JSON = {"content-type": "application/json"}


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
        settled = ServeConfig(**config)
        replica = Replica(settled)
        app = build_app(replica, Doorkeeper(settled.keys_file), settled)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://replica", timeout=60) as client:
            try:
                yield replica, client
            finally:
                await replica.close()

    return run


@pytest.fixture(scope="module")
def expected(fresh_base, tiny_adapter):
    """Probabilities that an adapter gives alone: expected(("encoder", CARDS, 1), texts)."""

    @cache
    def engine_of(made_of):
        engine = Engine(fresh_base(made_of[0]), num_slots=1, max_rank=8)
        return engine, engine.bind(tiny_adapter(*made_of), 1)

    def answer(made_of, texts):
        engine, key = engine_of(made_of)
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
    thread = server_of(replica, task.name)._thread
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
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


def server_of(replica, task):
    """The base's server that answers a task."""
    return replica._store._bound[replica._champions[task].key]


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


async def test_long_input_is_cut_only_where_that_is_asked_for(crown, serving):
    crown(CARDS_1)
    async with serving() as (replica, client):
        await replica.sync()
        error = error_of(await ask(client, CARDS, ["card", "card " * 15_000]), 413)
        assert (error["code"], error["param"]) == ("too_large", "input")
        assert "input 2 does not fit the task's max_length of" in error["message"]
        assert "send truncate: true" in error["message"]
        question = {"model": "cards", "input": ["card " * 15_000, "card"], "truncate": True}
        body = (await client.post("/v1/classify", json=question)).json()
        assert [result["is_truncated"] for result in body["results"]] == [True, False]
        assert replica._store.num_in_use == 0


async def test_label_that_is_not_probable_enough_is_null(crown, serving, expected):
    crown(CARDS_1)
    (probabilities,) = expected(CARDS_1, TEXTS[:1])
    best = max(probabilities, key=probabilities.get)
    async with serving() as (replica, client):
        await replica.sync()
        for below, label in ((None, best), (0.0, best), (probabilities[best] - 1e-3, best), (probabilities[best] + 1e-3, None)):
            question = {"model": "cards", "input": TEXTS[0], "abstain_below": below}
            (result,) = (await client.post("/v1/classify", json=question)).json()["results"]
            assert (result["label"], result["is_abstained"]) == (label, label is None)
            assert result["probabilities"] == pytest.approx(probabilities, abs=1e-3)
        for below in (-0.1, 1.1, "high"):
            question = {"model": "cards", "input": TEXTS[0], "abstain_below": below}
            assert error_of(await client.post("/v1/classify", json=question), 422)["param"] == "abstain_below"


async def test_mixed_tasks_at_once_over_two_bases_with_few_slots(crown, serving, expected):
    tasks = [CARDS_1, LETTERS_1, MOOD_1, MAIL_1]
    crown(*tasks)
    async with serving(num_slots=2, max_batch_tokens=64) as (replica, client):
        await replica.sync()
        responses = await asyncio.gather(*(ask(client, made_of[1], TEXTS[:3]) for made_of in tasks * 4))
        for made_of, response in zip(tasks * 4, responses, strict=True):
            assert_probabilities(response, expected(made_of, TEXTS[:3]))


async def test_models_lists_what_answers(crown, serving):
    version = crown(CARDS_1, MAIL_1)
    async with serving(num_slots=1) as (replica, client):
        await replica.sync()
        body = (await client.get("/v1/models")).json()
        cards, mail = body["data"]
        assert (cards["id"], mail["id"], body["broken"]) == ("cards", "mail", {})
        assert (mail["version"], mail["digest"]) == (version.version, version.digest)
        assert cards["labels"] == ["card lost", "card late", "rate"]
        assert mail["columns"] == ["subject", "body"]
        assert sorted([cards["residency"], mail["residency"]]) == ["device", "host"]
        assert cards["base"].endswith("encoder")


async def test_texts_come_from_their_own_route(crown, serving):
    version = crown(("seq2seq", MOOD, 1), SHORTEN_1)
    async with serving() as (replica, client):
        await replica.sync()
        question = {"model": "shorten", "input": [TEXTS[0], "card " * 500]}
        assert error_of(await client.post("/v1/generate", json=question), 413)["code"] == "too_large"
        response = await client.post("/v1/generate", json=question | {"truncate": True})
        body = response.json()
        assert (body["model"], body["version"], body["digest"]) == ("shorten", version.version, version.digest)
        engine = server_of(replica, "shorten").engine
        works = [Work(version.key, engine.prompt(version.key, text)) for text in (TEXTS[0], "card " * 500)]
        assert [result["text"] for result in body["results"]] == [answer.label for answer in engine.classify(works)]
        assert [result["is_truncated"] for result in body["results"]] == [False, True]
        models = (await client.get("/v1/models")).json()["data"]
        assert {model["id"]: (bool(model["labels"]), model["owned_by"]) for model in models} == {
            "mood": (True, "adapter"),
            "shorten": (False, "adapter"),
            engine.base.spec.model: (False, "base"),
        }


async def test_the_wrong_route_names_the_right_one(crown, serving):
    crown(("seq2seq", MOOD, 1), SHORTEN_1)
    async with serving() as (replica, client):
        await replica.sync()
        for task, path, message in (
            ("shorten", "/v1/classify", "task shorten answers with free text: ask POST /v1/generate"),
            ("mood", "/v1/generate", "task mood answers with labels: ask POST /v1/classify"),
        ):
            error = error_of(await client.post(path, json={"model": task, "input": "a"}), 422)
            assert error == {"message": message, "type": "WrongRouteError", "param": "model", "code": "wrong_route"}
        assert replica._store.num_in_use == 0


# Refused requests


BAD_BODIES = [
    ({"model": "cards", "input": "a", "temperature": 1}, "temperature"),
    ({"model": "cards"}, "body.input"),
    ({"input": "a"}, "body.model"),
    ({"model": "cards", "input": 3}, "body.input"),
    ({"model": "cards", "input": [["a"]]}, "body.input"),
    ({"model": "cards", "input": "a" * 100_001}, "100000 characters"),
    ([], "body"),
    ({"model": "cards", "input": []}, "a request takes 1 to 4 inputs, this one has 0"),
    ({"model": "cards", "input": ["a"] * 5}, "a request takes 1 to 4 inputs, this one has 5"),
    ({"model": "mail", "input": "a"}, "input must give the columns subject, body; it gives body"),
    ({"model": "mail", "input": {"body": "a"}}, "input must give the columns subject, body; it gives body"),
    ({"model": "cards", "input": ["a", {"txt": "b"}]}, "input must give the columns text; it gives txt"),
    ({"model": "cards", "input": {}}, "it gives none"),
    # Half a surrogate pair: JSON can carry it, UTF-8 cannot.
    ({"model": "cards", "input": "\ud800"}, "unicode"),
    ({"model": "cards", "input": {"\ud800": "a"}}, r"it gives \ud800"),
    ({"model": "cards", "input": "a", "\ud800": "a"}, "body"),
]


async def test_bad_bodies_are_refused_with_what_is_wrong(crown, serving):
    crown(CARDS_1, MAIL_1)
    async with serving(max_inputs_per_request=4) as (replica, client):
        await replica.sync()
        for body, seen in BAD_BODIES:
            error = error_of(await client.post("/v1/classify", content=json.dumps(body), headers=JSON), 422)
            assert error["type"] == "RequestError"
            assert seen in error["message"], body
        assert replica._store.num_in_use == 0


async def test_bodies_that_are_no_json_are_refused(serving):
    async with serving() as (_, client):
        for content in (b"", b"{", b"\xff\xfe", b"null", b'{"model": "cards", "input": NaN}'):
            response = await client.post("/v1/classify", content=content, headers=JSON)
            assert error_of(response, 422)["type"] == "RequestError", content


async def test_unknown_task_lists_the_tasks(crown, serving):
    crown(CARDS_1, MOOD_1)
    async with serving() as (replica, client):
        response = await client.post("/v1/classify", json={"model": "weather", "input": "a"})
        assert error_of(response, 404)["message"] == "there is no task 'weather'; tasks are none yet"
        await replica.sync()
        for name in ("weather", "cards@99", "cards@0", "cards@x", "weather@1", "Cards", ""):
            response = await client.post("/v1/classify", json={"model": name, "input": "a"})
            assert error_of(response, 404)["message"] == f"there is no task {name!r}; tasks are cards, mood"


async def test_other_routes_are_refused_in_the_same_shape(serving):
    async with serving() as (_, client):
        for method, path, status in (("GET", "/v1/classify", 405), ("GET", "/nowhere", 404), ("POST", "/healthz", 405)):
            assert path in error_of(await client.request(method, path), status)["message"]


async def test_full_queue_is_429_with_retry_after_and_loses_nothing(crown, serving, expected):
    crown(CARDS_1)
    async with serving(max_queue_inputs=4, max_inputs_per_request=4) as (replica, client):
        await replica.sync()
        server = server_of(replica, "cards")
        with engine_held(replica, CARDS):
            first = asyncio.create_task(ask(client, CARDS, TEXTS[:1]))
            await until(lambda: replica._store.num_in_use == 1 and server.num_waiting == 0)
            second = asyncio.create_task(ask(client, CARDS, TEXTS[:4]))
            await until(lambda: server.num_waiting == 4)
            third = await ask(client, CARDS, TEXTS[:1])
            error = error_of(third, 429)
            assert (error["message"], error["code"]) == ("4 inputs are waiting; retry in a second", "overloaded")
            assert third.headers["retry-after"] == "1"
        assert_probabilities(await first, expected(CARDS_1, TEXTS[:1]))
        assert_probabilities(await second, expected(CARDS_1, TEXTS[:4]))
        assert_probabilities(await ask(client, CARDS, TEXTS[:4]), expected(CARDS_1, TEXTS[:4]))
        assert replica._store.num_in_use == 0


# Health


async def test_health_and_readiness(crown, serving):
    crown(CARDS_1)
    async with serving() as (replica, client):
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        before = await client.get("/readyz")
        assert (before.status_code, before.json()) == (503, {"is_ready": False})
        await replica.sync()
        after = await client.get("/readyz")
        assert (after.status_code, after.json()) == (200, {"is_ready": True})


async def test_registry_without_champions_is_ready_and_empty(serving):
    async with serving() as (replica, client):
        await replica.sync()
        assert (await client.get("/readyz")).status_code == 200
        assert (await client.get("/v1/models")).json() == {"object": "list", "data": [], "broken": {}}


# Promotion


async def test_promotion_and_roll_back_swap_the_version(crown, serving, expected):
    first = crown(CARDS_1)
    async with serving() as (replica, client):
        await replica.sync()
        second = crown(CARDS_2)
        assert (await ask(client, CARDS, TEXTS[:1])).json()["digest"] == first.digest
        for version, made_of in ((second, CARDS_2), (first, CARDS_1), (second, CARDS_2)):
            crown(made_of)
            await replica.sync()
            response = await ask(client, CARDS, TEXTS)
            assert (response.json()["version"], response.json()["digest"]) == (version.version, version.digest)
            assert_probabilities(response, expected(made_of, TEXTS))


async def test_requests_in_flight_finish_on_their_version(crown, serving, expected):
    first = crown(CARDS_1)
    async with serving() as (replica, client):
        await replica.sync()
        with engine_held(replica, CARDS):
            early = [asyncio.create_task(ask(client, CARDS, TEXTS)) for _ in range(3)]
            await until(lambda: replica._store._num_users[first.key] == 3)
            second = crown(CARDS_2)
            await replica.sync()
            late = asyncio.create_task(ask(client, CARDS, TEXTS))
            await until(lambda: replica._store._num_users[second.key] == 1)
        for task in early:
            response = await task
            assert response.json()["digest"] == first.digest
            assert_probabilities(response, expected(CARDS_1, TEXTS))
        assert (await late).json()["digest"] == second.digest
        assert_probabilities(await late, expected(CARDS_2, TEXTS))


async def test_roll_back_to_a_version_that_still_has_requests_is_at_once(crown, serving):
    first = crown(CARDS_1)
    async with serving() as (replica, client):
        await replica.sync()
        with engine_held(replica, CARDS):
            early = asyncio.create_task(ask(client, CARDS, TEXTS))
            await until(lambda: replica._store._num_users[first.key] == 1)
            crown(CARDS_2)
            await replica.sync()
            crown(CARDS_1)
            await replica.sync()
            late = asyncio.create_task(ask(client, CARDS, TEXTS))
            await until(lambda: replica._store._num_users[first.key] == 2)
        assert (await early).json()["digest"] == (await late).json()["digest"] == first.digest


async def test_answers_never_mix_versions_while_champions_change(crown, serving, expected):
    of_version = {crown(made_of).version: expected(made_of, TEXTS[:3]) for made_of in (CARDS_1, CARDS_2)}
    async with serving() as (replica, client):
        await replica.sync()
        responses = []
        for made_of in (CARDS_1, CARDS_2) * 3:
            crown(made_of)
            asking = [asyncio.create_task(ask(client, CARDS, TEXTS[:3])) for _ in range(4)]
            await replica.sync()
            responses += await asyncio.gather(*asking)
        for response in responses:
            assert_probabilities(response, of_version[response.json()["version"]])
        assert {response.json()["version"] for response in responses} == set(of_version)


async def test_champion_that_disappears_is_no_longer_served(crown, serving, registry):
    crown(CARDS_1, MOOD_1)
    async with serving() as (replica, client):
        await replica.sync()
        registry.drop_alias("cards", CHAMPION)
        await replica.sync()
        error = error_of(await client.post("/v1/classify", json={"model": "cards", "input": "a"}), 404)
        assert error["message"] == "there is no task 'cards'; tasks are mood"
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["mood"]
        assert (await ask(client, MOOD, TEXTS)).status_code == 200


# Versions by number, host memory


async def test_a_version_is_pinned_by_its_number(crown, serving, expected):
    first, second = crown(CARDS_1), crown(CARDS_2)
    async with serving() as (replica, client):
        await replica.sync()
        for version, made_of in ((first, CARDS_1), (second, CARDS_2), (first, CARDS_1)):
            response = await client.post("/v1/classify", json={"model": version.key, "input": TEXTS})
            assert_probabilities(response, expected(made_of, TEXTS))
            body = response.json()
            assert (body["model"], body["version"], body["digest"]) == (version.key, version.version, version.digest)
        assert (await ask(client, CARDS, TEXTS)).json()["digest"] == second.digest


async def test_a_key_for_a_task_opens_its_versions_and_no_others(crown, serving, tmp_path):
    version, other = crown(CARDS_1), crown(MOOD_1)
    _, secret = create_key(tmp_path / "keys.json", "cards only", ["cards"], None, "")
    async with serving(keys_file=tmp_path / "keys.json") as (replica, client):
        client.headers["Authorization"] = f"Bearer {secret}"
        await replica.sync()
        for key, status in ((version.key, 200), (other.key, 403)):
            assert (await client.post("/v1/classify", json={"model": key, "input": TEXTS[0]})).status_code == status
        unknown = await client.post("/v1/classify", json={"model": "cards@99", "input": TEXTS[0]})
        assert error_of(unknown, 404)["message"] == "there is no task 'cards@99'; tasks are cards"


async def test_more_adapters_than_host_memory_holds_come_and_go(crown, serving, expected):
    tasks = [CARDS_1, MOOD_1, MAIL_1]
    crown(*tasks)
    async with serving(num_host_adapters=1, num_slots=1) as (replica, client):
        await replica.sync()
        listed = {model["id"]: model for model in (await client.get("/v1/models")).json()["data"]}
        assert sorted(model["residency"] for model in listed.values()) == ["device", "registry", "registry"]
        assert {name for name, model in listed.items() if model["labels"] is None} == {"mail", "mood"}
        for made_of in tasks * 2:
            assert_probabilities(await ask(client, made_of[1], TEXTS), expected(made_of, TEXTS))
            assert len(replica._store._bound) == 1
            (server,) = replica._store.servers()
            assert list(server.engine._bound) == list(replica._store._bound)
        responses = await asyncio.gather(*(ask(client, made_of[1], TEXTS) for made_of in tasks * 3))
        for made_of, response in zip(tasks * 3, responses, strict=True):
            assert_probabilities(response, expected(made_of, TEXTS))


async def test_an_adapter_with_requests_in_flight_stays_in_host_memory(crown, serving, expected):
    crown(CARDS_1, MOOD_1)
    async with serving(num_host_adapters=1) as (replica, client):
        await replica.sync()
        with engine_held(replica, CARDS):
            asking = asyncio.create_task(ask(client, CARDS, TEXTS))
            await until(lambda: replica._store.num_in_use == 1)
            also = asyncio.create_task(ask(client, MOOD, TEXTS))
            await until(lambda: len(replica._store._bound) == 2)
        assert_probabilities(await asking, expected(CARDS_1, TEXTS))
        assert_probabilities(await also, expected(MOOD_1, TEXTS))


async def test_a_version_is_loaded_once_however_many_ask(crown, serving, expected, monkeypatch):
    crown(CARDS_1, MOOD_1)
    loaded = []
    bind = Engine.bind
    monkeypatch.setattr(Engine, "bind", lambda self, artifact, version: loaded.append(artifact) or bind(self, artifact, version))
    async with serving(num_host_adapters=1) as (replica, client):
        await replica.sync()
        assert [artifact.card.task for artifact in loaded] == ["cards"]
        responses = await asyncio.gather(*(ask(client, MOOD, TEXTS) for _ in range(8)))
        assert [artifact.card.task for artifact in loaded] == ["cards", "mood"]
        for response in responses:
            assert_probabilities(response, expected(MOOD_1, TEXTS))


async def test_a_load_goes_on_where_its_caller_leaves(crown, serving, expected):
    crown(CARDS_1, MOOD_1)
    async with serving(num_host_adapters=1) as (replica, client):
        await replica.sync()
        leaving = asyncio.create_task(ask(client, MOOD, TEXTS))
        await until(lambda: replica._store._loads)
        leaving.cancel()
        await until(lambda: not replica._store._loads)
        assert list(replica._store._bound) == [replica._champions["mood"].key]
        assert replica._store.num_in_use == 0


async def test_no_answer_in_time_is_504(crown, serving, expected):
    crown(CARDS_1)
    async with serving(deadline_s=0.05) as (replica, client):
        await replica.sync()
        with engine_held(replica, CARDS):
            error = error_of(await ask(client, CARDS, TEXTS), 504)
        assert error["code"] == "deadline_exceeded"
        assert error["message"] == "no answer within 0.05 s; send fewer inputs, or come again"
        assert replica._store.num_in_use == 0
    async with serving() as (replica, client):
        await replica.sync()
        assert_probabilities(await ask(client, CARDS, TEXTS), expected(CARDS_1, TEXTS))


# Champions that cannot be bound


async def test_broken_version_that_is_loaded_late_is_503_and_listed(broken, crown, serving, expected):
    crown(CARDS_1, MOOD_1)
    async with serving(num_host_adapters=1) as (replica, client):
        await replica.sync()
        version = broken()
        replica._champions["cards"] = version  # as if the first look had left it in the registry
        for _ in range(2):
            assert "canary scores differ" in error_of(await ask(client, CARDS, TEXTS), 503)["message"]
        models = (await client.get("/v1/models")).json()
        assert ([model["id"] for model in models["data"]], list(models["broken"])) == (["mood"], [version.key])
        assert_probabilities(await ask(client, MOOD, TEXTS), expected(MOOD_1, TEXTS))


@pytest.fixture
def broken(registry, tiny_adapter, tmp_path, crown):
    """Crown a version of CARDS whose weights are zero; its digest is right, its canaries are not."""
    artifact = tiny_adapter(*CARDS_2)
    folder = shutil.copytree(artifact.folder, tmp_path / "zeroed" / "adapter")
    save_file({name: x * 0 for name, x in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS, metadata={"format": "pt"})
    run = registry.start_run("cards", "zeroed", {}, {})

    def crown_broken():
        version = registry.register(run, folder, read_artifact(folder).digest, CODE, "", {})
        registry.set_alias(version, CHAMPION)
        return version

    yield crown_broken
    registry.drop_alias("cards", CHAMPION)


async def test_broken_champion_is_503_while_the_others_answer(broken, crown, serving, expected):
    version = broken()
    crown(MOOD_1)
    async with serving() as (replica, client):
        await replica.sync()
        error = error_of(await ask(client, CARDS, TEXTS[:1]), 503)
        assert error["type"] == "AdapterError"
        assert error["message"].startswith(f"task cards cannot answer now: {version.key}: canary scores differ")
        assert_probabilities(await ask(client, MOOD, TEXTS), expected(MOOD_1, TEXTS))
        models = (await client.get("/v1/models")).json()
        assert [model["id"] for model in models["data"]] == ["mood"]
        assert list(models["broken"]) == [version.key]
        assert (await client.get("/readyz")).status_code == 200


async def test_good_version_goes_on_answering_when_a_broken_one_is_crowned(broken, crown, serving, expected):
    good = crown(CARDS_1)
    async with serving() as (replica, client):
        await replica.sync()
        version = broken()
        await replica.sync()
        response = await ask(client, CARDS, TEXTS)
        assert response.json()["digest"] == good.digest
        assert_probabilities(response, expected(CARDS_1, TEXTS))
        assert list((await client.get("/v1/models")).json()["broken"]) == [version.key]
        crown(CARDS_1)
        await replica.sync()
        assert (await client.get("/v1/models")).json()["broken"] == {}


async def test_files_that_changed_after_registration_are_refused(crown, serving, registry, tiny_adapter, tmp_path):
    crown(CARDS_1)
    folder = shutil.copytree(tiny_adapter(*MOOD_1).folder, tmp_path / "changed" / "adapter")
    run = registry.start_run("mood", "changed", {}, {})
    version = registry.register(run, folder, "0" * 64, CODE, "", {})
    registry.set_alias(version, CHAMPION)
    async with serving() as (replica, client):
        await replica.sync()
        registry.drop_alias("mood", CHAMPION)
        assert "files changed" in error_of(await ask(client, MOOD, TEXTS[:1]), 503)["message"]
        assert (await ask(client, CARDS, TEXTS[:1])).status_code == 200


@pytest.mark.parametrize("damage", ["changed", "cut", "half", "empty", "gone"])
async def test_a_copy_that_is_damaged_on_this_machine_is_fetched_again(crown, serving, registry, expected, tmp_path, damage):
    version = crown(CARDS_1)
    folder = registry.download(version, tmp_path / "downloads")
    if damage == "changed":
        (folder / CARD).write_text((folder / CARD).read_text() + " ")
    elif damage == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])
    elif damage == "half":
        (folder / WEIGHTS).unlink()
    else:
        shutil.rmtree(folder)
        if damage == "gone":
            shutil.rmtree(tmp_path / "downloads")
    async with serving() as (replica, client):
        await replica.sync()
        assert_probabilities(await ask(client, CARDS, TEXTS), expected(CARDS_1, TEXTS))
        assert not replica.broken


async def test_adapter_registered_under_another_task_is_refused(registry, tiny_adapter, serving, crown, expected):
    crown(CARDS_1)
    artifact = tiny_adapter(*CARDS_2)
    run = registry.start_run("misnamed", "k", {}, {})
    version = registry.register(run, artifact.folder, artifact.digest, CODE, "", {})
    registry.set_alias(version, CHAMPION)
    async with serving() as (replica, client):
        await replica.sync()
        registry.drop_alias("misnamed", CHAMPION)
        error = error_of(await client.post("/v1/classify", json={"model": "misnamed", "input": "a"}), 503)
        assert "holds an adapter of task cards: register it under that name" in error["message"]
        assert_probabilities(await ask(client, CARDS, TEXTS), expected(CARDS_1, TEXTS))


@pytest.mark.parametrize("retry_s", [0, 1000])
async def test_champion_that_could_not_be_fetched_is_tried_again_later(crown, serving, expected, tmp_path, retry_s):
    crown(CARDS_1)
    (tmp_path / "downloads").touch()  # a file where the folder should be
    async with serving(retry_s=retry_s) as (replica, client):
        await replica.sync()
        error = error_of(await ask(client, CARDS, TEXTS[:1]), 503)
        assert "it could not be fetched or loaded (RegistryError); the endpoint's log says why" in error["message"]
        assert str(tmp_path) not in error["message"] + (await client.get("/v1/models")).text
        (tmp_path / "downloads").unlink()
        await replica.sync()
        response = await ask(client, CARDS, TEXTS)
        if retry_s:
            error_of(response, 503)
        else:
            assert_probabilities(response, expected(CARDS_1, TEXTS))
            assert not replica.broken


# Failures while answering


async def test_adapter_that_goes_bad_does_not_take_the_mixed_batch_with_it(crown, serving, expected):
    crown(CARDS_1, MOOD_1, MAIL_1)
    async with serving(num_slots=1) as (replica, client):
        await replica.sync()
        engine = server_of(replica, "cards").engine
        for a_RI, _ in engine.bound(replica._champions["cards"].key).tensors.values():
            a_RI.mul_(float("nan"))
        with engine_held(replica, CARDS):
            asking = [asyncio.create_task(ask(client, task, TEXTS[:2])) for task in (MOOD, CARDS, MAIL, MOOD)]
            await until(lambda: replica._store.num_in_use == 4)
        mood, cards, mail, _ = await asyncio.gather(*asking)
        assert "cards@" in error_of(cards, 503)["message"]
        assert_probabilities(mood, expected(MOOD_1, TEXTS[:2]))
        assert_probabilities(mail, expected(MAIL_1, TEXTS[:2]))


async def test_caller_that_leaves_before_a_promotion_harms_nobody(crown, serving, expected):
    crown(CARDS_1, MOOD_1)
    async with serving() as (replica, client):
        await replica.sync()
        with engine_held(replica, CARDS):
            blocking = asyncio.create_task(ask(client, MOOD, TEXTS[:1]))
            await until(lambda: replica._store.num_in_use == 1)
            leaving = asyncio.create_task(replica.classify("cards", TEXTS))
            await until(lambda: replica._store.num_in_use == 2)
            leaving.cancel()
            await asyncio.wait([leaving])
            assert replica._store.num_in_use == 1
            crown(CARDS_2)
            await replica.sync()
            staying = asyncio.create_task(ask(client, MOOD, TEXTS))
            await until(lambda: replica._store.num_in_use == 2)
        assert_probabilities(await staying, expected(MOOD_1, TEXTS))
        assert_probabilities(await blocking, expected(MOOD_1, TEXTS[:1]))
        assert_probabilities(await ask(client, CARDS, TEXTS), expected(CARDS_2, TEXTS))


async def test_failure_that_nobody_foresaw_has_the_same_shape(crown, serving):
    crown(CARDS_1)
    async with serving() as (replica, client):
        await replica.sync()
        replica._champions["cards"] = None
        error = error_of(await ask(client, CARDS, TEXTS[:1]), 500)
        assert (error["message"], error["code"]) == ("the server failed; its log says why", "internal_error")


# Following the registry


async def test_follower_brings_promotions_by_itself(crown, serving):
    first = crown(CARDS_1)
    async with serving(poll_s=0.01) as (replica, client):
        following = asyncio.create_task(replica.follow())
        await until(lambda: replica.is_ready)
        assert (await ask(client, CARDS, TEXTS[:1])).json()["digest"] == first.digest
        second = crown(CARDS_2)
        await until(lambda: replica._champions["cards"] == second)
        assert (await ask(client, CARDS, TEXTS[:1])).json()["digest"] == second.digest
        following.cancel()
        await asyncio.wait([following])


async def test_what_is_loaded_after_a_look_at_the_registry_does_not_put_off_the_next_one(crown, serving):
    crown(CARDS_1)
    async with serving() as (replica, _):
        await replica.sync()
        crown(CARDS_2)
        with engine_held(replica, CARDS):
            syncing = asyncio.create_task(replica.sync())
            await until(lambda: replica._store._loads)
            look_s = replica._look_s
        await syncing
        assert replica._look_s == look_s > 0


async def test_follower_outlives_a_registry_that_is_away(serving, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    async with serving(tracking_uri="http://127.0.0.1:9", poll_s=0.01) as (replica, client):
        following = asyncio.create_task(replica.follow())
        await until(lambda: caplog.text.count("registry unreadable") >= 2)
        assert not following.done()
        assert (await client.get("/readyz")).status_code == 503
        following.cancel()
        await asyncio.wait([following])


async def test_a_registry_that_is_away_is_503_without_its_address(serving, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    async with serving(tracking_uri="http://user:secret@127.0.0.1:9") as (_, client):
        error = error_of(await client.post("/v1/classify", json={"model": "cards@1", "input": "a"}), 503)
        assert error["code"] == "registry_unavailable"
        assert "secret" not in error["message"]
        assert "127.0.0.1" not in error["message"]


async def test_a_key_opens_its_tasks_alone_and_nothing_opens_without_one(serving, crown, tmp_path):
    version = crown(CARDS_1, MOOD_1)
    _, secret = create_key(tmp_path / "keys.json", "cards only", ["cards"], 5, "")
    headers = {"Authorization": f"Bearer {secret}"}
    question = {"model": "cards", "input": [TEXTS[0], TEXTS[1]]}
    async with serving(keys_file=tmp_path / "keys.json", max_body_bytes=2000) as (replica, client):
        await replica.sync()
        for path in ("/v1/classify", "/v1/generate", "/v1/models", "/v1/links", "/report", "/docs", "/openapi.json"):
            answer = await client.request("POST" if "ate" in path or "ify" in path else "GET", path, json=question)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
            assert answer.json()["error"]["type"] == "UnauthorizedError"
            assert "cards" not in answer.text
        assert (await client.get("/readyz")).status_code == (await client.get("/healthz")).status_code == 200

        answer = await client.post("/v1/classify", json=question, headers=headers)
        assert answer.status_code == 200
        assert len(answer.json()["results"]) == 2
        # It cannot even find out whether there is another task.
        for task in ("mood", "no-such-task"):
            answer = await client.post("/v1/classify", json={"model": task, "input": TEXTS[0]}, headers=headers)
            assert answer.status_code == 403
            assert f"does not open task {task}; it opens cards" in answer.json()["error"]["message"]
        assert [model["id"] for model in (await client.get("/v1/models", headers=headers)).json()["data"]] == ["cards"]

        assert (await client.post("/v1/classify", json=question, headers=headers)).status_code == 200
        answer = await client.post("/v1/classify", json=question, headers=headers)  # the fifth and sixth input of a minute
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 12
        assert answer.json()["error"]["type"] == "RateLimitError"
        answer = await client.post("/v1/classify", json={"model": "cards", "input": "x" * 3000}, headers=headers)
        assert answer.status_code == 413
    assert version.task == "mood"
