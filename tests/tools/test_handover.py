"""What a stage hands to the next one lies in accepted RAM, or the sanitizer says by name what does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootstub.boot_params import BOOT_PARAMS
from bootstub.protocol import PROTOCOLS
from bootstub.sample_kernel import sample_bzimage
from firmware.efi_types import LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID, guid_bytes
from firmware.tables import EFI_SYSTEM_TABLE
from guest.errors import BootError, Violation
from guest.records import GuestRecord
from guest.units import SZ_4G
from tdx.events import Finding
from tdx.sanitizer import AcceptanceRule
from tools.border import check_border
from tools.facts import take
from tools.handover import check_handover, handover
from tools.pipeline import STAGES, Boot, BootConfig
from tools.verdict import bitmap, verdict_lines

KERNEL = sample_bzimage()
NOWHERE = 1 << 45


def params(boot: Boot) -> GuestRecord:
    return GuestRecord(boot.machine.memory, boot.machine.regs.rsi, BOOT_PARAMS)


def system_table(boot: Boot) -> GuestRecord:
    return GuestRecord(boot.machine.memory, params(boot)["efi_info.efi_systab"], EFI_SYSTEM_TABLE)


def broken(change: Callable[[Boot], None], stage: str = "efi-stub", **how: object) -> Boot:
    """A boot in which ``stage`` does ``change`` at its end; it ran up to there."""
    boot = Boot(BootConfig(KERNEL, initrd=b"initrd" * 999, **how))

    def run(boot: Boot) -> None:
        STAGES[stage](boot)
        change(boot)

    boot.stages = boot.stages | {stage: run}
    boot.run(stage)
    return boot


def found(boot: Boot) -> list[tuple[str, str]]:
    """Rule and thing of each finding."""
    assert boot.sanitizer is not None
    events = [r.event for r in boot.sanitizer.findings]
    return [(e.rule, e.found.split(",")[0]) for e in events if isinstance(e, Finding)]


def put(name: str, value: int) -> Callable[[Boot], None]:
    def change(boot: Boot) -> None:
        params(boot)[name] = value

    return change


def high_half(name: str) -> Callable[[Boot], None]:
    """The piece moves up by 4 GiB, where nothing is accepted yet."""
    return put(name, 1)


def move_boot_params(boot: Boot) -> None:
    boot.machine.regs.rsi += SZ_4G


def move_entry(boot: Boot) -> None:
    boot.machine.regs.rip = NOWHERE


def loop(boot: Boot) -> None:
    at = params(boot)["efi_info.efi_memmap"]
    boot.machine.memory.write_uint(at, at, 8)
    boot.machine.memory.write_uint(at + 8, 0, 8)
    params(boot)["hdr.setup_data"] = at


def indirect(boot: Boot) -> None:
    at = params(boot)["efi_info.efi_memmap"]
    boot.machine.memory.write(at, bytes(8) + (1 << 31).to_bytes(4, "little") + (24).to_bytes(4, "little"))
    boot.machine.memory.write(at + 16, bytes(8) + (4096).to_bytes(8, "little") + SZ_4G.to_bytes(8, "little"))
    params(boot)["hdr.setup_data"] = at


def many_tables(boot: Boot) -> None:
    system_table(boot)["ConfigurationTable"] = SZ_4G


RULE = AcceptanceRule
CASES = {
    "boot_params": (move_boot_params, RULE.HANDOVER, "boot_params"),
    "entry": (move_entry, RULE.HANDOVER_NO_RAM, "entry point"),
    "command line": (high_half("ext_cmd_line_ptr"), RULE.HANDOVER, "command line"),
    "initrd": (high_half("ext_ramdisk_image"), RULE.HANDOVER, "initrd"),
    "initrd size": (put("ext_ramdisk_size", 0xFFFF_FFFF), RULE.HANDOVER_NO_RAM, "initrd"),
    "memory map": (high_half("efi_info.efi_memmap_hi"), RULE.HANDOVER, "EFI memory map"),
    "memory map nowhere": (put("efi_info.efi_memmap_hi", 0xFFFF_FFFF), RULE.HANDOVER_NO_RAM, "EFI memory map"),
    "system table": (high_half("efi_info.efi_systab_hi"), RULE.HANDOVER, "system table"),
    "system table nowhere": (put("efi_info.efi_systab_hi", 0xFFFF_FFFF), RULE.HANDOVER_NO_RAM, "system table"),
    "tables": (many_tables, RULE.HANDOVER, "configuration tables"),
    "bitmap": (put("unaccepted_memory", SZ_4G), RULE.HANDOVER, "bitmap"),
    "bitmap nowhere": (put("unaccepted_memory", NOWHERE), RULE.HANDOVER_NO_RAM, "bitmap"),
    "setup_data": (put("hdr.setup_data", SZ_4G), RULE.HANDOVER, "setup_data"),
    "setup_data nowhere": (put("hdr.setup_data", NOWHERE), RULE.HANDOVER_NO_RAM, "setup_data"),
    "setup_data beyond": (put("hdr.setup_data", (1 << 64) - 8), RULE.HANDOVER_BROKEN, "setup_data.next: a node at "),
    "setup_data loop": (loop, RULE.HANDOVER_BROKEN, "setup_data.next: node "),
    "indirect": (indirect, RULE.HANDOVER, "setup_indirect"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_stub(case):
    """Each piece that the decompressor could not read is found by name at the border of the stub."""
    change, rule, what = CASES[case]
    findings = found(broken(change))
    assert len({thing for _, thing in findings}) == 1
    assert findings[0][0] == rule
    assert findings[0][1].startswith(what)


def test_a_broken_decompressor():
    """The border of the decompressor is watched too; with --sanitize error the boot ends there."""
    boot = broken(high_half("ext_ramdisk_image"), "decompress")
    assert found(boot) == [(RULE.HANDOVER, "initrd")]
    with pytest.raises(Violation) as caught:
        broken(high_half("ext_ramdisk_image"), "decompress", sanitize="error")
    assert (caught.value.rule, caught.value.stage) == (RULE.HANDOVER, "decompress")
    assert "initrd, not accepted, expected accepted RAM" in str(caught.value)


def test_a_table_that_is_not_accepted():
    """Mainline's table is one of the pieces: one whose size is a lie reaches out of accepted memory."""

    def lie(boot: Boot) -> None:
        fields = system_table(boot)
        at, count = fields["ConfigurationTable"], fields["NumberOfTableEntries"]
        data = boot.machine.memory.read(at, count * 24)
        entry = data.index(guid_bytes(LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID)) + 16
        table = int.from_bytes(data[entry : entry + 8], "little")
        boot.machine.memory.write_uint(table + 16, 1 << 40, 8)

    boot = broken(lie, protocol=PROTOCOLS["mainline"])
    assert (RULE.HANDOVER, "table of unaccepted memory") in found(boot)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_sound_boot_hands_over_what_can_be_read(protocol):
    """Nothing is found, and all pieces are there to be looked at."""
    boot = broken(lambda boot: None, protocol=PROTOCOLS[protocol])
    assert found(boot) == []
    names = {piece.name for piece in handover(boot)}
    record = {"v9": "bitmap", "mainline": "table of unaccepted memory"}[protocol]
    assert names == {
        "boot_params", "entry point", "command line", "initrd", "EFI memory map", "system table",
        "configuration tables", record,
    }  # fmt: skip


