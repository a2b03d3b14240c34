"""The decompressor's KASLR on whole guests: what counts as free, what is avoided, and what comes of it."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import pytest

from bootstub.boot_params import BOOT_PARAMS
from bootstub.bzimage import parse_bzimage
from bootstub.decompressor import MAINLINE_DECOMPRESSOR, decompress
from bootstub.decompressor_image import DecompressorImage
from bootstub.events import DecompressorChoice, KernelPlaced, PagingLevels
from bootstub.kaslr import build_string
from bootstub.sample_kernel import POINTERS_64_OFFSET, build_bzimage, build_vmlinux
from firmware.memory_descriptor import MemoryDescriptor
from guest.errors import GuestPanic
from guest.records import GuestRecord
from tests.bootstub.conftest import printed
from tools.verdict import unaccepted_by_bitmap, unaccepted_by_module

MIB, GIB, PAGE = 1 << 20, 1 << 30, 4096
CONVENTIONAL, UNACCEPTED = 7, 15
MORE_RELIABLE, SP = 1 << 16, 1 << 18
BASE, SIZE = 0x100_0000, 8 * MIB


def event(boot, kind):
    """The event of this kind."""
    return next(r.event for r in boot.trace.records if isinstance(r.event, kind))


def areas(boot) -> list[tuple[int, int]]:
    """Where the kernel could have gone: ranges that its first byte and its last may lie in."""
    choice = event(boot, DecompressorChoice)
    return [(a.addr, a.addr + (a.num - 1) * choice.align + choice.size) for a in choice.areas]


@pytest.fixture
def located(new_boot):
    """``located(line, **config)``: a boot with KASLR, up to the kernel's entry point."""
    return lambda line="", **config: new_boot("decompress", cmdline=line, **config)


def high_map(*rows: tuple[int, int, int, int]) -> tuple[MemoryDescriptor, ...]:
    """1 GiB of accepted memory, and ``(type, start, end, attribute)``."""
    low = [(CONVENTIONAL, PAGE, 0xA0000, 0xF), (CONVENTIONAL, MIB, GIB, 0xF)]
    return tuple(MemoryDescriptor.of_range(*row) for row in [*low, *rows])


@pytest.mark.parametrize("memory", [4 * GIB, 16 * GIB])
@pytest.mark.parametrize("seed", range(3))
def test_the_whole_boot_with_kaslr(new_boot, memory, seed):
    """The kernel is where it was put and reserved there, and the kernel stages end with bitmap and module agreeing."""
    boot = new_boot(None, cmdline="", memory=memory, seed=seed)
    placed = event(boot, KernelPlaced)
    assert placed.physical % (2 * MIB) == placed.virtual % (2 * MIB) == 0
    assert placed.virtual != BASE
    assert boot.kernel.image.start == placed.physical
    assert boot.kernel.memblock.is_reserved(placed.physical)
    assert unaccepted_by_bitmap(boot) == unaccepted_by_module(boot)
    pointers = struct.unpack("<4Q", boot.physical.read(placed.physical + 2 * MIB + POINTERS_64_OFFSET, 32))
    assert pointers == tuple(0xFFFF_FFFF_8000_0000 + placed.virtual + n * PAGE for n in range(4))


@pytest.mark.parametrize(("seed", "place"), [(2187, 0x17F80_0000), (3058, 0x7D00_0000)])
def test_the_last_place_of_a_region(new_boot, seed, place):
    """A kernel right below the end of RAM is reserved up to there, though its decompressor needs more memory."""
    kernel = build_bzimage(build_vmlinux(), compression="bzip2")
    boot = new_boot(None, kernel=kernel, cmdline="", seed=seed)
    assert event(boot, KernelPlaced).physical == place
    assert boot.kernel.image.start == place
    assert parse_bzimage(kernel).init_size > SIZE
    assert boot.kernel.image.end <= 6 * GIB
    assert boot.kernel.max_pfn == 6 * GIB >> 12
    assert unaccepted_by_bitmap(boot) == unaccepted_by_module(boot)


