"""Keys of our own: no two alike, whoever makes them."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor

from understudy.traffic.record import new_key


def many(count: int) -> list[str]:
    return [new_key() for _ in range(count)]


def test_no_two_keys_are_alike_in_threads_and_forked_children() -> None:
    many(3)  # random bytes are left over when the children begin
    with multiprocessing.get_context("fork").Pool(2) as children, ThreadPoolExecutor(4) as threads:
        begun = [children.apply_async(many, (500,)) for _ in range(4)]
        made = [key for part in threads.map(many, [2000] * 4) for key in part]
        made += [key for part in begun for key in part.get()]
    assert len(set(made)) == len(made) == 10_000
    assert len({key[16:] for key in made}) == 10_000  # by chance alone, whatever the clock says


def test_a_key_is_a_uuid_of_version_7_and_sorts_by_time() -> None:
    first = new_key()
    time.sleep(0.002)
    second = new_key()
    assert (len(first), first[12], first[16] in "89ab") == (32, "7", True)
    assert first < second
    assert abs(int(first[:12], 16) / 1000 - time.time()) < 5
