"""The stub of 6.12 on our firmware. That it does what the real one does, tests/tools/test_conform_stub.py shows."""

import struct

import pytest

from bootstub.boot_params import BOOT_PARAMS
from bootstub.events import KernelPlaced
from bootstub.protocol import MAINLINE
from bootstub.sample_kernel import POINTERS_64_OFFSET, sample_bzimage
from guest.errors import GuestPanic
from guest.records import GuestRecord
from guest.trace import Print
from guest.units import SZ_1G, SZ_2M, SZ_4G
from tools.pipeline import BootConfig, stages_of
from tools.verdict import unaccepted_by_bitmap, unaccepted_by_module

BASE, FIRST = 0x100_0000, 0x1A0_0000
MAP = 0xFFFF_FFFF_8000_0000


def placed(boot):
    """Where the stub put the kernel."""
    return next(r.event for r in boot.trace.records if isinstance(r.event, KernelPlaced))


@pytest.fixture
def mainline(new_boot):
    """``mainline(until, **config)``: a boot by mainline's protocol."""
    return lambda until, **config: new_boot(until, protocol=MAINLINE, **config)


def test_there_is_no_decompressor_behind_the_stub():
    """The stage between stub and kernel is left out, and all others stay."""
    stages = tuple(stages_of(BootConfig(sample_bzimage(), protocol=MAINLINE)))
    assert stages == ("host", "firmware", "efi-stub", "setup-arch", "mm-init", "runtime")


def test_the_table_is_what_the_module_says(mainline):
    """After the stub, the bits of the table are the memory that is not accepted; boot_params has no bitmap."""
    boot = mainline("efi-stub", memory=6 * SZ_1G)
    params = GuestRecord(boot.machine.memory, boot.machine.regs.rsi, BOOT_PARAMS)
    assert params["unaccepted_memory"] == 0
    assert unaccepted_by_bitmap(boot) == unaccepted_by_module(boot)
    assert unaccepted_by_module(boot).total() == 4 * SZ_1G


def test_the_whole_boot(mainline):
    """Our kernel stages go on from the table: bitmap and Secure EPT agree in the end."""
    boot = mainline(None)
    assert boot.next_stage is None
    assert unaccepted_by_bitmap(boot) == unaccepted_by_module(boot)
    assert 0 < unaccepted_by_module(boot).total() < 2 * SZ_1G


def test_without_kaslr_the_kernel_goes_to_its_own_place(mainline):
    """nokaslr: the first place from 16 MiB on, behind the image itself, and no relocation."""
    boot = mainline("efi-stub", cmdline="nokaslr")
    assert (placed(boot).physical, placed(boot).virtual) == (FIRST, BASE)


def test_kaslr_follows_the_seed(mainline):
    """Each seed has its place, in accepted memory and on a border of 2 MiB; the same seed has the same one."""
    places = [placed(mainline("efi-stub", cmdline="", seed=seed)) for seed in (1, 2, 3, 1)]
    assert places[0] == places[3]
    assert len({place.physical for place in places}) == len({place.virtual for place in places}) == 3
    assert all(place.physical % SZ_2M == place.virtual % SZ_2M == 0 for place in places)
    assert all(BASE <= place.physical < SZ_4G for place in places)


def test_a_moved_kernel_is_relocated(mainline):
    """The 64-bit addresses in the data segment grow by the virtual distance."""
    still, moved = mainline("efi-stub", cmdline="nokaslr"), mainline("efi-stub", cmdline="", seed=5)
    delta = placed(moved).virtual - BASE
    assert delta > 0
    addresses = [
        struct.unpack("<16Q", boot.physical.read(placed(boot).physical + SZ_2M + POINTERS_64_OFFSET, 128))
        for boot in (still, moved)
    ]
    assert [address + delta for address in addresses[0]] == list(addresses[1])
    assert MAP < addresses[0][0] < addresses[1][0]


def test_a_memory_option_keeps_the_physical_place(mainline):
    """mem= is for the kernel to apply: the stub says that it leaves physical KASLR, and moves the kernel virtually."""
    boot = mainline("efi-stub", cmdline="mem=2G", seed=4)
    assert placed(boot).physical == FIRST
    assert placed(boot).virtual != BASE
    lines = [r.event.text for r in boot.trace.records if isinstance(r.event, Print)]
    assert "EFI stub: mem= detected on the kernel command line - disabling physical KASLR" in lines


def test_no_room_for_the_kernel(mainline, patched_kernel):
    """A kernel that fits nowhere: the stub says so twice, and the image exits with the status."""
    with pytest.raises(GuestPanic, match="Exit with EFI_OUT_OF_RESOURCES"):
        mainline("efi-stub", memory=64 * (1 << 20), cmdline="nokaslr", kernel=sample_bzimage(), initrd=b"x" * (1 << 25))
