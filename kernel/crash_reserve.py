"""``crashkernel=``: memory for a kernel that takes over after a crash.

Sources: kernel/crash_reserve.c (6.12); arch/x86/kernel/setup.c, reserve_crashkernel() (6.1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from guest.units import SZ_1G, SZ_1M, SZ_4G, SZ_8M, SZ_16M, SZ_64M, SZ_128M, SZ_256M, U64_MAX, memparse, round_up
from kernel.kernel import Kernel

CRASH_ALIGN = SZ_16M
CRASH_ADDR_LOW_MAX, CRASH_ADDR_HIGH_MAX = SZ_4G, SZ_1G << 16
_SUFFIXES = (",high", ",low")


@dataclass(frozen=True, slots=True)
class CrashKernel:
    """What to reserve: ``size`` bytes, at ``base`` if that is not 0, ``high`` if above 4 GiB; ``low_size`` below."""

    size: int
    base: int = 0
    high: bool = False
    low_size: int = 0


def parse_crashkernel(command_line: str, system_ram: int, swiotlb: int = SZ_64M) -> CrashKernel | None:
    """The last ``crashkernel=`` of the line, or None if there is none that can be met.

    ``SIZE[@OFFSET]``; ``START-[END]:SIZE[,...][@OFFSET]``, of which the range that holds ``system_ram`` counts;
    ``SIZE,high`` with ``SIZE,low``. Low memory for a high one is what ``swiotlb`` needs, at least 256 MiB.
    """
    values = re.findall(r"crashkernel=([^ ]*)", command_line)
    plain = [value for value in values if not value.endswith(_SUFFIXES)]
    if plain:
        parse = _parse_ranges if ":" in plain[-1] else _parse_simple
        found = parse(plain[-1], system_ram)
    else:
        found = _parse_high(values, _low_size(swiotlb))
    return found if found is not None and 0 < found.size < system_ram else None


def _low_size(swiotlb: int) -> int:
    """Low memory for a crash kernel that lies high (crash_low_size_default())."""
    return max(swiotlb + SZ_8M, SZ_256M)


def _parse_simple(value: str, system_ram: int) -> CrashKernel | None:
    size, rest = memparse(value)
    if rest == value or (rest and not rest.startswith("@")):
        return None
    return CrashKernel(size, memparse(rest[1:])[0] if rest else 0)


def _parse_ranges(value: str, system_ram: int) -> CrashKernel | None:
    total = round_up(system_ram, SZ_128M)
    ranges, at, offset = value.partition("@")
    for part in ranges.split(","):
        limits, colon, size_text = part.partition(":")
        low, dash, high = limits.partition("-")
        (start, left), (end, left_end), (size, left_size) = map(memparse, (low, high, size_text))
        wrong = left or not low or not dash or not colon or left_end or size_text == left_size or left_size
        if wrong or (high and end <= start) or size >= total:
            return None
        if start <= total < (end if high else U64_MAX):
            return CrashKernel(size, memparse(offset)[0] if at else 0)
    return None


def _parse_high(values: list[str], low_size: int) -> CrashKernel | None:
    sizes = {}
    for suffix in _SUFFIXES:
        texts = [value for value in values if value.endswith(suffix)]
        if texts:
            size, rest = memparse(texts[-1])
            if rest != suffix:
                return None
            sizes[suffix] = size
    if ",high" not in sizes:
        return None
    return CrashKernel(sizes[",high"], high=True, low_size=sizes.get(",low", low_size))


def reserve_crashkernel(kernel: Kernel) -> None:
    """Take the memory, below 4 GiB if it can be there, and say where it is."""
    total = kernel.memblock.phys_mem_size()
    wanted = parse_crashkernel(kernel.command_line, total, kernel.swiotlb_size or SZ_64M)
    if wanted is None:
        return
    base = _find_place(kernel, wanted)
    if not base:
        return
    size, low_size = wanted.size, wanted.low_size if wanted.high else _low_size(kernel.swiotlb_size or SZ_64M)
    if base >= CRASH_ADDR_LOW_MAX and low_size and not _reserve_low(kernel, low_size):
        kernel.memblock.phys_free(base, size, who="reserve_crashkernel_generic")
        return
    if kernel.version.generic_crashkernel:
        kernel.machine.print(f"crashkernel reserved: {base:#018x} - {base + size:#018x} ({size >> 20} MB)")
    else:
        where = f"{size >> 20}MB of memory at {base >> 20}MB"
        kernel.machine.print(f"Reserving {where} for crashkernel (System RAM: {total >> 20}MB)")


def _find_place(kernel: Kernel, wanted: CrashKernel) -> int:
    """The lowest address, 0 if there is no room; above 4 GiB if it was wanted so, or if there is no room below."""
    generic, align = kernel.version.generic_crashkernel, CRASH_ALIGN
    low, high = (0, CRASH_ADDR_LOW_MAX), (CRASH_ADDR_LOW_MAX, CRASH_ADDR_HIGH_MAX)
    spans = [high, low] if wanted.high else [low, high]
    if not generic:
        spans = [(CRASH_ALIGN, end) for _, end in spans[: 1 if wanted.high else 2]]
    if wanted.base:
        spans, align = [(wanted.base, wanted.base + wanted.size)], CRASH_ALIGN if generic else SZ_1M
    for start, end in spans:
        who = "reserve_crashkernel_generic" if generic else "setup_arch"
        found = kernel.memblock.phys_alloc_range(wanted.size, align, start, end, who=who)
        if found:
            return found
    if wanted.base:
        kernel.machine.print("crashkernel reservation failed - memory is in use.")
    elif not generic:
        kernel.machine.print("crashkernel reservation failed - No suitable area found.")
    else:
        kernel.machine.print(f"cannot allocate crashkernel (size:{wanted.size:#x})")
    return 0


def _reserve_low(kernel: Kernel, size: int) -> bool:
    """Take memory below 4 GiB for what the crash kernel needs there; False if there is none."""
    found = kernel.memblock.phys_alloc_range(size, CRASH_ALIGN, 0, CRASH_ADDR_LOW_MAX, who="reserve_crashkernel_low")
    if not found:
        if kernel.version.generic_crashkernel:
            kernel.machine.print(f"cannot allocate crashkernel low memory (size:{size:#x}).")
        else:
            wanted = f"{size >> 20}MB crashkernel low memory"
            kernel.machine.print(f"Cannot reserve {wanted}, please try smaller size.")
        return False
    if not kernel.version.generic_crashkernel:
        limit = min(kernel.memblock.phys_mem_size(), CRASH_ADDR_LOW_MAX) >> 20
        where = f"{size >> 20}MB of low memory at {found >> 20}MB"
        kernel.machine.print(f"Reserving {where} for crashkernel (low RAM limit: {limit}MB)")
        return True
    text = f"{found:#010x} - {found + size:#010x} ({size // SZ_1M} MB)"
    kernel.machine.print(f"crashkernel low memory reserved: {text}")
    return True
