"""Readers of memory that nobody gave them, and what becomes of the guest."""

from __future__ import annotations

import random

import pytest

from bootstub.protocol import MAINLINE, V9
from guest.errors import MemoryFault
from guest.ranges import RangeSet
from guest.units import PAGE_SIZE, PMD_SIZE, SZ_1G, SZ_1M, SZ_4G
from kernel.build import KernelBuild
from kernel.events import CommandResult, MemoryRead
from kernel.readers import system_ram
from kernel.runtime import parse_script
from kernel.unaccepted_memory import UnacceptedMemory

PROTOCOLS = pytest.mark.parametrize("protocol", [V9, MAINLINE], ids=lambda protocol: protocol.name)
AT_THE_BORDER = "echo 128 > /proc/sys/vm/min_free_kbytes\necho 1 > /proc/sys/vm/watermark_scale_factor\n"
AT_THE_BORDER += "alloc order 0 x 64\nalloc order 10 as a\nread zeropad a\n" * 40
"""With low watermarks blocks are accepted one by one: now and then the newest is in use, before unaccepted memory."""


@pytest.fixture
def read(new_boot):
    """``read(script, **config)``: the boot and what its readers came to. ``read.boot`` is there if the guest died."""

    def run(script, **config):
        run.boot = boot = new_boot("mm-init", script=tuple(parse_script(script)), **config)
        boot.run()
        return boot, [r.event for r in boot.trace.records if isinstance(r.event, MemoryRead | CommandResult)]

    return run


def unaccepted(boot):
    ram = boot.host.ram.copy()
    for start, end in boot.sept.mapped():
        ram.remove(start, end)
    return ram


@PROTOCOLS
def test_zeropad_guard(read, protocol):
    """With the guard a word at the end of any block is read: what lies behind it was accepted too."""
    _, events = read(AT_THE_BORDER, protocol=protocol)
    assert events == [MemoryRead("zeropad", count, 8 * count, 0) for count in range(1, 41)]


@PROTOCOLS
def test_without_the_zeropad_guard_the_guest_dies(read, protocol):
    """Without it the word in the last byte of the last block reaches into unaccepted memory: no fault to fix up."""
    with pytest.raises(MemoryFault) as death:
        read(AT_THE_BORDER, protocol=protocol, build=KernelBuild(zeropad_guard=False))
    assert (death.value.kind, death.value.size) == ("read", 8)
    assert death.value.start == death.value.gpa - 1
    assert death.value.gpa % PMD_SIZE == 0
    assert death.value.gpa in unaccepted(read.boot)


def test_zeropad_at_the_end_of_ram(read):
    """Behind the last RAM, and before a hole, nothing is mapped: the fault is fixed up and the word is padded."""
    boot, events = read("alloc order 0 x 65536 as a\nread zeropad a\n", memory=256 * SZ_1M)
    ram = system_ram(boot.shell.running)
    started = next(r.number for r in boot.trace.records if r.stage == "runtime")
    ends = [end for number, _, end in boot.machine.memory.writes if number >= started]
    assert events[0].ranges == len(ends) > 30_000
    assert events[0].zeros == 7 * sum(end not in ram for end in ends) > 0


def test_kcore_kills_a_v9_guest(read):
    """v9 knows nothing of /proc/kcore: the walk ends at the first unaccepted page."""
    with pytest.raises(MemoryFault) as death:
        read("alloc 9 96\nread kcore\n")
    first = min(unaccepted(read.boot)).start
    assert (death.value.gpa, death.value.start, death.value.size) == (first, first, PAGE_SIZE)


@pytest.mark.parametrize("reader", ["kcore", "vmcore"])
def test_mainline_leaves_unaccepted_memory_out(read, reader):
    """It gives zeros for unaccepted memory and for the page before it, whose guard is unaccepted; the rest is read."""
    boot, events = read(f"alloc 9 96\nread {reader}\n", protocol=MAINLINE)
    ram, left = system_ram(boot.shell.running), unaccepted(boot)
    for start, _ in list(left):
        left.add(start - PAGE_SIZE, start)
    zeros = sum(part.size for start, end in left for part in ram.within(start, end))
    assert events == [MemoryRead(reader, len(list(ram)), ram.total() - zeros, zeros)]
    assert zeros > SZ_1G


