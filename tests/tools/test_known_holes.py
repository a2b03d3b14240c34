"""Each known hole, in a boot that has it and in one that has not."""

from __future__ import annotations

import json

import pytest

import bootstub.exit_boot
from bootstub.efi_e820 import e820_type_of
from bootstub.protocol import PROTOCOLS
from bootstub.sample_kernel import sample_bzimage
from firmware.efi_types import LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID, EfiMemoryType, guid_bytes
from firmware.memory_descriptor import MemoryDescriptor
from firmware.tables import EFI_BOOT_SERVICES, EFI_SYSTEM_TABLE
from guest.errors import BootError
from guest.records import GuestRecord
from guest.units import SZ_1G, SZ_1M, SZ_2M, SZ_4G
from kernel.runtime import parse_script
from tools.conformance.unaccepted_table import build_table
from tools.known_holes import HOLES, hole_lines
from tools.pipeline import STAGES, Boot, BootConfig
from tools.verdict import verdict_lines

KERNEL = sample_bzimage()
LOW = [{"type": "Conventional", "start": "0", "size": "640K"}, {"type": "Conventional", "start": "1M", "size": "2047M"}]


def boot_of(until: str = "setup-arch", **how: object) -> Boot:
    boot = Boot(BootConfig(KERNEL, script=(), **how))
    boot.run(until)
    return boot


def names(boot: Boot) -> list[str]:
    return [line.split(": ")[0].removeprefix("known hole ") for line in hole_lines(boot)]


def test_the_table():
    """Each hole has a name of its own, a reason and a source."""
    assert len({hole.name for hole in HOLES}) == len(HOLES)
    assert all(hole.text and hole.source for hole in HOLES)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("memory", [4096, 4097, 4104, 4112, 63488, 63490])
def test_guard_bit(memory, protocol):
    """v9 alone has it, and only where RAM ends at a multiple of 16 MiB: 2 GiB lie below 4 GiB, the rest above."""
    boot = boot_of(memory=memory << 20, protocol=PROTOCOLS[protocol])
    assert names(boot) == (["guard-bit"] if protocol == "v9" and memory % 16 == 0 else [])


@pytest.mark.parametrize(
    ("gib", "where"), [(4, "the byte behind"), (62, "in the page behind"), (64, "the byte behind")]
)
def test_guard_bit_in_a_page_of_its_own(gib, where):
    """Where RAM ends at a multiple of 64 GiB the whole page is somebody else's."""
    (line,) = hole_lines(boot_of(memory=gib * SZ_1G))
    assert f"{where} what the kernel reserves of the bitmap" in line
    assert line.endswith("[v9 09/14 and 11/14]")


def test_guard_bit_that_was_overwritten():
    """What somebody else wrote there is told: accepted memory looks unaccepted now."""
    boot = boot_of()
    assert boot.kernel is not None
    at = boot.kernel.params["unaccepted_memory"] + (boot.kernel.max_pfn >> 12)
    boot.machine.memory.write(at, b"\xff")
    (line,) = hole_lines(boot)
    assert f"is at {at:#x}" in line
    assert "overwritten with 0xff" in line
    end = boot.kernel.max_pfn << 12
    assert boot.kernel.unaccepted.range_contains_unaccepted_memory(end - SZ_2M, end)


@pytest.fixture
def booted(command, file):
    """``booted(*rows, words)``: lines that a boot of a map of unaccepted memory prints."""

    def run(*rows: tuple[int, int], protocol: str = "v9") -> list[str]:
        unaccepted = [{"type": "Unaccepted", "start": f"{start:#x}", "size": f"{size:#x}"} for start, size in rows]
        path = file("map.json", json.dumps([*LOW, *unaccepted]))
        answer = command("boot", "--efi-map", path, "--protocol", protocol)
        return [line for line in (answer.out + answer.err).splitlines() if "known hole over" in line or "rror" in line]

    return run


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_overlapping_descriptors(booted, protocol):
    """A small descriptor within a large one is accepted at once, and once more later, of which the guest dies."""
    hole, death = booted((SZ_4G, SZ_1G), (SZ_4G + 64 * SZ_1M, SZ_1M), protocol=protocol)
    assert "known hole overlapping-unaccepted: [0x104000000, 0x104100000) is listed twice" in hole
    assert "ccept" in death


def test_the_same_descriptor_twice(booted):
    """The stub itself dies of the second accept."""
    hole, death = booted((SZ_4G, SZ_1M), (SZ_4G, SZ_1M))
    assert "[0x100000000, 0x100100000) is listed twice" in hole
    assert "efi-stub" in death


