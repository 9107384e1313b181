"""A challenger beside its champion, over real adapters and a real registry: a share of the requests, or in shadow.

A challenger is made to fail by spoiling its weights in host memory; the engine is kept busy by holding its thread.
"""

import asyncio
import json
from collections import Counter

import pytest
import test_app
from test_app import CARDS_1, CARDS_2, MOOD_1, SHORTEN_1, ask, assert_probabilities, engine_held, server_of, until
from tiny_adapters import CARDS, SHORTEN, TEXTS

from multilora.registry import CHALLENGER, CHAMPION
from serve.challenger import MAX_SHADOW_INPUTS
from serve.config import ServeConfig
from serve.live_counts import COUNTS, Pair
from serve.router import is_in_share

pytestmark = pytest.mark.anyio
anyio_backend, version_of, crown, serving, expected, broken = (
    test_app.anyio_backend, test_app.version_of, test_app.crown, test_app.serving, test_app.expected, test_app.broken
)  # fmt: skip
SHARE = 0.5
MANY = [f"question {number}" for number in range(20)]
SHORTEN_2 = ("seq2seq", SHORTEN, 2)


@pytest.fixture
def challenge(registry, version_of):
    """Make adapters the challengers of their tasks until the test ends; returns the last one's version."""
    tasks = set()

    def challenge_all(*adapters):
        for made_of in adapters:
            version = version_of(made_of)
            registry.set_alias(version, CHALLENGER)
            tasks.add(version.task)
        return version

    yield challenge_all
    for task in tasks:
        registry.drop_alias(task, CHALLENGER)


def counts_in(folder):
    """The counts of every pair in the only file of a folder."""
    (file,) = folder.glob("*.json")
    return dict(COUNTS.validate_json(file.read_bytes()))


async def spoil(replica, version, champion):
    """Let a bound adapter give no numbers any more; with a single slot, which another one gets before it."""
    await replica.classify(champion.key, ["a"])
    for a_RI, _ in replica._store.bound(version.key)[0].tensors.values():
        a_RI.mul_(float("nan"))


def mine(text):
    """Whether the challenger answers a request with this text alone."""
    return is_in_share("cards", [text], SHARE)


def best(probabilities):
    return max(probabilities, key=probabilities.get)


# Who answers


def test_the_share_is_kept_and_the_same_inputs_go_the_same_way():
    texts = [f"text {number}" for number in range(20_000)]
    for share in (0.01, 0.05, 0.5, 0.99):
        chosen = {text for text in texts if is_in_share("cards", [text], share)}
        assert len(chosen) / len(texts) == pytest.approx(share, abs=0.012)
        assert chosen == {text for text in texts if is_in_share("cards", [text], share)}
        assert chosen <= {text for text in texts if is_in_share("cards", [text], min(1.0, share + 0.2))}
    # Another task, another choice; a lone text and a column are the same; order counts, and no column's place does.
    assert {is_in_share(f"task-{number}", ["a"], 0.5) for number in range(50)} == {True, False}
    for text in texts[:50]:
        assert is_in_share("cards", [text], 0.5) == is_in_share("cards", [{"text": text}], 0.5)
        columns = {"subject": text, "body": "b"}
        assert is_in_share("mail", [columns], 0.5) == is_in_share("mail", [dict(reversed(columns.items()))], 0.5)
    turned = {is_in_share("cards", [text, "b"], 0.5) == is_in_share("cards", ["b", text], 0.5) for text in texts[:50]}
    assert turned == {True, False}
    assert is_in_share("cards", ["\ud800"], 0.0) is False  # half a surrogate pair, which JSON can carry


def test_settings_name_a_share_or_the_shadow(tmp_path):
    def settings(role):
        return ServeConfig(tracking_uri="sqlite:///x", downloads_dir=tmp_path, challengers={"cards": role})

    assert [settings(role).challengers["cards"] for role in (0.05, "shadow")] == [0.05, "shadow"]
    for role in (0, 1, 1.5, -0.1, "canary", float("nan")):
        with pytest.raises(ValueError, match="challengers"):
            settings(role)