def test_the_seed_decides(located):
    """The same seed, the same place; other seeds, others."""
    places = [event(located(seed=seed), KernelPlaced) for seed in (1, 1, 2, 3)]
    assert places[0] == places[1]
    assert len({(p.physical, p.virtual) for p in places}) == 3


def test_nokaslr_and_what_looks_like_it(located):
    """Only the word itself switches KASLR off; the flag in boot_params says whether it is on."""
    for line, on in (("nokaslr", False), ("x=nokaslr nokaslrx", True)):
        boot = located(line)
        assert ("KASLR disabled: 'nokaslr' on cmdline." not in printed(boot, "decompress")) == on
        assert (event(boot, KernelPlaced).virtual != BASE) == on
        assert bool(GuestRecord(boot.machine.memory, boot.machine.regs.rsi, BOOT_PARAMS)["hdr.loadflags"] & 2) == on


def test_free_and_unaccepted_memory_has_places(located):
    """All of it from the image's place on, in the map's order, without the decompressor itself."""
    boot = located(memory=6 * GIB)
    params = GuestRecord(boot.machine.memory, boot.machine.regs.rsi, BOOT_PARAMS)
    low, *others = areas(boot)
    assert low[0] >= BASE + params["hdr.init_size"]
    assert others == [(4 * GIB, 8 * GIB)]
    assert low[1] <= params["efi_info.efi_memmap"]


def test_reliable_memory_counts_alone(located):
    """Where some memory is more reliable, only that has places; for a special purpose, none has."""
    rows = [
        (UNACCEPTED, 4 * GIB, 5 * GIB, 0xF),
        (UNACCEPTED, 5 * GIB, 6 * GIB, 0xF | MORE_RELIABLE),
        (UNACCEPTED, 6 * GIB, 7 * GIB, 0xF | MORE_RELIABLE | SP),
    ]
    assert areas(located(efi_map=high_map(*rows))) == [(5 * GIB, 6 * GIB)]
    assert areas(located(efi_map=high_map(rows[0], (UNACCEPTED, 6 * GIB, 7 * GIB, 0xF | SP))))[1:] == [
        (4 * GIB, 5 * GIB)
    ]


def test_options_of_memory(located):
    """Limits, regions and huge pages on the command line shape what there is to choose from."""
    efi_map = high_map((UNACCEPTED, 4 * GIB, 8 * GIB, 0xF))
    assert areas(located("mem=5G memmap=2M$4G", efi_map=efi_map))[1:] == [(4 * GIB + 2 * MIB, 5 * GIB)]
    huge = areas(located("hugepagesz=1G hugepages=3", efi_map=efi_map))
    assert huge[1:] == [(7 * GIB, 8 * GIB)]


@pytest.mark.parametrize("line", ["mem=20M", "memmap=1M$1G,1M$2G,1M$3G,1M$4G,1M$5G"])
def test_nothing_to_choose_from(located, line):
    """The kernel stays where it is, and is moved in virtual memory only; the log says so."""
    boot = located(line)
    placed = event(boot, KernelPlaced)
    assert (placed.physical, placed.virtual != BASE) == (BASE, True)
    assert printed(boot, "decompress")[0] == "Physical KASLR disabled: no suitable memory region!"


def test_no_place_in_the_map(located):
    """Where no region has room, the address 0 that comes of it is complained about as well."""
    boot = located("memmap=16E$1G memmap=1008M$16M", memory=GIB)
    assert printed(boot, "decompress")[:2] == [
        "Invalid physical address chosen!",
        "Physical KASLR disabled: no suitable memory region!",
    ]
    assert event(boot, KernelPlaced).physical == BASE


def test_what_the_loader_left_is_avoided(located):
    """No place touches boot_params, command line, initrd, or the decompressor."""
    boot = located(initrd=bytes(5 * MIB), memory=2 * GIB)
    params = GuestRecord(boot.machine.memory, boot.machine.regs.rsi, BOOT_PARAMS)
    initrd = params["hdr.ramdisk_image"]
    kept = [(params.gpa, PAGE), (params["hdr.cmd_line_ptr"], 1), (initrd, 5 * MIB), (BASE, params["hdr.init_size"])]
    found = areas(boot)
    assert found
    assert all(end <= at or at + size <= start for start, end in found for at, size in kept)
    assert all(end <= start for (_, end), (start, _) in pairwise(found))


