"""mm_init: where its allocations land, and that nothing but unaccepted memory is unaccepted in the end."""

from __future__ import annotations

import pytest

from firmware.memory_descriptor import MemoryDescriptor
from guest.errors import GuestPanic
from guest.ranges import RangeSet
from kernel.free_area import MAX_ORDER_NR_PAGES

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
UNIT = 2 * MIB
BOOT_DATA, CONVENTIONAL, UNACCEPTED = 4, 7, 15
SIZES = {"4G": 4 * GIB, "5G+12K": 5 * GIB + 12 * KIB, "64G": 64 * GIB}


def unaccepted_by_bitmap(boot) -> RangeSet:
    """What the bitmap in guest memory says, bit by bit."""
    bits = int.from_bytes(boot.bitmap(), "little")
    out, bit = RangeSet(), 0
    while bits >> bit:
        bit += ((bits >> bit) & -(bits >> bit)).bit_length() - 1
        run = (~(bits >> bit) & (bits >> bit) + 1).bit_length() - 1
        out.add(bit * UNIT, (bit + run) * UNIT)
        bit += run
    return out


def not_mapped(boot) -> RangeSet:
    """RAM that Secure EPT does not map."""
    mapped = boot.sept.mapped()
    return RangeSet(gap for part in boot.host.ram for gap in mapped.gaps(part.start, part.end))


def check_books(boot) -> None:
    """Bitmap, Secure EPT and the zones' counters agree on what is unaccepted."""
    unaccepted = unaccepted_by_bitmap(boot)
    assert unaccepted == not_mapped(boot)
    ram = sum(part.size for part in boot.host.ram)
    in_ram = sum(r.size for part in boot.host.ram for r in boot.sept.mapped(part.start, part.end))
    assert unaccepted.total() + in_ram == ram
    zones = boot.kernel.allocator.zones
    blocks = RangeSet()
    for zone in zones:
        for start_pfn, end_pfn in zone.unaccepted_pages.runs():
            blocks.add(start_pfn << 12, end_pfn << 12)
        assert zone.nr_unaccepted == len(zone.unaccepted_pages) * MAX_ORDER_NR_PAGES
    assert blocks.total() >> 12 == sum(zone.nr_unaccepted for zone in zones)
    for start, end in unaccepted:  # all of it waits on a list
        assert blocks.covers(start, end)
    for start, end in blocks:  # and of a block that waits no more than its first unit is accepted, as a guard
        accepted = list(unaccepted.gaps(start, end))
        assert all(gap.size == UNIT and gap.start % (2 * UNIT) == 0 for gap in accepted)
    assert boot.bitmap() == b"" or not any(boot.bitmap()[:256])  # nothing below 4 GiB


