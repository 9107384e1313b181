"""/metrics counts what happened, by task; what a caller invents is no label; several processes count together."""

import os
import subprocess
import sys

import pytest
import test_app
from prometheus_client.parser import text_string_to_metric_families
from test_app import CARDS_1, MOOD_1, ask
from tiny_adapters import CARDS, MOOD, TEXTS

from serve.auth import create_key
from serve.metrics import FOLDER_VARIABLE

pytestmark = pytest.mark.anyio
anyio_backend, version_of, crown, serving = test_app.anyio_backend, test_app.version_of, test_app.crown, test_app.serving
broken = test_app.broken


async def samples(client, **headers):
    """Every sample by (name, sorted label values)."""
    response = await client.get("/metrics", headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(response.text)
    return {(s.name, *(value for _, value in sorted(s.labels.items()))): s.value for family in families for s in family.samples}


async def test_requests_inputs_and_abstentions_are_counted_by_task(crown, serving):
    crown(CARDS_1, MOOD_1)
    async with serving() as (replica, client):
        await replica.sync()
        await ask(client, CARDS, TEXTS[:3])
        await ask(client, MOOD, TEXTS[:1])
        await client.post("/v1/classify", json={"model": "cards", "input": TEXTS[0], "abstain_below": 1.0})
        await client.post("/v1/classify", json={"model": "invented\n{name=1}", "input": TEXTS[0]})
        await client.get("/nowhere/invented")
        await replica.sync()
        seen = await samples(client)
        route = "/v1/classify"
        assert seen["adapters_requests_total", route, "200", "cards"] == 2
        assert seen["adapters_requests_total", route, "200", "mood"] == 1
        assert seen["adapters_requests_total", route, "404", "other"] == 1
        assert seen["adapters_requests_total", "other", "404", "other"] == 1
        assert seen["adapters_request_seconds_count", route, "cards"] == 2
        assert (seen["adapters_inputs_total", "cards"], seen["adapters_abstentions_total", "cards"]) == (4, 1)
        assert seen["adapters_queue_seconds_count", "cards"] == 4
        base = replica._store.servers()[0].engine.base.spec.model
        assert seen["adapters_batch_inputs_sum", base] == 5
        assert (seen["adapters_resident", base, "device"], seen["adapters_resident", base, "host"]) == (2, 2)
        assert (seen["adapters_loads_total", "ok", "cards"], seen["adapters_load_seconds_count",]) == (1, 2)
        assert seen["adapters_slot_loads_total", base] == 2
        assert not [name for name in seen if "invented" in "".join(name)]


async def test_broken_adapters_are_counted(broken, serving):
    broken()
    async with serving() as (replica, client):
        await replica.sync()
        await ask(client, CARDS, TEXTS[:1])
        seen = await samples(client)
        assert seen["adapters_loads_total", "failed", "cards"] == 1
        assert seen["adapters_requests_total", "/v1/classify", "503", "cards"] == 1


async def test_only_a_key_for_all_tasks_may_read_them(crown, serving, tmp_path):
    crown(CARDS_1)
    _, one = create_key(tmp_path / "keys.json", "one", ["cards"], None, "")
    _, all_tasks = create_key(tmp_path / "keys.json", "all", [], None, "")
    async with serving(keys_file=tmp_path / "keys.json") as (replica, client):
        await replica.sync()
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers={"Authorization": f"Bearer {one}"})).status_code == 403
        assert await samples(client, Authorization=f"Bearer {all_tasks}")


PROCESS = """
from serve.metrics import Metrics
metrics = Metrics()
metrics.inputs.labels("cards").inc(3)
metrics.waiting.labels("base").set(5)
print(metrics.exposition().decode())
"""


def test_processes_of_a_machine_count_together_and_the_dead_wait_no_longer(tmp_path):
    env = {**os.environ, FOLDER_VARIABLE: str(tmp_path)}
    for number in (1, 2):
        told = subprocess.run([sys.executable, "-c", PROCESS], env=env, check=True, capture_output=True, text=True).stdout
        assert f'adapters_inputs_total{{task="cards"}} {3.0 * number}' in told
        assert 'adapters_waiting_inputs{base="base"} 5.0' in told