@pytest.mark.parametrize("rows", [[(SZ_4G, SZ_1G)], [(SZ_4G, SZ_1G), (SZ_4G + SZ_1G, SZ_1M)], [(SZ_4G, SZ_1G)] * 2])
def test_descriptors_that_do_no_harm(booted, rows):
    """Descriptors that touch, and whole units that are listed twice and share their bits, are accepted once."""
    assert booted(*rows) == []


def reused(size: int, base: int = SZ_4G) -> Boot:
    """Mainline with 2 GiB from 4 GiB on, and a table for ``size`` units that an earlier kernel had left."""
    boot = Boot(BootConfig(KERNEL, script=(), protocol=PROTOCOLS["mainline"]))

    def stub(boot: Boot) -> None:
        memory, regs = boot.machine.memory, boot.machine.regs
        table, guid = 0x2000_0000, 0x2010_0000
        memory.write(table, build_table(1, SZ_2M, base, size // 8, []))
        memory.write(guid, guid_bytes(LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID))
        services = GuestRecord(
            memory, GuestRecord(memory, regs.rdx, EFI_SYSTEM_TABLE)["BootServices"], EFI_BOOT_SERVICES
        )
        assert boot.machine.call(services["InstallConfigurationTable"], guid, table) == 0
        STAGES["efi-stub"](boot)

    boot.stages = boot.stages | {"efi-stub": stub}
    return boot


def test_above_a_reused_table():
    """A table that ends below the region: what lies between is accepted too, though nobody listed it, and kills."""
    boot = reused(8, base=SZ_1G)
    with pytest.raises(BootError, match="efi-stub"):
        boot.run("efi-stub")
    (line,) = (line for line in verdict_lines(boot) if line.startswith("known hole"))
    assert line.startswith(
        "known hole above-reused-table: [0x100000000, 0x180000000) lies above the table's end 0x41000000, "
        "[0x41000000, 0x100000000) was to be accepted with it: "
    )


@pytest.mark.parametrize("size", [8, 1024, 4096])
def test_a_reused_table_that_reaches_the_region(size):
    """A table that ends within the region or behind it: the rest is accepted at once, as it should be."""
    boot = reused(size)
    boot.run("efi-stub")
    assert names(boot) == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("memory", "lost"), [(4, 2), (64, 62)])
def test_a_kernel_without_support_loses_the_memory(monkeypatch, protocol, memory, lost):
    """Its stub leaves unaccepted descriptors out, and the boot says how much is lost; with support nothing is."""
    how = {"memory": memory * SZ_1G, "protocol": PROTOCOLS[protocol]}
    assert not any(line.startswith("lost: ") for line in verdict_lines(boot_of("efi-stub", **how)))

    def without_support(d: MemoryDescriptor, soft_reserve: bool) -> int | None:
        return None if d.type == EfiMemoryType.EfiUnacceptedMemoryType else e820_type_of(d, soft_reserve)

    monkeypatch.setattr(bootstub.exit_boot, "e820_type_of", without_support)
    lines = verdict_lines(boot_of("runtime", **how))
    assert f"lost: {lost << 20} KiB of unaccepted memory are not in the kernel's e820 table" in lines


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("cmdline", ["mem=4G", "memmap=3G", "memmap=6G!4G"])
def test_bits_that_are_not_reserved(cmdline, protocol):
    """A kernel that is told to see less memory reserves less of v9's bitmap; mainline's table is kept whole."""
    boot = boot_of(memory=8 * SZ_1G, protocol=PROTOCOLS[protocol], cmdline=f"nokaslr {cmdline}")
    assert ("unreserved-bits" in names(boot)) == (protocol == "v9")
    assert "unreserved-bits" not in names(boot_of(memory=8 * SZ_1G, protocol=PROTOCOLS[protocol]))


def test_bits_behind_the_bitmap():
    """v9 looks up added memory all the same; here the data behind the bitmap say that some of it is unaccepted."""
    script = parse_script("hotadd 128G 128M accept")
    for protocol in PROTOCOLS.values():
        boot = Boot(BootConfig(KERNEL, script=tuple(script), protocol=protocol))
        boot.run()
        found = [line for line in hole_lines(boot) if "behind-the-bitmap" in line]
        assert bool(found) == (protocol.name == "v9")
        assert all("the bits of [0x2000000000, 0x2008000000) are looked up at" in line for line in found)
