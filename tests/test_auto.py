"""`"model": "auto"` through the HTTP application: real adapters, real routers, a real registry.

Every test crowns its own champions, the router's included, in the shared registry and uncrowns them at its end.
"""

import asyncio
import json
import logging
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import httpx
import pytest
import uvicorn
from tiny_adapters import CARDS, MAIL, MOOD, SHORTEN, item_of
from tiny_routers import router_data, texts_of
from typer.testing import CliRunner

import serve.pyfunc_model as pyfunc_model
import serve.pyfunc_router as pyfunc_router
from multilora.registry import ADAPTER_PATH, CHAMPION, ROUTER
from multilora.task_router import TaskRouter, write_router
from orchestrator.cli import app as cli
from orchestrator.router_fit import fit_router
from serve.app import build_app
from serve.auth import Doorkeeper, create_key
from serve.config import ServeConfig
from serve.engine import Engine
from serve.guard import audit
from serve.replica import Replica

pytestmark = pytest.mark.anyio
KIND = "seq2seq"
TRIPS = replace(SHORTEN, name="trips")
LABELS = {task.name: {label for label, _ in task.labels} for task in (CARDS, MOOD, MAIL)}


@pytest.fixture
def anyio_backend():
    """The event loop that Ray Serve runs."""
    return "asyncio"


@pytest.fixture(scope="module")
def router_of(fresh_base, tmp_path_factory):
    """Fit a router over a tiny base, once: router_of() knows cards, mood and mail."""

    @cache
    def fit(tasks=("cards", "mood", "mail"), kind=KIND):
        engine = Engine(fresh_base(kind), 1, 1)
        return fit_router(router_data(engine.base.spec, tasks), engine, tmp_path_factory.mktemp("router") / ADAPTER_PATH)

    return fit


@pytest.fixture(scope="module")
def version_of(registry, tiny_adapter):
    """Register a task's adapter, once: version_of(CARDS, seed=2)."""

    @cache
    def register(task, seed=1, kind=KIND):
        artifact = tiny_adapter(kind, task, seed)
        run = registry.find_run(task.name, artifact.digest[:16]) or registry.start_run(task.name, artifact.digest[:16], {}, {})
        return registry.register(run, artifact.folder, artifact.digest, Path(pyfunc_model.__file__), "", {})

    return register


@pytest.fixture
def crown(registry, version_of, tmp_path):
    """Make adapters and routers champions until the test ends: crown(CARDS, MOOD, router); returns the last one's version."""
    crowned = set()

    def version_of_router(router):
        folder = tmp_path / router.digest / ADAPTER_PATH
        write_router(folder, router.card, router.weights_KH, router.bias_K)
        run = registry.find_run(ROUTER, router.digest[:16]) or registry.start_run(ROUTER, router.digest[:16], {}, {})
        return registry.register(run, folder, router.digest, Path(pyfunc_router.__file__), "", {})

    def crown_all(*wanted, **which):
        for one in wanted:
            version = version_of_router(one) if isinstance(one, TaskRouter) else version_of(one, **which)
            registry.set_alias(version, CHAMPION)
            crowned.add(version.task)
        return version

    yield crown_all
    for name in crowned:
        registry.drop_alias(name, CHAMPION)


@pytest.fixture
def changed(tmp_path):
    """A router with another card or weights and the digest that belongs to it: changed(router, threshold=1.0)."""

    def change(router, weight=1.0, **card):
        new = router.card.model_copy(update=card)
        return write_router(tmp_path / "changed", new, weight * router.weights_KH, router.bias_K)

    return change


@pytest.fixture
def serving(registry, tmp_path):
    """Run a replica that has looked at the registry, with its routes: `async with serving() as (replica, client)`."""

    @asynccontextmanager
    async def run(**settings):
        config = {"tracking_uri": registry.tracking_uri, "downloads_dir": tmp_path / "downloads", "retry_s": 0, **settings}
        settled = ServeConfig(**config)
        replica = Replica(settled)
        app = build_app(replica, Doorkeeper(settled.keys_file), settled)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://replica", timeout=60) as client:
            try:
                await replica.sync()
                yield replica, client
            finally:
                await replica.close()

    return run


async def ask(client, items, model=ROUTER, **headers):
    return await client.post("/v1/classify", json={"model": model, "input": items}, headers=headers)


def asked(task, num=3):
    """Items of a task that no router has seen."""
    return [item_of(task, text) for text in texts_of(task.name, num, "asked")]


def results_of(response):
    assert response.status_code == 200, response.text
    return response.json()["results"]


def error_of(response, status):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    return response.json()["error"]


# Answers