def test_setup_data_is_avoided(new_boot):
    """Nodes of the list, and what they point to, have no places over them."""
    boot = new_boot("efi-stub", cmdline="", memory=2 * GIB)
    params = GuestRecord(boot.machine.memory, boot.machine.regs.rsi, BOOT_PARAMS)
    node, target = 0x1000_0000, 0x2000_0000
    data = struct.pack("<QII", 0, 1 << 31, 24) + struct.pack("<IIQQ", 1, 0, 32 * MIB, target)
    boot.machine.memory.write(node, data)
    params["hdr.setup_data"] = node
    boot.run("decompress")
    found = areas(boot)
    assert all(end <= node or node + 40 <= start for start, end in found)
    assert all(end <= target or target + 32 * MIB <= start for start, end in found)
    assert len(found) == 3


def test_levels_of_page_tables(located):
    """Five levels are wanted where the processor has them and the command line allows it; it is only written down."""
    assert event(located(), PagingLevels) == PagingLevels(4, False)


def test_a_processor_with_five_levels(new_boot, monkeypatch):
    """Then memory above 64 TiB counts too, unless no5lvl is given."""
    row = (UNACCEPTED, 1 << 46, (1 << 46) + GIB, 0xF)
    for line, levels, count in (("", 5, 1), ("no5lvl", 4, 0)):
        boot = new_boot("efi-stub", efi_map=high_map(row), cmdline=line)
        cpuid = boot.machine.platform.cpuid
        answer = lambda leaf, sub=0, real=cpuid: (0, 0, 1 << 16, 0) if leaf == 7 else real(leaf, sub)  # noqa: E731
        monkeypatch.setattr(boot.machine.platform, "cpuid", answer)
        boot.run("decompress")
        assert event(boot, PagingLevels) == PagingLevels(levels, True)
        assert len([start for start, _ in areas(boot) if start >= 1 << 46]) == count


def test_the_decompressor_of_6_12(new_boot):
    """Entered on a machine whose stub left v9's bitmap it accepts nothing, since it looks for a table."""
    boot = new_boot("efi-stub", cmdline="nokaslr mem_encrypt=on")
    boot.trace.stage = "decompress"
    decompress(boot.machine, MAINLINE_DECOMPRESSOR)
    assert "Accepting memory" not in printed(boot, "decompress")[1]
    assert GuestRecord(boot.machine.memory, boot.machine.regs.rsi, BOOT_PARAMS)["hdr.xloadflags"] & 1 << 7


def test_a_heap_above_64_tib(new_boot):
    """A decompressor that far up refuses to go on, in the kernel's words."""
    boot = new_boot("efi-stub", efi_map=high_map((CONVENTIONAL, 1 << 46, (1 << 46) + GIB, 0xF)))
    memory, regs, at = boot.machine.memory, boot.machine.regs, 1 << 46
    memory.write(at, memory.read(regs.rip - 0x200, 64 * PAGE))
    regs.rip, regs.rdx = at + 0x200, 0
    with pytest.raises(GuestPanic, match="Destination address too large"):
        boot.run("decompress")


@pytest.mark.parametrize("kernel", ["debian_kernel", "debian_kernel_6_1"])
def test_what_a_real_decompressor_says_of_itself(request, kernel, new_boot):
    """Its size in memory, and its build string, are read out of its code."""
    path: Path = request.getfixturevalue(kernel)
    bzimage = path.read_bytes()
    header = parse_bzimage(bzimage)
    boot = new_boot("efi-stub", kernel=bzimage, memory=GIB)
    memory = boot.machine.memory
    image = DecompressorImage.at(
        memory, boot.machine.regs.rip - 0x200, GuestRecord(memory, boot.machine.regs.rsi, BOOT_PARAMS)
    )
    assert image.end % PAGE == 0
    assert header.protected_mode_size <= image.end <= header.init_size
    assert image.read_payload(memory) == header.payload(bzimage)
    assert image.build_string(memory) == build_string(bzimage)