@pytest.fixture(scope="module")
def handed_over() -> Boot:
    return broken(lambda boot: None)


@given(
    st.dictionaries(
        st.sampled_from([
            "hdr.setup_data", "hdr.ramdisk_image", "ext_ramdisk_image", "hdr.ramdisk_size", "ext_ramdisk_size",
            "hdr.cmd_line_ptr", "ext_cmd_line_ptr", "unaccepted_memory", "efi_info.efi_systab",
            "efi_info.efi_systab_hi", "efi_info.efi_memmap", "efi_info.efi_memmap_hi", "efi_info.efi_memmap_size",
        ]),
        st.integers(0, (1 << 32) - 1) | st.sampled_from([0, 1, 1 << 19, 1 << 20, 0x7D80_0000, 0xFFFF_FFFF]),
    ),
    st.none() | st.binary(min_size=16, max_size=16),
)  # fmt: skip
def test_hostile_boot_params(handed_over, changes, table):
    """Whatever the pointers are, and whatever the system table says, there is a finding or there is none."""
    boot = handed_over
    page = boot.machine.memory.read(boot.machine.regs.rsi, 4096)
    at = system_table(boot).gpa + EFI_SYSTEM_TABLE.sizeof() - 16
    counts = boot.machine.memory.read(at, 16)
    if table is not None:
        boot.machine.memory.write(at, table)
    for name, value in changes.items():
        params(boot)[name] = value
    check_handover(boot)
    boot.machine.memory.write(boot.machine.regs.rsi, page)
    boot.machine.memory.write(at, counts)


@pytest.mark.parametrize("value", [b"\xff", b"\x0f"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_page_of_nonsense(protocol, value):
    """A stub that leaves a page of equal bytes: all that looks at it afterwards has something to say."""
    boot = broken(lambda boot: None, protocol=PROTOCOLS[protocol])
    boot.boot_params = value * 488 + b"\0" + value * 103 + bytes(8) + value * 3496
    boot.system_table = value * EFI_SYSTEM_TABLE.sizeof()
    boot.memmap = value * 100
    check_border(boot)
    assert verdict_lines(boot)
    assert bitmap(boot) == b""
    assert take("nonsense", boot, None).boot_params == boot.boot_params


def test_no_sanitizer_no_finding():
    """With --sanitize off nothing is looked at, and the kernel dies of it in its own time."""
    boot = broken(move_boot_params, sanitize="off")
    with pytest.raises(BootError):
        boot.run()
