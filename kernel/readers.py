"""Who reads memory that nobody gave it: the end of a block, /proc/kcore, /proc/vmcore, /dev/mem.

    load_unaligned_zeropad()  a word in the last byte of a block reaches 7 bytes into what follows
    /proc/kcore               all System RAM; v9 reads it, mainline gives zeros for unaccepted memory
    /proc/vmcore              the same, in a crash kernel; with v9 there is none, as it refuses kexec
    /dev/mem                  page by page what CONFIG_STRICT_DEVMEM allows: no RAM

A read of unaccepted memory ends the guest: there is no fault that could be fixed up.
Sources: arch/x86/include/asm/word-at-a-time.h; fs/proc/kcore.c, read_kcore_iter(); fs/proc/vmcore.c;
drivers/char/mem.c, read_mem(); arch/x86/mm/init.c, devmem_is_allowed() (6.12).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator

from bootstub.e820_types import E820_TYPE_RAM, E820_TYPE_RESERVED_KERN
from guest.ranges import Range, RangeSet
from guest.units import PAGE_SIZE, SZ_1M, round_down, round_up
from kernel.events import MemoryRead
from kernel.running import RunningKernel

WORD = 8


def load_unaligned_zeropad(running: RunningKernel, blocks: Iterable[tuple[int, int]]) -> MemoryRead:
    """Read the word that begins in the last byte of each block ``(start, end)``.

    Where nothing is mapped behind the block, the fault is fixed up and the word is padded with zeros.
    """
    ram, ends, padded = system_ram(running), 0, 0
    for _, end in blocks:
        ends += 1
        mapped = end in ram
        padded += not mapped
        running.machine.memory.read(end - 1, WORD if mapped else 1)
    return MemoryRead("zeropad", ends, touched=ends * WORD, zeros=padded * (WORD - 1))


def read_kcore(running: RunningKernel, start: int, end: int) -> MemoryRead | int:
    """Read the System RAM of ``[start, end)`` through /proc/kcore."""
    return _read_ram(running, "kcore", start, end)


def read_vmcore(running: RunningKernel, start: int, end: int) -> MemoryRead | int:
    """Read the System RAM of ``[start, end)`` as the crash kernel would; -ENOENT where there can be none."""
    kernel = running.kernel
    if not kernel.mainline and kernel.params["unaccepted_memory"]:
        return -errno.ENOENT
    return _read_ram(running, "vmcore", start, end)


def read_devmem(running: RunningKernel, start: int, end: int) -> MemoryRead | int:
    """Read ``[start, end)`` through /dev/mem; -EPERM at the first page that is not allowed.

    RAM below 1 MiB reads as zeros. What is no RAM and lies above 1 MiB is mapped shared in a TD, so that the host
    answers; below, it is read as the private memory that the ROMs are. What lies before a forbidden page was read
    all the same.
    """
    strict, touched, zeros = running.kernel.build.strict_devmem, 0, 0
    for low, high, is_ram in _by_ram(system_ram(running), start, end):
        if is_ram and strict:
            zeros += max(min(high, SZ_1M) - low, 0)
            if high > SZ_1M:
                return -errno.EPERM
            continue
        end_of_read = high if is_ram else max(min(high, SZ_1M), low)
        running.machine.memory.touch(low, end_of_read)
        touched += end_of_read - low
    return MemoryRead("devmem", 1, touched, zeros)


def system_ram(running: RunningKernel) -> RangeSet:
    """The System RAM resources: e820's RAM and what was added since, in whole pages."""
    ram = RangeSet(
        (round_up(entry.addr, PAGE_SIZE), max(round_down(entry.addr + entry.size, PAGE_SIZE), entry.addr))
        for entry in running.kernel.e820
        if entry.type in (E820_TYPE_RAM, E820_TYPE_RESERVED_KERN)
    )
    for start, end in running.kernel.hotplugged:
        ram.add(start, end)
    return ram


def _read_ram(running: RunningKernel, name: str, start: int, end: int) -> MemoryRead:
    """Touch each page of System RAM, but for what the kernel knows to be unaccepted, if it looks."""
    kernel = running.kernel
    looks = kernel.mainline and kernel.build.reader_filter
    ranges = touched = zeros = 0
    for part in system_ram(running).within(start, end):
        ranges += 1
        left_out = RangeSet(kernel.unaccepted.unaccepted_pages(part.start, part.end)) if looks else RangeSet()
        for low, high in left_out.gaps(part.start, part.end):
            running.machine.memory.touch(low, high)
            touched += high - low
        zeros += left_out.total()
    return MemoryRead(name, ranges, touched, zeros)


def _by_ram(ram: RangeSet, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """``[start, end)`` cut where RAM begins and ends."""
    parts = [(part, True) for part in ram.within(start, end)] + [(gap, False) for gap in ram.gaps(start, end)]
    for part, is_ram in sorted(parts):
        yield part.start, part.end, is_ram


def block_ranges(pfns: Iterable[int], order: int) -> Iterator[Range]:
    """The memory of blocks of ``order``."""
    for pfn in pfns:
        yield Range(pfn * PAGE_SIZE, (pfn + (1 << order)) * PAGE_SIZE)
