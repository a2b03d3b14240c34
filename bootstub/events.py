"""What the boot stub puts into the trace."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from bootstub.kernel_layout import LOAD_PHYSICAL_ADDR
from bootstub.slots import SlotArea, slot_address
from guest.trace import Event
from guest.units import U32_MAX, round_down

RandomLong = Callable[[], int]
"""kaslr_get_random_long(): the next random number of 64 bits."""


@dataclass(frozen=True, slots=True)
class KernelPlaced(Event):
    """The kernel was unpacked to ``physical``; its ``segments`` are in place, to be mapped at ``virtual``.

    ``virtual`` is an offset from __START_KERNEL_map, as the decompressor counts.
    """

    physical: int
    virtual: int
    segments: int


@dataclass(frozen=True, slots=True)
class PagingLevels(Event):
    """The decompressor wants page tables of ``levels``; the processor has ``la57`` or not. Nothing is switched here.

    Source: arch/x86/boot/compressed/pgtable_64.c, configure_5level_paging().
    """

    levels: int
    la57: bool


@dataclass(frozen=True, slots=True)
class KaslrChoice(Event, ABC):
    """What KASLR chooses from, before it draws: ``areas`` of physical places, ``align`` apart, for ``size`` bytes.

    ``hash`` is what the random numbers start from: build string and boot_params.
    """

    areas: tuple[SlotArea, ...]
    align: int
    size: int
    hash: int

    @property
    def name(self) -> str:
        """One name for the choices of stub and decompressor."""
        return KaslrChoice.__name__

    @property
    def slots(self) -> int:
        """Number of physical places."""
        return sum(area.num for area in self.areas)

    @abstractmethod
    def place(self, random_long: RandomLong) -> tuple[int | None, int]:
        """Physical and virtual address, the former None without a place."""


@dataclass(frozen=True, slots=True)
class DecompressorChoice(KaslrChoice):
    """The decompressor's: among ``virtual_slots`` too, with a number drawn for each of the two."""

    virtual_slots: int

    def place(self, random_long: RandomLong) -> tuple[int | None, int]:
        """slots_fetch_random() and find_random_virt_addr()."""
        physical = slot_address(self.areas, self.align, random_long() % self.slots) if self.slots else None
        return physical, LOAD_PHYSICAL_ADDR + random_long() % self.virtual_slots * self.align


@dataclass(frozen=True, slots=True)
class StubChoice(KaslrChoice):
    """The stub's: one number for both, mixed with what the firmware's generator ``given``.

    There are ``room`` bytes to move the virtual address by. If the physical place is ``lowest``, only that is moved.
    """

    room: int
    given: int
    lowest: bool

    def place(self, random_long: RandomLong) -> tuple[int | None, int]:
        """efi_random_alloc() and efi_decompress_kernel(): the lower half is the physical place, the upper the other."""
        seed = self.given ^ random_long()
        target = 0 if self.lowest else self.slots * (seed & U32_MAX) >> 32
        physical = slot_address(self.areas, self.align, target) if self.slots else None
        return physical, round_down(LOAD_PHYSICAL_ADDR + (self.room * (seed >> 32) >> 32), self.align)
