"""When a base's server begins its next batch: not among requests that still come, and not much later either."""

import asyncio

import pytest

from serve.base_server import GATHER_SHARE, BaseServer
from serve.engine import Engine
from serve.metrics import Metrics

pytestmark = pytest.mark.anyio
PAUSE_S = 0.04


@pytest.fixture
def anyio_backend():
    """The loop that servers run on."""
    return "asyncio"


async def gathered(base, last_batch_s, num_requests):
    """Gather while requests come, four to a pause, after a batch that took so long: how many came until then."""
    server = BaseServer(Engine(base, 1, 8), 4096, PAUSE_S, Metrics())
    server._last_batch_s = last_batch_s

    async def come():
        for number in range(num_requests):
            server._labels.add("key", 1, number)  # nobody wakes the server, so that they stay
            await asyncio.sleep(PAUSE_S / 4)

    coming = asyncio.create_task(come())
    await server._gather()
    num_gathered = len(server._labels)
    await coming
    await server.close()
    return num_gathered


async def test_the_next_batch_waits_until_no_more_requests_come(fresh_base):
    assert await gathered(fresh_base("encoder"), 100.0, 12) == 12


async def test_it_waits_for_a_share_of_the_last_ones_time_at_most(fresh_base):
    last_batch_s, num_requests = 10 * PAUSE_S, 60
    assert GATHER_SHARE * last_batch_s < num_requests * PAUSE_S / 4
    assert 0 < await gathered(fresh_base("encoder"), last_batch_s, num_requests) < num_requests


async def test_short_batches_are_not_held_up(fresh_base):
    assert await gathered(fresh_base("encoder"), PAUSE_S, 12) == 0