async def test_a_share_of_the_requests_is_answered_by_the_challenger(crown, challenge, serving, expected, tmp_path):
    champion, challenger = crown(CARDS_1), challenge(CARDS_2)
    assert {mine(text) for text in MANY} == {True, False}
    async with serving(challengers={"cards": SHARE}, live_dir=tmp_path / "live") as (replica, client):
        await replica.sync()
        for text in MANY:
            for model in ("cards", champion.key, challenger.key):
                response = await client.post("/v1/classify", json={"model": model, "input": text})
                asked = challenger if model == challenger.key or (model == "cards" and mine(text)) else champion
                assert (response.json()["version"], response.json()["digest"]) == (asked.version, asked.digest)
                assert_probabilities(response, expected(CARDS_2 if asked == challenger else CARDS_1, [text]))
    counts = counts_in(tmp_path / "live")[Pair("cards", champion.version, challenger.version, "canary")]
    for side, made_of, is_challenger in ((counts.champion, CARDS_1, False), (counts.challenger, CARDS_2, True)):
        answers = expected(made_of, [text for text in MANY if mine(text) is is_challenger])
        assert (side.num_requests, side.num_inputs, side.num_abstained) == (len(answers), len(answers), 0)
        assert side.labels == Counter(map(best, answers))
        assert side.confidence == pytest.approx(sum(max(answer.values()) for answer in answers), abs=0.01)
        assert side.seconds > 0
    assert (counts.num_errors, counts.num_agreed, counts.table) == (0, 0, {})


async def test_a_batch_is_one_request_and_abstentions_are_counted(crown, challenge, serving, tmp_path):
    crown(CARDS_1)
    challenge(CARDS_2)
    batches = [MANY[first : first + 4] for first in range(0, 20, 4)]
    async with serving(challengers={"cards": 0.5}, live_dir=tmp_path / "live") as (replica, client):
        await replica.sync()
        for batch in batches:
            await client.post("/v1/classify", json={"model": "cards", "input": batch, "abstain_below": 1.0})
    (counts,) = counts_in(tmp_path / "live").values()
    num_mine = sum(is_in_share("cards", batch, 0.5) for batch in batches)
    for side, num_requests in ((counts.champion, 5 - num_mine), (counts.challenger, num_mine)):
        assert (side.num_requests, side.num_inputs, side.num_abstained) == (num_requests, *[4 * num_requests] * 2)


async def test_no_challenger_or_a_broken_one_leaves_everything_to_the_champion(
    crown, challenge, broken, registry, serving, expected, tmp_path
):
    wrong = broken()
    registry.set_alias(wrong, CHALLENGER)
    champion = crown(CARDS_1, MOOD_1)
    async with serving(challengers={"cards": SHARE, "mood": 0.9}, live_dir=tmp_path / "live") as (replica, client):
        await replica.sync()
        listed = (await client.get("/v1/models")).json()
        assert list(listed["broken"]) == [wrong.key, "mood@challenger"]
        assert "canary scores differ" in listed["broken"][wrong.key]
        assert [model["id"] for model in listed["data"]] == ["cards", "mood"]
        assert_probabilities(await ask(client, CARDS, MANY), expected(CARDS_1, MANY))
        for text in MANY[:5]:
            assert_probabilities(await ask(client, CARDS, [text]), expected(CARDS_1, [text]))
        challenger = challenge(CARDS_2)  # a good one comes
        await replica.sync()
        assert list((await client.get("/v1/models")).json()["broken"]) == ["mood@challenger"]
        text = next(text for text in MANY if mine(text))
        assert (await ask(client, CARDS, [text])).json()["version"] == challenger.version
        registry.drop_alias("cards", CHALLENGER)
        await replica.sync()
        assert_probabilities(await ask(client, CARDS, [text]), expected(CARDS_1, [text]))
        registry.set_alias(challenger, CHAMPION)  # promoted: it is both for a moment, and compared with nobody
        registry.set_alias(challenger, CHALLENGER)
        await replica.sync()
        assert (await ask(client, CARDS, [text])).json()["version"] == challenger.version
    (counts,) = counts_in(tmp_path / "live").values()
    assert counts.challenger.num_requests == 1
    assert champion.task == "mood"


