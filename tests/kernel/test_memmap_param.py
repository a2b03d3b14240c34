"""``mem=`` and ``memmap=``: every form, what is refused, and what the kernel prints of the result."""

from __future__ import annotations

import pytest

from kernel.e820 import E820Table
from kernel.early_param import CoreMemory, parse_early_param
from kernel.memmap_param import MapEdit
from tests.kernel.plain_guest import GIB, LOW, MIB, booted, panicked

TOP = (1 << 64) - 1


@pytest.mark.parametrize(
    ("text", "edits"),
    [
        ("memmap=64M@16M", [MapEdit(16 * MIB, 64 * MIB, new=1)]),
        ("memmap=64K#0x18690000", [MapEdit(0x18690000, 0x10000, new=3)]),
        ("memmap=64M$0x10000000", [MapEdit(0x10000000, 64 * MIB, new=2)]),
        ("memmap=1G!4G", [MapEdit(4 * GIB, GIB, new=12)]),
        ("memmap=1G%4G-1+7", [MapEdit(4 * GIB, GIB, old=1, new=7)]),
        ("memmap=1G%4G+0xefffffff", [MapEdit(4 * GIB, GIB, new=0xEFFFFFFF)]),
        ("memmap=1G%4G-2", [MapEdit(4 * GIB, GIB, old=2)]),
        ("memmap=1G%4G", [MapEdit(4 * GIB, GIB)]),
        ("memmap=1G%4G-1+7x", []),
        ("memmap=1G", [MapEdit(GIB, TOP - GIB, old=1)]),
        ("memmap=exactmap,640K@0", [MapEdit(exactmap=True), MapEdit(0, 640 << 10, new=1)]),
        ("memmap=1M@1M memmap=2M@4M", [MapEdit(MIB, MIB, new=1), MapEdit(4 * MIB, 2 * MIB, new=1)]),
        ("memmap=@1M", []),
        ("memmap=", []),
        ("memmap", []),
        ("mem=1G", [MapEdit(GIB, TOP - GIB, old=1)]),
        ("mem=0", []),
        ("mem=x", []),
    ],
)  # fmt: skip
def test_forms(text, edits):
    """Sizes with suffixes, an operator, a start; several with commas; a malformed one changes nothing."""
    assert parse_early_param(text).map_edits == edits


def test_only_mem_says_that_it_is_malformed():
    """memmap= never complains as a whole; mem= of nothing does, and mem=nopentium is for 32 bits."""
    assert parse_early_param("memmap=x mem=0 mem=nopentium mem").notes == ("Malformed early option 'mem'",) * 3
    assert not parse_early_param("mem=nopentium").user_map
    assert parse_early_param("mem=0").user_map


def test_what_an_edit_says():
    """Updates and removals are said, additions are not; equal types, a BUG in the kernel, do nothing."""
    table = E820Table()
    table.range_add(0, GIB, 1)
    assert MapEdit(MIB, MIB, old=1, new=7).apply(table) == (
        "e820: update [mem 0x00100000-0x001fffff] usable ==> persistent (type 7)"
    )
    assert MapEdit(4 * MIB, MIB, old=1).apply(table) == "e820: remove [mem 0x00400000-0x004fffff] usable"
    assert MapEdit(4 * MIB, MIB).apply(table) == "e820: remove [mem 0x00400000-0x004fffff] "
    assert MapEdit(4 * MIB, MIB, new=1).apply(table) is None
    assert MapEdit(4 * MIB, MIB, old=1, new=1).apply(table) is None
    assert MapEdit(exactmap=True).apply(table) is None
    assert len(table) == 0


def test_exactmap_is_the_whole_map():
    """Nothing of the firmware's map stays, and the user's own is printed."""
    kernel, log = booted(cmdline="memmap=exactmap,640K@0,1G@1M")
    start = log.index("user-defined physical RAM map:")
    assert log[start + 1 : start + 3] == [
        "user: [mem 0x0000000000000000-0x000000000009ffff] usable",
        "user: [mem 0x0000000000100000-0x00000000400fffff] usable",
    ]
    assert kernel.max_pfn == (GIB + MIB) >> 12
    assert [entry.addr for entry in kernel.e820_firmware] == [start for start, _, _ in (*LOW, (4 * GIB, 0, 0))]


def test_a_map_that_cannot_be():
    """A map that wraps is refused with the kernel's words."""
    text = panicked((*LOW,), "memmap=exactmap,1G@0,0xffffffffffffffff@2")
    assert text == "Invalid user supplied memory map"


@pytest.mark.parametrize(
    ("text", "core", "movable"),
    [
        ("kernelcore=512M", CoreMemory(512 * MIB), CoreMemory()),
        ("kernelcore=50%", CoreMemory(percent=50), CoreMemory()),
        ("movablecore=0x10%", CoreMemory(), CoreMemory(percent=16)),
        ("movablecore=1G kernelcore=2G movablecore=3G", CoreMemory(2 * GIB), CoreMemory(3 * GIB)),
    ],
)
def test_core_sizes(text, core, movable):
    """Sizes or per cents; the last one wins."""
    params = parse_early_param(text)
    assert (params.kernelcore, params.movablecore) == (core, movable)


def test_other_parameters():
    """Each is kept with its meaning; what nobody knows is kept as text."""
    params = parse_early_param(
        "kernelcore=mirror movable_node numa=off memblock=debug log_buf_len=4M page_alloc.shuffle=1 what=ever"
    )
    assert params.mirrored_kernelcore and params.movable_node and params.numa_off and params.memblock_debug
    assert (params.log_buf_len, params.shuffle) == (4 * MIB, True)
    assert params.values["what"] == "ever"
    assert params.notes == ()


@pytest.mark.parametrize(
    ("text", "address", "refused"),
    [
        ("fake_unaccepted_start=1G", GIB, False),
        ("fake_unaccepted_start=0x1000", 0x1000, False),
        ("fake_unaccepted_start=1Gx", None, True),
        ("fake_unaccepted_start", None, True),
        ("fake_unaccepted_start=1G fake_unaccepted_start=2Gx", None, True),
        ("", None, False),
    ],
)
def test_fake_unaccepted_start(text, address, refused):
    """An address; text behind it turns the feature off again."""
    params = parse_early_param(text)
    assert (params.fake_unaccepted_start, bool(params.notes)) == (address, refused)


@pytest.mark.parametrize("text", ["kernelcore", "numa", "log_buf_len"])
def test_malformed_ones_are_named(text):
    """The kernel says which option it did not understand."""
    assert parse_early_param(text).notes == (f"Malformed early option '{text.partition('=')[0]}'",)


def test_gigantic_pages_and_log_buffer_come_from_memblock():
    """Huge pages of 1 GiB, if the processor has such, and three parts of a log buffer."""
    leaves = {0x80000000: (0x80000001, 0, 0, 0), 0x80000001: (0, 0, 0, 1 << 26)}
    text = "memblock=debug hugepagesz=1G hugepages=2 log_buf_len=3M"
    _kernel, log = booted(cmdline=text, leaves=leaves)
    assert sum("__alloc_bootmem_huge_page" in line for line in log) == 2
    assert [int(line.split()[1]) for line in log if line.endswith("setup_log_buf")] == [4 * MIB, 3 * MIB, 11 * MIB]
    assert "log_buf_len: 4194304 bytes" in log
    _, log = booted(cmdline=text)
    assert not any("huge_page" in line for line in log)