@pytest.mark.parametrize("host_level", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_books_agree_to_the_page(new_boot, size, host_level):
    """After mm_init and after the script, whatever pages the host backs memory with."""
    boot = new_boot("mm-init", memory=SIZES[size], host_level=host_level)
    check_books(boot)
    before = not_mapped(boot).total()
    boot.run()
    check_books(boot)
    assert not_mapped(boot).total() < before


@pytest.mark.parametrize("host_level", [0, 1])
@pytest.mark.parametrize("size", ["4G", "5G+12K"])
def test_eager(new_boot, size, host_level):
    """With accept_memory=eager nothing is unaccepted after mm_init: Secure EPT maps all RAM."""
    boot = new_boot("mm-init", memory=SIZES[size], host_level=host_level, cmdline="accept_memory=eager")
    assert not any(boot.bitmap())
    assert not not_mapped(boot)
    assert [zone.nr_unaccepted for zone in boot.kernel.allocator.zones] == [0, 0, 0]
    check_books(boot)


def test_eager_and_lazy_manage_the_same_memory(new_boot):
    """The same pages are free, accepted or not."""
    lazy, eager = (
        new_boot("mm-init", cmdline=f"accept_memory={how}").kernel.allocator.zones for how in ("lazy", "eager")
    )
    assert [zone.nr_free_pages for zone in lazy] == [zone.nr_free_pages for zone in eager]
    assert [zone.managed_pages for zone in lazy] == [zone.managed_pages for zone in eager]


@pytest.mark.parametrize(
    ("memory", "node", "node_data"),
    [
        # the highest 43 pages below a page of page table for each GiB above 4 GiB: a real TD of 4 GiB has the same
        (4 * GIB, "0x000000017fffffff", "0x17ffd3000-0x17fffdfff"),
        (64 * GIB, "0x000000107fffffff", "0x107ff97000-0x107ffc1fff"),
        (5 * GIB + 12 * KIB, "0x00000001c0002fff", "0x1bffd4000-0x1bfffefff"),
    ],
)
def test_node(new_boot, log, memory, node, node_data):
    """One node up to the end of RAM, its data at the top of memory."""
    lines = log(new_boot("mm-init", memory=memory), "mm-init")
    assert lines[:3] == [
        "No NUMA configuration found",
        f"Faking a node at [mem 0x0000000000000000-{node}]",
        f"NODE_DATA(0) allocated [mem {node_data}]",
    ]


def test_log_of_a_4g_guest(new_boot, log):
    """Zones, node ranges, hash tables, bounce buffers and the sum, line by line."""
    assert log(new_boot("mm-init"), "mm-init")[3:] == [
        "Zone ranges:",
        "  DMA      [mem 0x0000000000001000-0x0000000000ffffff]",
        "  DMA32    [mem 0x0000000001000000-0x00000000ffffffff]",
        "  Normal   [mem 0x0000000100000000-0x000000017fffffff]",
        "  Device   empty",
        "Movable zone start for each node",
        "Early memory node ranges",
        "  node   0: [mem 0x0000000000001000-0x000000000009ffff]",
        "  node   0: [mem 0x0000000000100000-0x00000000007fffff]",
        "  node   0: [mem 0x0000000000806000-0x000000000080afff]",
        "  node   0: [mem 0x000000000080d000-0x000000007d8f9fff]",
        "  node   0: [mem 0x000000007d8fb000-0x000000007ea9ffff]",
        "  node   0: [mem 0x000000007eba2000-0x000000007f4ebfff]",
        "  node   0: [mem 0x000000007f7fe000-0x000000007fef3fff]",
        "  node   0: [mem 0x0000000100000000-0x000000017fffffff]",
        "Initmem setup node 0 [mem 0x0000000000001000-0x000000017fffffff]",
        "Fallback order for Node 0: 0 ",
        "Built 1 zonelists, mobility grouping on.  Total pages: 1030635",
        "Dentry cache hash table entries: 524288 (order: 10, 4194304 bytes, linear)",
        "Inode-cache hash table entries: 262144 (order: 9, 2097152 bytes, linear)",
        "software IO TLB: SWIOTLB bounce buffer size roundup to 256MB",
        "software IO TLB: mapped [mem 0x000000006d8f9000-0x000000007d8f9000] (256MB)",
        "Memory: 1918368K/4188632K available (376324K reserved, 0K cma-reserved)",
        "node 0 deferred pages initialised in 0ms",
    ]


def test_present_pages_are_the_memory_of_e820(new_boot):
    """Present pages are memblock's memory: 4188632 KiB of a 4 GiB guest."""
    zones = new_boot("mm-init").kernel.allocator.zones
    memory = [
        (0x1000, 0xA0000), (0x100000, 0x800000), (0x806000, 0x80B000), (0x80D000, 0x7D8FA000),
        (0x7D8FB000, 0x7EAA0000), (0x7EBA2000, 0x7F4EC000), (0x7F7FE000, 0x7FEF4000), (4 * GIB, 6 * GIB),
    ]  # fmt: skip
    assert sum(zone.present_pages for zone in zones) * 4 == sum(end - start for start, end in memory) // KIB == 4188632
    assert zones[2].present_pages == 2 * GIB >> 12


@pytest.mark.parametrize(
    ("memory", "dentries", "inodes"),
    [
        (512 * MIB, 65536, 32768),
        (4 * GIB, 524288, 262144),
        (16 * GIB, 2097152, 1048576),
        (64 * GIB, 8388608, 4194304),
        (128 * GIB, 8388608, 4194304),  # above 64 GiB the tables grow by half as fast
        (256 * GIB, 16777216, 8388608),
    ],
)
def test_hash_tables(new_boot, log, memory, dentries, inodes):
    """One bucket for each 8 KiB and 16 KiB of memory, a power of two of them."""
    lines = [line for line in log(new_boot("mm-init", memory=memory), "mm-init") if "hash table" in line]
    assert [int(line.split(": ")[1].split()[0]) for line in lines] == [dentries, inodes]


@pytest.mark.parametrize(
    ("memory", "lines"),
    [
        (512 * MIB, ["adjusted to 64MB", "[mem 0x0000000018e00000-0x000000001ce00000] (64MB)"]),
        (3 * GIB, ["adjusted to 183MB", "roundup to 256MB", "[mem 0x000000006d8f9000-0x000000007d8f9000] (256MB)"]),
        (16 * GIB, ["adjusted to 982MB", "roundup to 1024MB", "[mem 0x000000003d8f9000-0x000000007d8f9000] (1024MB)"]),
        (64 * GIB, ["adjusted to 1024MB", "[mem 0x000000003d8f8000-0x000000007d8f8000] (1024MB)"]),
    ],
)  # fmt: skip
def test_bounce_buffers(new_boot, log, memory, lines):
    """6 % of memory, 64 MiB to 1 GiB, a power of two, below 4 GiB."""
    boot = new_boot("mm-init", memory=memory)
    printed = log(boot, "setup-arch") + log(boot, "mm-init")
    found = [line for line in printed if line.startswith("software IO TLB")]
    assert len(found) == len(lines)
    assert all(text in line for text, line in zip(lines, found, strict=True))


def given_map(*rows: tuple[int, int, int]) -> dict[str, object]:
    return {"efi_map": tuple(MemoryDescriptor.of_range(*row, 0xF) for row in rows)}


def test_no_room_for_bounce_buffers(new_boot, log):
    """Without 128 MiB below 4 GiB, 6 % of memory rounded up, the kernel says so and goes on."""
    low = [(CONVENTIONAL, 0x1000, 0xA0000), (CONVENTIONAL, MIB, 80 * MIB), (UNACCEPTED, 4 * GIB, 5 * GIB)]
    boot = new_boot("mm-init", **given_map(*low))
    text = "software IO TLB: Failed to allocate 134217728 bytes for tlb structure"
    assert text in log(boot, "mm-init")
    check_books(boot)


def test_guest_without_room_for_its_own_tables(new_boot):
    """A guest too small for its struct pages panics in memblock's words."""
    with pytest.raises(GuestPanic, match="memblock_alloc_try_nid: Failed to allocate 2097152 bytes align=0x200000"):
        new_boot("mm-init", memory=64 * MIB)


def test_struct_pages_in_pieces(new_boot):
    """Where no range of memory has room for all struct pages, each section gets its own; the books agree."""
    rows = [(UNACCEPTED, (4 + 8 * number) * GIB, (5 + 8 * number) * GIB) for number in range(40)]
    low = [(CONVENTIONAL, 0x1000, 0xA0000), (CONVENTIONAL, MIB, 512 * MIB)]
    boot = new_boot("mm-init", **given_map(*low, *rows))
    check_books(boot)
    sections = 40 * 8 + 4
    assert 40 * GIB - not_mapped(boot).total() >= (sections - 200) * 2 * MIB


@pytest.mark.parametrize("host_level", [0, 1])
def test_unaccepted_memory_in_pieces(new_boot, host_level):
    """Holes, odd borders and boot services memory between unaccepted ranges: the books still agree."""
    boot = new_boot(
        None,
        host_level=host_level,
        **given_map(
            (CONVENTIONAL, 0x1000, 0xA0000),
            (CONVENTIONAL, MIB, 300 * MIB),
            (UNACCEPTED, 512 * MIB + 4 * KIB, 640 * MIB),
            (BOOT_DATA, 640 * MIB, 700 * MIB),
            (UNACCEPTED, 700 * MIB, GIB),
            (UNACCEPTED, GIB, GIB + 3 * MIB),
            (UNACCEPTED, 4 * GIB, 4 * GIB + 126 * MIB),
            (UNACCEPTED, 5 * GIB + 2 * MIB, 6 * GIB + 8 * KIB),
        ),
    )
    unaccepted = unaccepted_by_bitmap(boot)
    assert unaccepted == not_mapped(boot)
    assert unaccepted