async def test_each_input_of_a_mixed_list_is_answered_by_its_task(crown, serving, router_of):
    versions = {task.name: crown(task) for task in (CARDS, MOOD, MAIL)}
    router = crown(router_of())
    pairs = [
        pair
        for trio in zip(*([(task, item) for item in asked(task)] for task in (MAIL, CARDS, MOOD)), strict=True)
        for pair in trio
    ]
    async with serving() as (replica, client):
        response = await ask(client, [item for _, item in pairs])
        body = response.json()
        assert (body["model"], body["version"], body["digest"]) == (ROUTER, router.version, router.digest)
        for (task, item), result in zip(pairs, results_of(response), strict=True):
            version = versions[task.name]
            assert (result["task"], result["version"], result["digest"]) == (task.name, version.version, version.digest)
            assert result["label"] in LABELS[task.name]
            (alone,) = results_of(await ask(client, item, task.name))
            assert result["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-3)
            route = result["route"]
            assert route["is_routed"] is True
            assert next(iter(route["candidates"])) == task.name
            assert route["probability"] == route["candidates"][task.name] == max(route["candidates"].values()) >= 0.5
        assert replica._store.num_in_use == 0


async def test_one_text_needs_no_list(crown, serving, router_of):
    crown(CARDS, MOOD, MAIL, router_of())
    async with serving() as (_, client):
        (text,) = texts_of("mood", 1, "asked")
        (result,) = results_of(await ask(client, text))
        assert result["task"] == "mood"
        # A text is the one column of `mood`; it cannot be both columns of `mail`, whose probability is thus not listed.
        assert set(result["route"]["candidates"]) == {"cards", "mood"}


async def test_the_audit_names_the_tasks_that_answered(crown, serving, router_of, caplog):
    crown(CARDS, MOOD, MAIL, router_of())
    async with serving() as (_, client):
        with caplog.at_level(logging.INFO, logger=audit.name):
            results_of(await ask(client, [*asked(MOOD, 1), *asked(CARDS, 1)]))
        assert "auto:cards,mood" in caplog.text


async def test_query_says_which_task_answered(crown, serving, router_of):
    crown(CARDS, MOOD, MAIL, router_of())
    version = crown(MOOD, seed=2)
    (text,) = texts_of("mood", 1, "asked")
    async with serving() as (replica, _):
        server = uvicorn.Server(uvicorn.Config(build_app(replica, Doorkeeper(None), replica._config), port=0, log_level="error"))
        running = asyncio.create_task(server.serve())
        async with asyncio.timeout(60):
            while not server.started:
                await asyncio.sleep(0)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        query = ["query", ROUTER, text, "--url", url]
        shown, told = [await asyncio.to_thread(CliRunner().invoke, cli, argv) for argv in (query, [*query, "--json"])]
        server.should_exit = True
        await running
    assert shown.stdout.endswith(f"; {version.key})\t{text}\n")
    found = json.loads(told.stdout)
    expected = {"input": text, "model": ROUTER, "task": "mood", "version": version.version, "digest": version.digest}
    assert expected.items() <= found.items()


# Abstention


async def test_where_any_input_is_unsure_nothing_is_answered_and_all_candidates_are_listed(crown, serving, router_of, changed):
    router = router_of()
    crown(CARDS, MOOD, MAIL, changed(router, threshold=0.8))
    unsure = "card happy wallet sad bank smile"
    async with serving() as (replica, client):
        error = error_of(await ask(client, [*asked(CARDS, 1), {"text": unsure}, *asked(MAIL, 1)]), 422)
        assert error["type"] == "UnroutedError"
        assert error["message"].startswith("the router is not sure of 1 of 3 inputs (input 2: ")
        assert error["message"].endswith("); name a task")
        assert [route["is_routed"] for route in error["routes"]] == [True, False, True]
        first, second, third = error["routes"]
        assert next(iter(first["candidates"])) == "cards"
        assert list(third["candidates"]) == ["mail"]
        # Every candidate of the input, most probable first.
        assert set(second["candidates"]) == {"cards", "mood"}
        assert second["probability"] == max(second["candidates"].values()) == next(iter(second["candidates"].values())) < 0.8
        assert replica._store.num_in_use == 0
        assert results_of(await ask(client, asked(CARDS, 1)))[0]["task"] == "cards"


async def test_a_threshold_of_one_routes_nothing_and_the_message_stays_short(crown, serving, router_of, changed):
    crown(CARDS, MOOD, MAIL, changed(router_of(), threshold=1.0))
    async with serving() as (_, client):
        error = error_of(await ask(client, asked(CARDS, 20)), 422)
        assert error["message"].count("input ") == 3
        assert len(error["routes"]) == 20


async def test_columns_that_the_best_task_does_not_have_are_no_input_for_it(crown, serving, router_of):
    crown(CARDS, MOOD, MAIL, router_of())
    mail_words = texts_of("mail", 1, "asked")[0]
    async with serving() as (_, client):
        for item in (mail_words, {"text": mail_words}):
            (route,) = error_of(await ask(client, item), 422)["routes"]
            assert route["is_routed"] is False
            assert set(route["candidates"]) == {"cards", "mood"}
            assert sum(route["candidates"].values()) < 0.5
        for item in ({"txt": mail_words}, {"subject": mail_words}, {}):
            error = error_of(await ask(client, item), 422)
            assert "input 1: no task that may answer" in error["message"]
            assert error["routes"] == [{"is_routed": False, "probability": 0, "candidates": {}}]


async def test_a_free_text_task_is_no_candidate(crown, serving, router_of):
    crown(CARDS, MOOD, TRIPS, router_of(("cards", "mood", "trips")))
    async with serving() as (_, client):
        (route,) = error_of(await ask(client, asked(TRIPS, 1)), 422)["routes"]
        assert set(route["candidates"]) == {"cards", "mood"}
        assert results_of(await ask(client, asked(MOOD, 1)))[0]["task"] == "mood"


async def test_a_task_whose_champion_went_away_is_no_candidate(crown, serving, router_of, registry):
    crown(CARDS, MOOD, MAIL, router_of())
    async with serving() as (replica, client):
        registry.drop_alias("mood", CHAMPION)
        await replica.sync()
        (route,) = error_of(await ask(client, asked(MOOD, 1)), 422)["routes"]
        assert set(route["candidates"]) == {"cards"}
        assert results_of(await ask(client, asked(CARDS, 1)))[0]["task"] == "cards"


async def test_bad_bodies_are_refused_as_for_any_task(crown, serving, router_of):
    crown(CARDS, MOOD, MAIL, router_of())
    async with serving(max_inputs_per_request=4) as (_, client):
        for items, seen in (([], "takes 1 to 4 inputs, this one has 0"), (["a"] * 5, "this one has 5"), (3, "body.input")):
            assert seen in error_of(await ask(client, items), 422)["message"]
        response = await client.post("/v1/generate", json={"model": ROUTER, "input": "a"})
        assert error_of(response, 404)["type"] == "UnknownTaskError"


# Keys


async def test_a_key_gets_no_answer_and_no_name_of_a_task_that_it_does_not_open(crown, serving, router_of, tmp_path):
    crown(CARDS, MOOD, MAIL, router_of())
    keys = tmp_path / "keys.json"
    secrets = {tasks: create_key(keys, "someone", tasks, None, "")[1] for tasks in (("cards",), ("mood", "mail"), ())}
    cards, others, everything = ({"Authorization": f"Bearer {secret}"} for secret in secrets.values())
    async with serving(keys_file=keys) as (_, client):
        assert (await ask(client, asked(CARDS))).status_code == 401

        (result,) = results_of(await ask(client, asked(CARDS, 1), **cards))
        assert (result["task"], list(result["route"]["candidates"])) == ("cards", ["cards"])
        response = await ask(client, [*asked(CARDS, 1), *asked(MOOD, 1), *asked(MAIL, 1)], **cards)
        routes = error_of(response, 422)["routes"]
        assert [route["is_routed"] for route in routes] == [True, False, False]
        assert [list(route["candidates"]) for route in routes] == [["cards"], ["cards"], []]
        assert "mood" not in response.text
        assert "mail" not in response.text

        response = await ask(client, asked(CARDS, 1), **others)
        assert "cards" not in response.text
        assert list(error_of(response, 422)["routes"][0]["candidates"]) == ["mood"]
        found = results_of(await ask(client, [*asked(MOOD, 1), *asked(MAIL, 1)], **others))
        assert [result["task"] for result in found] == ["mood", "mail"]
        assert "cards" not in json.dumps(found)

        found = results_of(await ask(client, [*asked(CARDS, 1), *asked(MOOD, 1)], **everything))
        assert [result["task"] for result in found] == ["cards", "mood"]


async def test_inputs_to_the_router_count_against_a_keys_limit(crown, serving, router_of, tmp_path):
    crown(CARDS, MOOD, router_of())
    _, secret = create_key(tmp_path / "keys.json", "someone", ["cards"], 3, "")
    async with serving(keys_file=tmp_path / "keys.json") as (_, client):
        headers = {"Authorization": f"Bearer {secret}"}
        assert len(results_of(await ask(client, asked(CARDS, 3), **headers))) == 3
        assert error_of(await ask(client, asked(CARDS, 1), **headers), 429)["type"] == "RateLimitError"


# Routers that come and go


async def test_without_a_router_the_caller_is_told_how_to_make_one(crown, serving):
    crown(CARDS)
    async with serving() as (_, client):
        error = error_of(await ask(client, "a"), 404)
        assert error["type"] == "UnknownTaskError"
        assert error["message"].endswith("orchestrator router train tasks/*.yaml")
        assert len(results_of(await ask(client, asked(CARDS), "cards"))) == 3


async def test_a_broken_router_is_503_for_auto_alone(crown, serving, router_of, changed):
    crown(CARDS, MOOD, MAIL, changed(router_of(), weight=0.0))
    async with serving() as (replica, client):
        error = error_of(await ask(client, "a"), 503)
        assert error["type"] == "AdapterError"
        assert error["message"].startswith("model auto cannot answer now: the router's canary scores differ by")
        assert len(results_of(await ask(client, asked(CARDS), "cards"))) == 3
        assert (await client.get("/readyz")).status_code == 200
        models = (await client.get("/v1/models")).json()["data"]
        assert {model["id"] for model in models if model["owned_by"] == "adapter"} == {"cards", "mood", "mail"}
        good = crown(router_of())
        await replica.sync()
        response = await ask(client, asked(CARDS))
        assert (response.status_code, response.json()["version"]) == (200, good.version)


async def test_a_good_router_goes_on_when_a_broken_one_is_crowned(crown, serving, router_of, changed):
    good = crown(CARDS, MOOD, MAIL, router_of())
    async with serving() as (replica, client):
        crown(changed(router_of(), weight=0.0))
        await replica.sync()
        response = await ask(client, asked(MOOD))
        assert (response.status_code, response.json()["digest"]) == (200, good.digest)


async def test_promotion_and_roll_back_of_the_router_are_followed(crown, serving, router_of, registry):
    first = crown(CARDS, MOOD, MAIL, router_of(("cards", "mood")))
    async with serving() as (replica, client):
        for made_of, knows_mail in (
            (("cards", "mood", "mail"), True),
            (("cards", "mood"), False),
            (("cards", "mood", "mail"), True),
        ):
            version = crown(router_of(made_of))
            await replica.sync()
            response = await ask(client, asked(CARDS))
            assert (response.json()["version"], response.json()["digest"]) == (version.version, version.digest)
            mail = await ask(client, asked(MAIL))
            assert (mail.status_code == 200) is knows_mail
        assert version.version != first.version
        registry.drop_alias(ROUTER, CHAMPION)
        await replica.sync()
        assert "there is no router yet" in error_of(await ask(client, asked(CARDS)), 404)["message"]


async def test_a_tag_on_the_routers_version_changes_nothing(crown, serving, router_of, registry):
    version = crown(CARDS, MOOD, router_of())
    async with serving() as (replica, client):
        registry.tag_version(version, {"decision": "seen"})
        await replica.sync()
        assert (await ask(client, asked(CARDS))).json()["digest"] == version.digest


async def test_a_router_waits_for_a_task_over_its_base(crown, serving, router_of):
    crown(CARDS, router_of(kind="causal"))
    async with serving() as (replica, client):
        error = error_of(await ask(client, "a"), 503)
        assert "which no served task has: promote a task over it, or train the router again" in error["message"]
        # Tasks of any base may answer, as soon as one of them brings the router's.
        crown(MOOD, kind="causal")
        await replica.sync()
        found = results_of(await ask(client, [*asked(CARDS, 1), *asked(MOOD, 1)]))
        assert [result["task"] for result in found] == ["cards", "mood"]
        assert len(replica._store.servers()) == 2


# Failures while answering


async def test_too_many_inputs_that_wait_are_429(crown, serving, router_of):
    crown(CARDS, MOOD, router_of())
    async with serving(max_queue_inputs=4, max_inputs_per_request=4) as (replica, client):
        (server,) = replica._store.servers()
        with server.engine._lock:
            first = asyncio.create_task(ask(client, asked(CARDS, 3)))
            async with asyncio.timeout(60):
                while not replica._auto._num_routing:
                    await asyncio.sleep(0)
            refused = await ask(client, asked(CARDS, 2))
        assert error_of(refused, 429)["message"] == "3 inputs are waiting; retry in a second"
        assert refused.headers["retry-after"] == "1"
        assert len(results_of(await first)) == 3
        assert replica._auto._num_routing == 0


async def test_a_task_that_fails_fails_the_request(crown, serving, router_of):
    crown(CARDS, MOOD, router_of())
    async with serving() as (replica, client):
        key = replica._champions["mood"].key
        for a_RI, _ in replica._store._bound[key].engine.bound(key).tensors.values():
            a_RI.mul_(float("nan"))
        replica._store._bound[key].engine._empty_slot(key)
        assert "mood@" in error_of(await ask(client, [*asked(CARDS, 1), *asked(MOOD, 1)]), 503)["message"]
        assert results_of(await ask(client, asked(CARDS, 1)))[0]["task"] == "cards"
        assert replica._store.num_in_use == 0
