"""Batches that forward threads take and answer beside each other: the answers of one thread, and nobody waits for ever."""

import asyncio
import random
import threading
import time

import pytest
from test_engine import TASKS, assert_same, bound, make_engine, works_of  # noqa: F401  fixtures
from tiny_adapters import CARDS, SHORTEN, TEXTS

from serve.base_server import BaseServer
from serve.engine import Engine, Work
from serve.fair_lock import FairLock
from serve.metrics import Metrics

pytestmark = [pytest.mark.usefixtures("two_threads"), pytest.mark.anyio]
PATIENCE_S = 60


@pytest.fixture
def anyio_backend():
    """The loop that servers run on."""
    return "asyncio"


# Whose turn it is


def test_a_fair_lock_goes_to_whoever_waited_longest():
    lock, order, threads = FairLock(), [], []
    with lock:
        assert not lock.is_wanted
        for number in range(5):
            threads.append(threading.Thread(target=lambda number=number: take(lock, lambda: order.append(number))))
            threads[-1].start()
            until(lambda number=number: len(lock._waiting) == number + 1)
        assert lock.is_wanted
    for thread in threads:
        thread.join(PATIENCE_S)
    assert order == list(range(5))
    assert not lock.is_wanted
    take(lock, lambda: order.append(5))
    assert order[-1] == 5


def test_whoever_releases_a_fair_lock_does_not_get_it_back_before_others():
    lock, order = FairLock(), []
    with lock:
        other = threading.Thread(target=lambda: take(lock, lambda: order.append("other")))
        other.start()
        until(lambda: lock.is_wanted)
    take(lock, lambda: order.append("again"))
    other.join(PATIENCE_S)
    assert order == ["other", "again"]


def take(lock, then):
    with lock:
        then()


def until(holds):
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# The engine


def test_two_threads_answer_at_once_what_one_answers(bound, family):  # noqa: F811
    """Three adapters over two slots, so that each thread's batch may take the slot of what the other one has just left."""
    engine, keys = bound(family, num_slots=2)
    works = works_of(engine, keys)
    expected = dict(zip(map(id, works), engine.classify(works), strict=True))
    together, found = threading.Barrier(2, timeout=PATIENCE_S), []

    def worker(classify, num_threads):
        rng = random.Random(together.wait())
        for _ in range(15):
            batch = rng.sample(works, rng.randint(1, len(works)))
            together.wait()  # both compute now
            found.append((num_threads, batch, classify(batch)))

    before = engine.num_slot_loads
    engine.side_by_side(worker)
    assert len(found) == 30
    assert {num_threads for num_threads, _, _ in found} == {2}
    for _, batch, answers in found:
        assert_same(answers, [expected[id(work)] for work in batch])
    assert engine.num_slot_loads > before
    assert not engine._in_use
    assert_same(engine.classify(works), list(expected.values()))


def test_a_slot_that_a_thread_uses_is_not_taken_from_it(bound):  # noqa: F811
    engine, keys = bound("encoder", num_slots=2)
    works = works_of(engine, keys, TEXTS[:1])
    slots_of, scores, is_in, may_end = {}, engine._passes.scores_here, threading.Event(), threading.Event()

    def slow(slots, rows):
        if rows[0].slot == slots_of.setdefault("first", rows[0].slot) and not is_in.is_set():
            is_in.set()
            assert may_end.wait(PATIENCE_S)
        return scores(slots, rows)

    engine._passes.scores_here = slow
    turn = iter((0, 1))

    def worker(classify, num_threads):
        if next(turn) == 0:
            classify(works[:1])
        else:
            assert is_in.wait(PATIENCE_S)
            for _ in range(3):
                classify(works[1:])  # two adapters, one slot that is free for them
                assert engine.residents[keys[0]] == slots_of["first"]
            may_end.set()

    engine.side_by_side(worker)
    assert may_end.is_set()


def test_with_one_slot_one_thread_answers(bound):  # noqa: F811
    engine, keys = bound("encoder", num_slots=1)
    works = works_of(engine, keys)
    before, found = engine.classify(works), []
    engine.side_by_side(lambda classify, num_threads: found.append((num_threads, classify(works))))
    ((num_threads, answers),) = found
    assert num_threads == 1
    assert_same(answers, before)


# The server


async def test_under_a_flood_the_engine_is_bound_read_and_writes_texts(fresh_base, tiny_adapter):
    engine = Engine(fresh_base("seq2seq"), 2, 8)
    keys = [engine.bind(tiny_adapter("seq2seq", task, seed), 1) for seed, task in enumerate((*TASKS, SHORTEN))]
    works = works_of(engine, keys[:3])
    expected = dict(zip(map(id, works), engine.classify(works), strict=True))
    text = Work(keys[3], engine.prompt(keys[3], TEXTS[0]))
    written = engine.classify([text])[0].label
    server = BaseServer(engine, 512, 0.001, Metrics())
    is_over, num_answered = asyncio.Event(), 0

    async def ask(seed):
        nonlocal num_answered
        rng = random.Random(seed)
        while not is_over.is_set():
            batch = rng.sample(works, 3)
            answers = await asyncio.gather(*map(server.submit, batch))
            assert_same(answers, [expected[id(work)] for work in batch])
            num_answered += len(batch)

    flood = [asyncio.create_task(ask(seed)) for seed in range(16)]
    async with asyncio.timeout(PATIENCE_S):
        for version in (2, 3):
            seen = num_answered
            key = await asyncio.to_thread(engine.bind, tiny_adapter("seq2seq", CARDS, 5), version)
            assert len(await asyncio.to_thread(engine.embed, TEXTS, 64)) == len(TEXTS)
            assert (await server.submit(text)).label == written
            engine.unbind(key)
            while num_answered == seen:
                await asyncio.sleep(0)
        is_over.set()
        await asyncio.gather(*flood)
        await server.wait_until_idle()
    assert server.num_waiting == server._num_busy == 0
    await server.close()


async def test_two_bases_of_a_process_take_turns(fresh_base, tiny_adapter):
    servers = [BaseServer(Engine(fresh_base("encoder"), 2, 8), 512, 0.001, Metrics()) for _ in range(2)]
    is_over, num_answered = asyncio.Event(), [0, 0]

    async def ask(number):
        server = servers[number]
        key = server.engine.bind(tiny_adapter("encoder", TASKS[1], 1), 1)
        work = Work(key, server.engine.prompt(key, TEXTS[0]))
        while not is_over.is_set():
            await asyncio.gather(*(server.submit(work) for _ in range(4)))
            num_answered[number] += 4

    asking = [asyncio.create_task(ask(number)) for number in (0, 1, 0, 1)]
    async with asyncio.timeout(PATIENCE_S):
        while min(num_answered) < 100:
            await asyncio.sleep(0.01)
        is_over.set()
        await asyncio.gather(*asking)
    for server in servers:
        await server.close()
