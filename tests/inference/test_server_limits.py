"""The parts of the server's limits, without a server."""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest

from vit_static.common.errors import UserError
from vit_static.inference.connections import ConnectionLimits, ConnectionTable, choose_limits, client_of
from vit_static.inference.log_limit import LogLimit
from vit_static.inference.request_limits import PixelBudget, SharedCount


@contextmanager
def descriptor_limit(number: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def choose(max_connections: int | None = None, max_per_client: int | None = None) -> ConnectionLimits:
    return choose_limits(max_connections, max_per_client, header_timeout_s=1.0, request_timeout_s=1.0)


def test_the_number_of_connections_fits_the_descriptors() -> None:
    with descriptor_limit(900):
        limits = choose()
        assert (limits.max_connections, limits.max_per_client) == (512, 256)
        assert choose(700, 700).max_per_client == 700
        with pytest.raises(UserError, match=r"--max-connections 890: the limit of 900 .*'ulimit -n'"):
            choose(890)
    with descriptor_limit(400):
        limits = choose()
        assert 100 < limits.max_connections < 400 - 80 and limits.max_per_client == limits.max_connections // 2
    with descriptor_limit(80), pytest.raises(UserError, match="80 file descriptors leaves none"):
        choose()


def test_what_counts_as_one_client() -> None:
    assert client_of(("10.1.2.3", 5)) == client_of(("::ffff:10.1.2.3", 7, 0, 0)) == "10.1.2.3"
    assert client_of(("2001:db8::1", 5, 0, 0)) == client_of(("2001:db8::ffff:1", 6, 0, 0)) == "2001:db8::/64"
    assert client_of(("2001:db8:0:1::1", 5, 0, 0)) != client_of(("2001:db8::1", 5, 0, 0))
    assert client_of(("fe80::1%eth0", 5, 0, 2)) == "fe80::/64"


def test_a_client_at_its_limit_leaves_room_for_others() -> None:
    refused: list[str] = []
    table = ConnectionTable(ConnectionLimits(max_connections=5, max_per_client=3), refused.append)
    greedy, other = [("10.0.0.1", port) for port in range(50)], [("10.0.0.2", port) for port in range(3)]
    admitted = [address for address in greedy if table.admit(address)]
    assert admitted == greedy[:35] and table.num_open == 3  # three, and 32 in the reserve
    assert refused == ["10.0.0.1"] * 47
    assert table.admit(other[0]) and table.admit(other[1]) and table.num_open == 5
    assert not table.admit(other[2])  # five in all
    table.release(greedy[0], is_reserved=False)
    assert table.admit(other[2]) and table.num_open == 5


def test_pixels_are_granted_in_order_and_a_cancelled_request_gives_them_back() -> None:
    async def run() -> None:
        budget, granted = PixelBudget(10), []

        async def take(name: str, num_pixels: int) -> None:
            granted.append((name, await budget.acquire(num_pixels, client="one")))

        tasks = {
            name: asyncio.ensure_future(take(name, number)) for name, number in zip("abcd", (6, 5, 4, 99), strict=True)
        }
        await asyncio.sleep(0)
        assert granted == [("a", 6)]  # c would fit, but comes after b
        tasks["b"].cancel()
        await asyncio.sleep(0.01)
        assert granted == [("a", 6), ("c", 4)]
        decoding: Future[None] = Future()
        budget.release_after(decoding, 6)
        budget.release(4)
        await asyncio.sleep(0.01)
        assert len(granted) == 2  # the thread still decodes
        await asyncio.to_thread(decoding.set_result, None)
        await asyncio.wait_for(tasks["d"], 5)
        assert granted[2] == ("d", 10)  # more than all: it waits for all

    asyncio.run(run())


def test_clients_that_wait_for_pixels_take_turns() -> None:
    async def run() -> None:
        budget, granted = PixelBudget(10), []

        async def take(client: str, name: str) -> None:
            num_pixels = await budget.acquire(10, client)
            granted.append(name)
            await asyncio.sleep(0)
            budget.release(num_pixels)

        greedy = [take("greedy", f"greedy {number}") for number in range(6)]
        others = [take(name, name) for name in ("second", "third")]
        await asyncio.wait_for(asyncio.gather(*greedy, *others), 5)
        assert granted[:4] == ["greedy 0", "greedy 1", "second", "third"] and len(granted) == 8

    asyncio.run(run())


def test_a_client_has_a_share() -> None:
    count = SharedCount(10, share=0.5)
    assert count.has_room("a", 5) and not count.has_room("a", 6)
    count.add("a", 5)
    assert not count.has_room("a", 1) and count.has_room("b", 5)
    count.add("b", 4)
    assert not count.has_room("c", 2) and count.has_room("c", 1)
    count.add("a", -5)
    assert count.has_room("a", 5) and count.total == 4
    assert SharedCount(1, share=0.1).has_room("a", 1) and SharedCount(10, share=3.0).has_room("a", 10)


def test_repeated_lines_are_counted_instead_of_written() -> None:
    now, records = [0.0], []
    limit = LogLimit(max_lines=2, interval_s=60.0, clock=lambda: now[0])
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    handler.addFilter(limit)
    logger = logging.Logger("limited")
    logger.addHandler(handler)
    for number in range(1000):
        logger.warning("client %d is wrong", number)
    logger.warning("another line")
    assert records == ["client 0 is wrong", "client 1 is wrong", "another line"]
    now[0] = 61.0
    logger.warning("client %d is wrong", 7)
    logger.warning("another line")
    assert records[3:] == ["client 7 is wrong (998 more like this in 61 s)", "another line"]