async def test_the_champion_answers_where_the_challenger_fails(crown, challenge, serving, expected, tmp_path):
    champion, challenger = crown(CARDS_1), challenge(CARDS_2)
    async with serving(num_slots=1, challengers={"cards": SHARE}, live_dir=tmp_path / "live") as (replica, client):
        await replica.sync()
        await spoil(replica, challenger, champion)
        for text in MANY:
            assert_probabilities(await ask(client, CARDS, [text]), expected(CARDS_1, [text]))
        # What the champion refuses too is nobody's failure.
        text = next(text for text in MANY if mine(text))
        assert (await client.post("/v1/classify", json={"model": "cards", "input": {"txt": text}})).status_code == 422
        assert replica._store.num_in_use == 0
    (counts,) = counts_in(tmp_path / "live").values()
    assert counts.num_errors == sum(map(mine, MANY))
    assert (counts.champion.num_requests, counts.challenger.num_requests) == (20, 0)


# In shadow


async def test_in_shadow_the_champion_answers_and_both_are_compared(crown, challenge, serving, expected, tmp_path):
    champion, challenger = crown(CARDS_1), challenge(CARDS_2)
    async with serving(challengers={"cards": "shadow"}, live_dir=tmp_path / "live") as (replica, client):
        await replica.sync()
        for texts in ([*MANY], *([text] for text in MANY)):
            response = await ask(client, CARDS, texts)
            assert response.json()["version"] == champion.version
            assert_probabilities(response, expected(CARDS_1, texts))
        await until(lambda: replica._challengers._num_shadow_inputs == 0)
    counts = counts_in(tmp_path / "live")[Pair("cards", champion.version, challenger.version, "shadow")]
    pairs = 2 * list(zip(expected(CARDS_1, MANY), expected(CARDS_2, MANY), strict=True))
    assert counts.champion.num_requests == counts.challenger.num_requests == 21
    assert counts.champion.num_inputs == counts.challenger.num_inputs == 40
    assert counts.num_agreed == sum(best(old) == best(new) for old, new in pairs) < 40
    assert {tuple(json.loads(key)): n for key, n in counts.table.items()} == Counter((best(old), best(new)) for old, new in pairs)
    assert counts.difference == pytest.approx(sum(abs(old[best(old)] - new[best(old)]) for old, new in pairs), abs=0.05)
    assert (counts.num_errors, counts.num_dropped) == (0, 0)
    assert counts.challenger.seconds > 0
    (file,) = (tmp_path / "live").iterdir()
    assert "question" not in file.read_text(encoding="utf-8")


async def test_a_challenger_in_shadow_waits_until_nobody_else_does(crown, challenge, serving, expected):
    champion, challenger = crown(CARDS_1, MOOD_1), challenge(CARDS_2)
    async with serving(challengers={"cards": "shadow"}) as (replica, client):
        await replica.sync()
        server = server_of(replica, "cards")
        asked = []
        classify = server.engine.classify
        server.engine.classify = lambda works: asked.extend(work.key for work in works) or classify(works)
        with engine_held(replica, CARDS):
            first = asyncio.create_task(ask(client, CARDS, MANY[:2]))
            await until(lambda: replica._store.num_in_use == 1 and server.num_waiting == 0)
            others = [asyncio.create_task(ask(client, test_app.MOOD, TEXTS)) for _ in range(3)]
            await until(lambda: replica._store.num_in_use == 4)
        assert_probabilities(await first, expected(CARDS_1, MANY[:2]))
        await asyncio.gather(*others)
        await until(lambda: replica._challengers._num_shadow_inputs == 0)
        assert asked[-2:] == [challenger.key] * 2
        assert challenger.key not in asked[:-2]
        assert champion.task == "mood"


