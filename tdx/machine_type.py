"""How QEMU's machine types split RAM around 4 GiB.

Source: QEMU hw/i386/pc_q35.c, pc_q35_init(); hw/i386/pc_piix.c, pc_init1().
"""

from __future__ import annotations

from dataclasses import dataclass

from guest.ranges import RangeSet
from guest.units import SZ_4G


@dataclass(frozen=True, slots=True)
class MachineType:
    """QEMU's machine types, as far as memory goes: ``q35`` or ``pc``, and ``max-ram-below-4g`` in bytes."""

    name: str = "q35"
    max_ram_below_4g: int | None = None

    def ram(self, memory: int) -> RangeSet:
        """Guest physical RAM of the machine with ``memory`` bytes; what does not lie low starts at 4 GiB."""
        low = _LOW_RAM[self.name](memory, self.max_ram_below_4g)
        if memory < low:
            return RangeSet([(0, memory)])
        return RangeSet([(0, low), (SZ_4G, SZ_4G + memory - low)])


def _q35_low_ram(memory: int, limit: int | None) -> int:
    """2816 MiB, where configuration space begins; 2 GiB if that is not enough (hw/i386/pc_q35.c, pc_q35_init())."""
    low = 0x8000_0000 if memory >= 0xB000_0000 else 0xB000_0000
    return min(low, SZ_4G if limit is None else limit)


def _pc_low_ram(memory: int, limit: int | None) -> int:
    """3.5 GiB; a whole number of GiB, 3 at most, if that is not enough (hw/i386/pc_piix.c, pc_init1())."""
    low = 0xE000_0000 if limit is None else limit
    return min(low, 0xC000_0000) if memory >= low else low


_LOW_RAM = {"q35": _q35_low_ram, "pc": _pc_low_ram}
MACHINE_NAMES = tuple(_LOW_RAM)
