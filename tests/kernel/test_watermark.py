"""Watermark formulas against numbers worked out by hand."""

from __future__ import annotations

import pytest

from kernel.watermark import (
    Watermarks,
    calculate_min_free_kbytes,
    lowmem_reserves,
    recommended_min_free_kbytes,
    zone_wmarks,
)


@pytest.mark.parametrize(
    ("lowmem_pages", "kbytes"),
    [(0, 128), (255, 128), (258, 128), (1_000_000, 8000), (1 << 24, 32_768), (1 << 40, 262_144)],
)
def test_min_free_kbytes_is_the_root_within_bounds(lowmem_pages, kbytes):
    """The root of 16 times the kilobytes, at least 128 and at most 262144."""
    assert calculate_min_free_kbytes(lowmem_pages) == kbytes


def test_khugepaged_raises_but_never_lowers():
    """22 MiB for each zone, at most 5 % of the buffer pages, and never less than before."""
    assert recommended_min_free_kbytes(8000, 3, 1_000_000) == 67_584
    assert recommended_min_free_kbytes(8000, 3, 100_000) == 20_000
    assert recommended_min_free_kbytes(90_000, 3, 1_000_000) == 90_000


def test_step_is_a_quarter_of_min_or_the_scale_factor():
    """In a small zone a quarter of min decides, in a large one a thousandth of the managed pages."""
    assert zone_wmarks(4000, 1000, 10_000) == Watermarks(100, 125, 150, 175)
    assert zone_wmarks(4000, 1_000_000, 10_000_000) == Watermarks(100, 1100, 2100, 3100)


def test_empty_zone_has_no_watermarks():
    """A zone without managed pages has zero for all, even if all zones are empty."""
    assert zone_wmarks(67_584, 0, 0) == Watermarks()


def test_reserve_grows_with_the_zones_above():
    """A zone keeps back a part of all managed pages between it and the zone that was asked for."""
    assert lowmem_reserves([2560, 25_600, 256_000])[:3] == [
        (0, 100, 1100, 1100, 1100),
        (0, 0, 1000, 1000, 1000),
        (0, 0, 0, 0, 0),
    ]


def test_empty_zone_keeps_nothing_back():
    """A zone without managed pages reserves nothing."""
    assert lowmem_reserves([0, 25_600, 256_000])[0] == (0, 0, 0, 0, 0)