async def test_too_many_shadows_are_dropped_and_failures_are_nobodys(crown, challenge, serving, expected, tmp_path):
    champion, challenger = crown(CARDS_1), challenge(CARDS_2)
    async with serving(num_slots=1, challengers={"cards": "shadow"}, live_dir=tmp_path / "live") as (replica, client):
        await replica.sync()
        replica._challengers._num_shadow_inputs = MAX_SHADOW_INPUTS - 1  # as if so many waited
        assert_probabilities(await ask(client, CARDS, MANY[:2]), expected(CARDS_1, MANY[:2]))
        replica._challengers._num_shadow_inputs = 0
        await spoil(replica, challenger, champion)
        assert_probabilities(await ask(client, CARDS, MANY[:1]), expected(CARDS_1, MANY[:1]))
        await until(lambda: replica._challengers._num_shadow_inputs == 0)
        assert replica._store.num_in_use == 0
    (counts,) = counts_in(tmp_path / "live").values()
    assert (counts.num_dropped, counts.num_errors, counts.champion.num_requests) == (2, 1, 0)


async def test_free_texts_are_compared_and_not_kept(crown, challenge, serving, tmp_path):
    crown(SHORTEN_1)
    challenge(SHORTEN_2)
    async with serving(challengers={"shorten": "shadow"}, live_dir=tmp_path / "live") as (replica, client):
        await replica.sync()
        body = (await client.post("/v1/generate", json={"model": "shorten", "input": MANY[:3]})).json()
        await until(lambda: replica._challengers._num_shadow_inputs == 0)
    (counts,) = counts_in(tmp_path / "live").values()
    assert (counts.champion.num_inputs, counts.challenger.num_inputs) == (3, 3)
    assert (counts.table, counts.champion.labels, counts.champion.confidence) == ({}, {}, 0.0)
    (file,) = (tmp_path / "live").iterdir()
    assert not any(result["text"] in file.read_text(encoding="utf-8") for result in body["results"] if len(result["text"]) > 3)


async def test_nothing_is_counted_or_written_without_a_challenger(crown, serving, tmp_path):
    crown(CARDS_1)
    async with serving(live_dir=tmp_path / "live") as (replica, client):
        await replica.sync()
        await ask(client, CARDS, MANY)
    assert not (tmp_path / "live").exists()


# OpenAI's routes, and the end


async def test_labels_by_openais_routes_are_challenged_too(crown, challenge, serving, expected, tmp_path):
    champion, challenger = crown(CARDS_1), challenge(CARDS_2)
    async with serving(challengers={"cards": SHARE}, live_dir=tmp_path / "live") as (replica, client):
        await replica.sync()
        for text in MANY[:6]:
            asked, made_of = (challenger, CARDS_2) if mine(text) else (champion, CARDS_1)
            question = {"model": "cards", "messages": [{"role": "user", "content": text}]}
            response = await client.post("/v1/chat/completions", json=question)
            assert response.headers["x-adapter-digest"] == asked.digest
            (probabilities,) = expected(made_of, [text])
            assert response.json()["choices"][0]["message"]["content"] == best(probabilities)
        streamed = await client.post("/v1/completions", json={"model": "cards", "prompt": MANY[0], "stream": True})
        assert streamed.headers["x-adapter-digest"] == (challenger if mine(MANY[0]) else champion).digest
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert replica._store.num_in_use == 0
    (counts,) = counts_in(tmp_path / "live").values()
    assert counts.champion.num_requests + counts.challenger.num_requests == 7


async def test_the_counts_are_written_when_the_application_ends(crown, challenge, serving, tmp_path):
    crown(CARDS_1)
    challenge(CARDS_2)
    async with serving(challengers={"cards": SHARE}, live_dir=tmp_path / "live") as (replica, client):
        app = client._transport.app
        async with app.router.lifespan_context(app):
            await replica.sync()
            await ask(client, CARDS, MANY)
            assert not (tmp_path / "live").exists()
        assert len(counts_in(tmp_path / "live")) == 1
