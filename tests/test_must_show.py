"""What the emulator promises as a whole, on real input where there is some."""

from __future__ import annotations

from pathlib import Path

import pytest

from bootstub import unaccepted_memory
from bootstub.bzimage import parse_bzimage
from bootstub.payload import decompress
from bootstub.sample_kernel import sample_bzimage
from bootstub.vmlinux import load_segments
from firmware.efi_types import EfiMemoryType
from firmware.memory_descriptor import MemoryDescriptor
from firmware.tdvf import SectionType, parse_tdvf
from guest.bitmap import GuestBitmap
from guest.errors import MemoryFault
from guest.units import PMD_SIZE, SZ_1G, SZ_1M, SZ_4G, SZ_64M
from tools.pipeline import Boot, BootConfig


def test_debian_kernel_is_loaded_byte_by_byte(debian_kernel: Path) -> None:
    """Each PT_LOAD segment of Debian's kernel lies in guest memory where its program header puts it."""
    bzimage = debian_kernel.read_bytes()
    boot = Boot(BootConfig(bzimage))
    boot.run("decompress")
    vmlinux = decompress(parse_bzimage(bzimage).payload(bzimage))
    kernel = load_segments(vmlinux)
    assert len(kernel.segments) >= 4
    for segment in kernel.segments:
        data = vmlinux[segment.p_offset : segment.p_offset + segment.p_filesz]
        assert boot.physical.read(segment.p_paddr, segment.p_filesz) == data
    assert boot.machine.regs.rip == kernel.entry


def test_debian_firmware_boots_64_gib(debian_ovmf: Path) -> None:
    """A boot with Debian's OVMF adds the sections that its metadata names, and leaves 62 GiB unaccepted at entry."""
    tdvf = parse_tdvf(debian_ovmf.read_bytes())
    boot = Boot(BootConfig(sample_bzimage(), memory=64 * SZ_1G, firmware=tdvf))
    boot.run("efi-stub")
    for section in tdvf.sections:
        assert boot.sept.mapped().covers(section.address, section.end)
    (bfv,) = tdvf.of_type(SectionType.BFV)
    assert boot.physical.read(bfv.address, bfv.raw_size) == tdvf.data(bfv)
    assert boot.sept.mapped(SZ_4G).total() == 0
    boot.run()
    assert boot.kernel is not None


def small_unaccepted_map() -> tuple[MemoryDescriptor, ...]:
    """1 GiB of accepted memory and 65 MiB of unaccepted memory that begins 1 MiB off a 2 MiB border."""
    conventional, unaccepted = EfiMemoryType.EfiConventionalMemory, EfiMemoryType.EfiUnacceptedMemoryType
    start = SZ_4G + SZ_1M
    return (
        MemoryDescriptor.of_range(conventional, 0x1000, 0xA0000, 0xF),
        MemoryDescriptor.of_range(conventional, SZ_1M, SZ_1G, 0xF),
        MemoryDescriptor.of_range(unaccepted, start, start + SZ_64M + SZ_1M, 0xF),
    )


def test_a_missed_accept_is_fatal_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub that does not accept the unaligned head kills the kernel that uses it: stage, address, state named."""

    def forgetful(bitmap: GuestBitmap, accept: object, start: int, end: int) -> None:
        first, last = -(-start // PMD_SIZE), end // PMD_SIZE
        bitmap.set(first, last)  # and nothing is accepted outside whole units

    config = BootConfig(sample_bzimage(), efi_map=small_unaccepted_map(), script=())
    sound = Boot(config)
    sound.run()
    monkeypatch.setattr(unaccepted_memory, "process_unaccepted_memory", forgetful)
    boot = Boot(config)
    with pytest.raises(MemoryFault) as death:
        boot.run()
        touch_all_free_memory(boot)
    assert death.value.gpa == SZ_4G + SZ_1M
    assert death.value.stage == "runtime"
    assert death.value.state == "FREE (not accepted)"
    assert "0x100100000" in str(death.value)


def touch_all_free_memory(boot: Boot) -> None:
    """Allocate and write every page that the kernel has, one by one in blocks of 1 MiB and below."""
    assert boot.kernel is not None
    assert boot.kernel.allocator is not None
    for order in (8, 4, 0):
        while (pfn := boot.kernel.allocator.alloc_pages(order=order)) is not None:
            boot.machine.memory.clear(pfn << 12, pfn + (1 << order) << 12)


def test_touching_all_memory_is_safe_in_a_sound_boot() -> None:
    """With the accept in place, every page that the allocator gives out can be written."""
    boot = Boot(BootConfig(sample_bzimage(), efi_map=small_unaccepted_map(), script=()))
    boot.run()
    touch_all_free_memory(boot)
    assert boot.kernel is not None
    assert boot.kernel.allocator is not None
    assert sum(zone.nr_unaccepted for zone in boot.kernel.allocator.zones) == 0