@pytest.mark.parametrize("reader", ["kcore", "vmcore"])
def test_mainline_before_the_filter(read, reader):
    """Before it had the filter mainline died as v9 does."""
    with pytest.raises(MemoryFault):
        read(f"read {reader}\n", protocol=MAINLINE, build=KernelBuild(reader_filter=False))


def test_part_of_kcore(read):
    """A range below 4 GiB is accepted; only its System RAM counts."""
    _, events = read("read kcore 0 1M\nread kcore 0x20000000 4096\nread kcore 3G 4096\n")
    assert [(event.touched, event.zeros) for event in events] == [(0x9F000, 0), (4096, 0), (0, 0)]


def test_v9_has_no_vmcore(read):
    """It refuses kexec, so there is no crash kernel whose /proc/vmcore could be read."""
    _, events = read("read vmcore\nkexec -l\n")
    assert [(event.command, event.result) for event in events] == [("read vmcore", -2), ("kexec -l", -1)]
    assert events[1].reason == "Disable kexec: not yet supported on systems with unaccepted memory"


def test_kexec_without_unaccepted_memory(read):
    """Without a bitmap v9 refuses nothing; nor does mainline, which hands its table on."""
    for config in ({"memory": SZ_1G}, {"protocol": MAINLINE}):
        _, events = read("kexec -l\n", **config)
        assert [(event.command, event.result) for event in events] == [("kexec -l", 0)]


def test_devmem(read):
    """RAM is not given out, the first MiB of it as zeros; ROMs are read as private memory; MMIO is the host's."""
    _, events = read(
        "read devmem 0 640K\nread devmem 640K 384K\nread devmem 0 1M\nread devmem 1M 4096\nread devmem 0 2M\n"
        "read devmem 3G 1M\n"
    )
    assert events == [
        MemoryRead("devmem", 1, PAGE_SIZE, 0x9F000),  # page 0 is no RAM to the kernel
        MemoryRead("devmem", 1, 0x60000, 0),
        MemoryRead("devmem", 1, 0x61000, 0x9F000),
        CommandResult("read devmem", -1),
        CommandResult("read devmem", -1),
        MemoryRead("devmem", 1, 0, 0),
    ]


@PROTOCOLS
def test_devmem_without_strict_devmem(read, protocol):
    """Without CONFIG_STRICT_DEVMEM RAM is read, accepted or not."""
    build = KernelBuild(strict_devmem=False)
    _, events = read("read devmem 512M 1M\n", protocol=protocol, build=build)
    assert events == [MemoryRead("devmem", 1, SZ_1M, 0)]
    with pytest.raises(MemoryFault):
        read("read devmem 4G 1M\n", protocol=protocol, build=build)


@pytest.mark.parametrize("guard", [True, False])
def test_unaccepted_pages_are_those_that_the_question_names(new_bitmap, guard):
    """For random bitmaps and windows, both protocols: the ranges are the pages that are asked for one by one."""
    rng = random.Random(2)
    for _ in range(60):
        bitmap, base = new_bitmap(), rng.choice([0, SZ_4G])
        units = rng.randrange(1, 9) * 8
        for first in rng.sample(range(units), rng.randrange(1, 5)):
            bitmap.set(first, min(first + rng.randrange(1, 4), units))
        size = rng.choice([None, units * PMD_SIZE])
        memory = UnacceptedMemory(bitmap, lambda start, end: None, base, size, guard=guard)
        border = base + rng.randrange(units + 2) * PMD_SIZE
        start = max(border - rng.randrange(4) * PAGE_SIZE, 0)
        end = border + rng.randrange(1, 4) * PMD_SIZE + rng.randrange(-2, 3) * PAGE_SIZE
        pages = RangeSet(
            (page, page + PAGE_SIZE)
            for page in range(start, end, PAGE_SIZE)
            if memory.range_contains_unaccepted_memory(page, page + PAGE_SIZE)
        )
        assert RangeSet(memory.unaccepted_pages(start, end)) == pages
