"""fake_unaccepted_start=, and a guest that is no TD."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bootstub.protocol import MAINLINE
from guest.errors import GuestPanic, MemoryFault
from guest.registers import Registers
from guest.units import PFN_DOWN, PFN_PHYS, PMD_SIZE, SZ_1G, SZ_1M, SZ_2M, SZ_4M
from kernel.early_param import parse_early_param
from kernel.events import FileRead
from kernel.fake_unaccepted import FakeUnacceptedMemory
from kernel.free_area import MAX_ORDER_NR_PAGES
from kernel.runtime import parse_script
from kernel.unaccepted_memory import UnacceptedMemory
from tdx.events import SeamCall, TdCall, TdVmCall
from tdx.guest import tdx_guest_detected

START = 16 * SZ_1M


@pytest.mark.parametrize(
    ("text", "start", "refused"),
    [
        ("fake_unaccepted_start=1G", SZ_1G, 0),
        ("fake-unaccepted-start=0x40000000", SZ_1G, 0),
        ("fake_unaccepted_start=1G fake_unaccepted_start=2M", SZ_2M, 0),
        ("fake_unaccepted_start=1G fake_unaccepted_start=2Mx", None, 1),
        ("fake_unaccepted_start=1G fake_unaccepted_start", SZ_1G, 1),
        ("fake_unaccepted_start=much", None, 1),
        ("fake_unaccepted_start=", 0, 0),
        ("quiet", None, 0),
    ],
)
def test_parameter(text, start, refused):
    """A number; text behind it turns the feature off, no value at all changes nothing."""
    early = parse_early_param(text)
    assert early.fake_unaccepted_start == start
    assert early.notes == ("Malformed early option 'fake_unaccepted_start'",) * refused


@given(st.integers(0, 12), st.sets(st.integers(0, 23)), st.integers(0, 11), st.integers(1, 12))
@settings(max_examples=60)
def test_blocks_are_those_that_the_question_names(fake, units, first, count):
    """The view in runs says of each block what it says alone: true, or begins at the fake start or above."""

    def asks(start, end):
        return any(unit * PMD_SIZE < end + (end % PMD_SIZE == 0) and start < (unit + 1) * PMD_SIZE for unit in units)

    class Real(UnacceptedMemory):
        def range_contains_unaccepted_memory(self, start, end):
            return asks(start, end)

        def block_runs(self, start, end, size):
            return ((at, at + size, asks(at, at + size)) for at in range(start, end, size))

    start_of_fake = fake * SZ_4M + (fake % 3) * SZ_1M
    view = FakeUnacceptedMemory(Real(None, lambda start, end: None), start_of_fake)
    start, end = first * SZ_4M, (first + count) * SZ_4M
    runs = list(view.block_runs(start, end, SZ_4M))
    states = [state for low, high, state in runs for _ in range(low, high, SZ_4M)]
    blocks = range(start, end, SZ_4M)
    assert states == [view.range_contains_unaccepted_memory(at, at + SZ_4M) for at in blocks]
    assert states == [at >= start_of_fake or asks(at, at + SZ_4M) for at in blocks]


def unaccepted_kb(event):
    return int(next(line for line in event.text.splitlines() if line.startswith("Unaccepted")).split()[1])


@pytest.fixture
def plain(new_boot):
    """``plain(script, **config)``: a boot without TDX, and what it read."""

    def run(script, **config):
        boot = new_boot(None, script=tuple(parse_script(script)), tdx=False, **config)
        return boot, [r.event for r in boot.trace.records if isinstance(r.event, FileRead)]

    return run


def test_without_tdx_nothing_is_unaccepted(plain, log):
    """All RAM is there, above 4 GiB too; nobody accepts, calls or exits; TDX is not to be seen."""
    boot, (meminfo,) = plain("alloc 9 1000\ncat /proc/meminfo\n", memory=8 * SZ_1G)
    assert unaccepted_kb(meminfo) == 0
    assert not any(isinstance(r.event, TdCall | TdVmCall | SeamCall) for r in boot.trace.records)
    assert not tdx_guest_detected(boot.machine)
    assert sum(zone.present_pages for zone in boot.kernel.allocator.zones) > PFN_DOWN(8 * SZ_1G) * 99 // 100
    assert not any(
        "AcceptMemory" in line or "adjusted" in line for line in log(boot, "firmware") + log(boot, "setup-arch")
    )
    with pytest.raises(GuestPanic, match="TDCALL outside a TD"):
        boot.machine.platform.tdcall(Registers())
    with pytest.raises(MemoryFault, match="no RAM"):
        boot.machine.memory.read(1 << 45, 1)


def test_fake_unaccepted_start_of_the_cover_letter(plain):
    """16 GiB with fake_unaccepted_start=1G: "around 14G" are unaccepted after boot, and all can be accepted."""
    script = "cat /proc/meminfo\nalloc order 10 x 64\ncat /proc/meminfo\n"
    script += "echo all > /sys/kernel/mm/page_alloc/accept_memory\ncat /proc/meminfo\n"
    _, events = plain(script, memory=16 * SZ_1G, cmdline="fake_unaccepted_start=1G")
    first, second, last = map(unaccepted_kb, events)
    assert 14 << 20 <= first < 15 << 20
    assert second < first
    assert last == 0


def test_fake_fools_the_page_allocator_alone(plain):
    """Exactly the whole blocks from 1 GiB on that memblock left free wait; below, and for memblock, nothing changes."""
    boot, _ = plain("", memory=4 * SZ_1G, cmdline="fake_unaccepted_start=1G")
    waiting = [run for zone in boot.kernel.allocator.zones for run in zone.unaccepted_pages.runs()]
    assert min(start for start, _ in waiting) == PFN_DOWN(SZ_1G)
    free = [
        (start, end)
        for zone in boot.kernel.allocator.zones
        for order in range(11)
        for start, end in zone.free_area.blocks(order)
    ]
    assert all(end <= PFN_DOWN(SZ_1G) or end - start < MAX_ORDER_NR_PAGES for start, end in free)
    assert not boot.kernel.unaccepted.range_contains_unaccepted_memory(0, PFN_PHYS(boot.kernel.max_pfn))


def test_mainline_does_not_know_the_parameter(plain):
    """It was dropped before the merge."""
    _, (meminfo,) = plain("cat /proc/meminfo\n", protocol=MAINLINE, cmdline="fake_unaccepted_start=1G")
    assert unaccepted_kb(meminfo) == 0


def test_fake_in_a_td(new_boot):
    """In a TD the fake adds to the truth: what the allocator thinks unaccepted below 4 GiB was accepted long ago."""
    script = tuple(parse_script("echo all > /sys/kernel/mm/page_alloc/accept_memory\nalloc 10 100\n"))
    boots = [new_boot(None, script=script, cmdline=text) for text in ("", "fake_unaccepted_start=1G")]
    for boot in boots:
        assert boot.shell.running.nr_unaccepted() == 0
        assert boot.sanitizer.findings == []
    fresh = new_boot("mm-init", cmdline="fake_unaccepted_start=1G")
    assert fresh.kernel.allocator.zones[1].nr_unaccepted > PFN_DOWN(700 * SZ_1M)
    assert fresh.kernel.allocator.zones[2].nr_unaccepted > PFN_DOWN(1900 * SZ_1M)
