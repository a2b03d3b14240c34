"""v9's accept_memory() and range_contains_unaccepted_memory() against the real ones, and the view in blocks."""

from __future__ import annotations

import gzip
import json
import random
from itertools import pairwise
from pathlib import Path

from guest.units import PMD_SIZE, SZ_1M, SZ_2M, SZ_4M
from kernel.unaccepted_memory import UnacceptedMemory

VECTORS = Path(__file__).parents[1] / "vectors" / "v9.jsonl.gz"
END = 1 << 40


def pairs(flat):
    return list(zip(flat[::2], flat[1::2], strict=True))


def make(bitmap, runs=()):
    """The functions over ``bitmap`` with ``runs`` of bits set, and the list of ranges that were accepted."""
    accepted = []
    for first, last in runs:
        bitmap.set(first, last)
    return UnacceptedMemory(bitmap, lambda start, end: accepted.append((start, end))), accepted


def play(case, bitmap):
    """Play the operations of one case; returns how many were compared."""
    unaccepted, accepted = make(bitmap, pairs(case["bits"]))
    compared = 0
    for name, start, end, *result in case["ops"]:
        if name == "R":
            assert unaccepted.range_contains_unaccepted_memory(start, end) == bool(result[0])
        elif name == "K":
            accepted.clear()
            unaccepted.accept_memory(start, end)
            assert accepted == pairs(result[1])
            assert [(first * PMD_SIZE, last * PMD_SIZE) for first, last in pairs(result[0])] == sorted(accepted)
            assert not any(bitmap is not None and bitmap.any(first, last) for first, last in pairs(result[0]))
        else:  # the decompressor's accept, not ours: follow what it cleared
            for first, last in pairs(result[0]):
                bitmap.clear(first, last)
        compared += name != "S"
    return compared


def test_vectors_of_the_real_v9_functions(new_bitmap):
    """Same answers, same cleared bits and same ranges accepted in the same order as the real code."""
    compared = 0
    with gzip.open(VECTORS, "rt") as lines:
        for case in map(json.loads, lines):
            compared += play(case, new_bitmap() if case["bm"] else None) if "ops" in case else 0
    assert compared == 15_116


def test_without_a_bitmap_nothing_happens():
    """If boot_params names no bitmap, all memory is accepted and nothing is asked of the platform."""
    unaccepted, accepted = make(None)
    unaccepted.accept_memory(0, END)
    assert not unaccepted.range_contains_unaccepted_memory(0, END)
    assert list(unaccepted.block_runs(0, SZ_4M, SZ_4M)) == [(0, SZ_4M, False)]
    assert accepted == []


def test_guard_is_accepted_behind_a_range_that_ends_on_2_mib(new_bitmap):
    """4 MiB at 16 MiB accept 6 MiB the first time; a range that ends inside a unit has no guard."""
    unaccepted, accepted = make(new_bitmap(), [(8, 20)])
    unaccepted.accept_memory(16 * SZ_1M, 20 * SZ_1M)
    unaccepted.accept_memory(20 * SZ_1M, 24 * SZ_1M)
    unaccepted.accept_memory(30 * SZ_1M, 32 * SZ_1M - 1)
    assert accepted == [
        (16 * SZ_1M, 22 * SZ_1M),
        (22 * SZ_1M, 26 * SZ_1M),
        (30 * SZ_1M, 32 * SZ_1M),
    ]


def test_guard_counts_as_part_of_the_question(new_bitmap):
    """Accepted memory right below an unaccepted unit counts as unaccepted up to the boundary."""
    unaccepted, _ = make(new_bitmap(), [(9, 40)])
    assert unaccepted.range_contains_unaccepted_memory(16 * SZ_1M, 18 * SZ_1M)
    assert not unaccepted.range_contains_unaccepted_memory(16 * SZ_1M, 18 * SZ_1M - 1)


def test_unaligned_start_can_miss_the_last_unit(new_bitmap):
    """From 17 MiB the kernel's steps do not reach the unaccepted unit at 18 MiB, although accept_memory does."""
    unaccepted, accepted = make(new_bitmap(), [(9, 32)])
    assert not unaccepted.range_contains_unaccepted_memory(17 * SZ_1M, 18 * SZ_1M + 4096)
    assert not unaccepted.range_contains_unaccepted_memory(17 * SZ_1M, 19 * SZ_1M)
    assert unaccepted.range_contains_unaccepted_memory(18 * SZ_1M, 18 * SZ_1M + 4096)
    unaccepted.accept_memory(17 * SZ_1M, 19 * SZ_1M)
    assert accepted == [(18 * SZ_1M, 20 * SZ_1M)]


def test_block_runs_say_what_the_kernel_says_of_each_block(new_bitmap):
    """For random bitmaps the runs cover the window, alternate, and agree with every single block's answer."""
    rng = random.Random(1)
    for _ in range(60):
        bits = [(first, first + rng.randrange(1, 6)) for first in rng.sample(range(80), rng.randrange(12))]
        unaccepted, _ = make(new_bitmap(), bits)
        size = rng.choice([SZ_2M, SZ_4M])
        start, end = sorted(rng.sample(range(0, 100 * SZ_2M, size), 2))
        runs = list(unaccepted.block_runs(start, end, size))
        assert [low for low, _, _ in runs] + [end] == [start] + [high for _, high, _ in runs]
        states = [state for low, high, state in runs for _ in range(low, high, size)]
        alone = [unaccepted.range_contains_unaccepted_memory(at, at + size) for at in range(start, end, size)]
        assert states == alone
        assert all(before[2] != after[2] for before, after in pairwise(runs))
