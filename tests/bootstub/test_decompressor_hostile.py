"""Whatever a boot loader leaves, the decompressor starts a kernel or refuses."""

from __future__ import annotations

import random

import pytest

from bootstub.boot_params import BOOT_PARAMS
from bootstub.bzimage import parse_bzimage
from bootstub.decompressor import MAINLINE_DECOMPRESSOR, V9_DECOMPRESSOR, decompress
from bootstub.sample_kernel import sample_bzimage
from guest.errors import BootError, FormatError
from guest.records import GuestRecord, field_extents
from tools.conformance.decompressor_set_up import DecompressorSetUp
from tools.judge_decompressor_maps import set_up

FIELDS = [name for name in field_extents(BOOT_PARAMS) if not name.startswith(("edd", "edid", "_pad", "screen_info.v"))]
VALUES = (0, 1, 0xFF, 0x1000, 0xFFFF, 0x200_0000, 0x7FFF_FFFF, 0xFFFF_FFFF, 1 << 52, (1 << 64) - 1)
WORDS = (
    "mem=1G",
    "memmap=1M$0x100000000,16E$1G",
    "hugepagesz=1G",
    "hugepages=99999999999",
    "acpi_rsdp=1234",
    "--",
    '"',
)


def started(number: int) -> str:
    """Run a set-up of the judge with some fields of boot_params, and some bytes of memory, overwritten."""
    rng, image = random.Random(number), sample_bzimage()
    case = set_up(number, 7, parse_bzimage(image).init_size)
    case["cmdline"] += " " + " ".join(rng.sample(WORDS, rng.randrange(3)))
    machine = DecompressorSetUp(case, image).machine
    params = GuestRecord(machine.memory, case["boot_params_pa"], BOOT_PARAMS)
    for name in rng.sample(FIELDS, rng.randrange(4)):
        offset, size = field_extents(BOOT_PARAMS)[name]
        machine.memory.write(params.gpa + offset, (rng.choice(VALUES) % (1 << 8 * size)).to_bytes(size, "little"))
    for node in (*case.get("setup_data", ()), *([case["srat"]["at"]] if "srat" in case else [])):
        at = node if isinstance(node, int) else node[0]
        machine.memory.write(at + rng.randrange(200), rng.choice(VALUES).to_bytes(8, "little"))
    try:
        decompress(machine, rng.choice((V9_DECOMPRESSOR, MAINLINE_DECOMPRESSOR)))
    except BootError as error:
        return type(error).__name__
    return "started"


def test_a_kernel_or_a_refusal():
    """Fields, nodes and tables with any values end in a kernel or in one of our errors, and both happen."""
    ends = {started(number) for number in range(60)}
    assert {"started", "FormatError", "MemoryFault"} <= ends


@pytest.mark.parametrize(
    ("field", "value"), [("efi_memdesc_size", 0), ("efi_memdesc_size", 8), ("efi_memmap_size", -1)]
)
def test_a_memory_map_that_is_none(new_boot, field, value):
    """A map without a size of descriptors, or one that is no loader's, is refused in one line."""
    boot = new_boot("efi-stub", cmdline="")
    GuestRecord(boot.machine.memory, boot.machine.regs.rsi, BOOT_PARAMS)[f"efi_info.{field}"] = value & 0xFFFF_FFFF
    with pytest.raises(FormatError, match=r"EFI memory map|efi_info"):
        boot.run("decompress")
