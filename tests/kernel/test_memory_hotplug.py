"""Memory that is added after boot: the record of unaccepted memory says nothing of it."""

from __future__ import annotations

import errno

import pytest

from bootstub.protocol import MAINLINE, V9
from guest.errors import MemoryFault
from guest.units import PFN_DOWN, SZ_1G, SZ_1M, SZ_4G, SZ_128M
from kernel.events import CommandResult, FileRead, MemoryAdded
from kernel.runtime import parse_script
from tools.verdict import verdict_lines

PROTOCOLS = pytest.mark.parametrize("protocol", [V9, MAINLINE], ids=lambda protocol: protocol.name)
START = 8 * SZ_1G


@pytest.fixture
def added(new_boot):
    """``added(script, **config)``: the boot after mm-init, to be run on."""

    def make(script, **config):
        return new_boot("mm-init", script=tuple(parse_script(script)), **config)

    return make


def results(boot):
    return [r.event for r in boot.trace.records if isinstance(r.event, MemoryAdded | CommandResult)]


@PROTOCOLS
def test_added_memory_counts_at_once(added, protocol):
    """It is managed, present and free, and not unaccepted; its struct pages come out of what was there."""
    before, after = added("cat /proc/meminfo", protocol=protocol), added("hotadd 8G 1G", protocol=protocol)
    before.run()
    after.run()
    one, two = (boot.kernel.allocator.zones[2] for boot in (before, after))
    assert two.managed_pages - one.managed_pages == two.present_pages - one.present_pages == PFN_DOWN(SZ_1G)
    assert two.end_pfn == PFN_DOWN(START + SZ_1G)
    free = sum(zone.nr_free_pages for zone in after.kernel.allocator.zones)
    assert free == sum(zone.nr_free_pages for zone in before.kernel.allocator.zones) + PFN_DOWN(SZ_1G) - 8 * 512
    assert two.watermark != one.watermark
    assert results(after) == [MemoryAdded(START, START + SZ_1G, False)]
    assert "disagree: [0x200000000, 0x240000000) only unaccepted" in verdict_lines(after)


@PROTOCOLS
def test_added_memory_kills_a_td(added, protocol):
    """Nobody accepted it: the first use of it is the end."""
    boot = added("hotadd 8G 1G\nalloc order 10 x 2000\n", protocol=protocol)
    with pytest.raises(MemoryFault) as death:
        boot.run()
    assert START <= death.value.gpa < START + SZ_1G


@PROTOCOLS
def test_added_memory_that_its_driver_accepts(added, protocol):
    """It can be used like any other, to the last page, and bitmap and module agree in the end."""
    boot = added(
        "hotadd 8G 1G accept\nalloc order 10 x 2000\nalloc order 0 x 100000\nread kcore 8G 1G\n", protocol=protocol
    )
    boot.run()
    assert boot.sept.mapped().covers(START, START + SZ_1G)
    assert "bitmap and Secure EPT agree: 0 KiB are unaccepted" in verdict_lines(boot)


def test_added_memory_without_tdx(added):
    """A guest that is no TD uses it at once, and had no memory above 4 GiB before."""
    boot = added("hotadd 4G 256M\nalloc order 10 x 500\n", tdx=False, memory=SZ_1G)
    boot.run()
    assert boot.kernel.allocator.zones[2].zone_start_pfn == PFN_DOWN(SZ_4G)
    assert boot.kernel.allocator.zones[2].nr_free_pages < PFN_DOWN(32 * SZ_1M)


@PROTOCOLS
def test_zone_normal_reaches_over_zone_movable(added, protocol):
    """Added memory is the kernel's, also behind zone Movable: the spans overlap, each page is in one zone."""
    script = "hotadd 8G 1G accept\nalloc order 10 x 100 gfp GFP_KERNEL as k\ncat /proc/pagetypeinfo\nfree k\n"
    boot = added(script, protocol=protocol, cmdline="nokaslr movablecore=512M")
    boot.run()
    _, _, normal, movable = boot.kernel.allocator.zones
    assert normal.zone_start_pfn < movable.zone_start_pfn < movable.end_pfn < normal.end_pfn
    allocator = boot.kernel.allocator
    assert allocator.page_zone(movable.zone_start_pfn).zone is movable
    assert [allocator.page_zone(PFN_DOWN(START) + at).zone for at in (0, PFN_DOWN(SZ_1G) - 1)] == [normal, normal]
    own = [sum(r.size for r in allocator.pages_of_zone(zone)) for zone in (normal, movable)]
    hole = PFN_DOWN(START) - movable.end_pfn
    assert own == [normal.spanned_pages - movable.spanned_pages - hole, movable.spanned_pages]
    text = next(r.event.text for r in boot.trace.records if isinstance(r.event, FileRead))
    blocks = {line.split()[3]: sum(map(int, line.split()[4:])) for line in text.splitlines()[-4:]}
    assert (blocks["Normal"], blocks["Movable"]) == (own[0] // 512, own[1] // 512)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("8G 4096", errno.EINVAL),
        ("0x208000000 64M", errno.EINVAL),
        ("3G 128M", errno.EINVAL),
        ("4G 128M", errno.EEXIST),
        ("5G 1G", errno.EEXIST),
        ("0 128M", errno.EINVAL),
    ],
)
def test_what_is_refused(added, where, error):
    """Pieces of sections, places below 4 GiB, memory that is there: a negative errno, and nothing changes."""
    boot = added(f"hotadd {where}\n")
    spans = [(zone.end_pfn, zone.managed_pages) for zone in boot.kernel.allocator.zones]
    ram = boot.host.ram.copy()
    boot.run()
    assert [event.result for event in results(boot)] == [-error]
    assert [(zone.end_pfn, zone.managed_pages) for zone in boot.kernel.allocator.zones] == spans
    assert boot.host.ram == ram


def test_no_room_for_struct_pages(added):
    """Memory needs a 64th of its size in struct pages before it is of any use; what was taken is given back."""
    boot = added(f"alloc order 9 x 100000\nhotadd 8G {SZ_128M}\n", memory=SZ_1G)
    boot.run()
    assert [event.result for event in results(boot)] == [-errno.ENOMEM]
    large = added("hotadd 1P 2P\n")
    before = sum(zone.nr_free_pages for zone in large.kernel.allocator.zones)
    large.run()
    assert [event.result for event in results(large)] == [-errno.ENOMEM]
    assert sum(zone.nr_free_pages for zone in large.kernel.allocator.zones) > before * 9 // 10
