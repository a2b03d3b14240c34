"""Calling UEFI from the stub: arguments through guest memory, statuses, memory maps."""

from __future__ import annotations

import pytest

from bootstub.efi_call import EfiCalls, EfiError
from firmware.efi_types import EFI_LOAD_FILE2_PROTOCOL_GUID, LINUX_EFI_BOOT_MEMMAP_GUID, EfiMemoryType
from guest.errors import GuestPanic
from guest.trace import Print, ServiceCall

LOADER_DATA, ACPI_RECLAIM = EfiMemoryType.EfiLoaderData, EfiMemoryType.EfiACPIReclaimMemory
INVALID_PARAMETER, UNSUPPORTED, OUT_OF_RESOURCES = 1 << 63 | 2, 1 << 63 | 3, 1 << 63 | 9


@pytest.fixture
def boot(new_boot):
    """A guest whose firmware is about to start the stub."""
    return new_boot("firmware")


@pytest.fixture
def efi(boot):
    return EfiCalls(boot.machine, boot.machine.regs.rdx)


def test_scratch_lies_below_the_stack_pointer(boot, efi):
    """Arguments are stored in the 512 bytes below RSP and nowhere else."""
    before = len(boot.machine.memory.writes)
    assert efi.load(efi.slot(7, 42) and 7) == 42
    efi.bytes_at_scratch(bytes(256))
    written = [(start, end) for _, start, end in boot.machine.memory.writes[before:]]
    assert all(boot.machine.regs.rsp - 512 <= start < end <= boot.machine.regs.rsp for start, end in written)


def test_allocate_pages_below_a_limit(efi):
    """The highest free pages whose last byte is not above the limit."""
    assert efi.allocate_pages(4097, max_address=0x9FFF) == 0x8000
    assert efi.allocate_pages(1, max_address=0x9FFF) == 0x7000
    assert efi.allocate_pages(1, max_address=0x9FFE) == 0x6000


def test_allocate_pages_at_an_address(efi):
    """An address is given once; a taken one is refused without an exception."""
    assert efi.allocate_pages_at(0x200_0000, 0x3000)
    assert not efi.allocate_pages_at(0x200_2000, 0x1000)
    assert efi.allocate_pages_at(0x200_3000, 0x1000)


@pytest.mark.parametrize(("address", "size"), [(1 << 63, 4096), ((1 << 64) - 4096, 8192), (1 << 52, 4096), (0x1001, 1)])
def test_addresses_that_do_not_exist_are_not_found(efi, address, size):
    """Addresses beyond the address space, or inside a page, are taken by nobody and given to nobody."""
    assert not efi.allocate_pages_at(address, size)


@pytest.mark.parametrize("pages", [1 << 40, 1 << 51, (1 << 52) - 1, (1 << 64) - 1])
def test_no_memory_of_that_size(boot, efi, pages):
    """A number of pages that no guest has is EFI_OUT_OF_RESOURCES, FreePages() of it EFI_NOT_FOUND."""
    assert efi.boot("AllocatePages", 0, LOADER_DATA, pages, efi.slot(0)) == OUT_OF_RESOURCES
    assert efi.boot("FreePages", 0x100_0000, pages) == 1 << 63 | 14


def test_errors_carry_the_status(efi):
    """A failed call raises EfiError with the EFI_STATUS."""
    with pytest.raises(EfiError) as caught:
        efi.allocate_pages(1 << 50)
    assert caught.value.status == OUT_OF_RESOURCES
    with pytest.raises(EfiError) as caught:
        efi.handle_protocol(0xDEAD_0000, EFI_LOAD_FILE2_PROTOCOL_GUID)
    assert (caught.value.status, str(caught.value)) == (INVALID_PARAMETER, "0x8000000000000002")


def test_memory_map_with_room_to_spare(boot, efi):
    """The buffer has room for the slack and its header; one that is to last is a configuration table."""
    memmap = efi.get_memory_map(8, install=True)
    assert memmap.gpa == memmap.pool + 40 == efi.configuration_table(LINUX_EFI_BOOT_MEMMAP_GUID) + 40
    assert memmap.pool % 4096 == 0
    assert (memmap.desc_size, memmap.desc_ver) == (48, 1)
    found = efi.descriptors(memmap)
    assert len(found) == memmap.nr_desc == memmap.map_size // 48
    (own,) = [d for d in found if d.start <= memmap.gpa < d.end]
    assert own.type == ACPI_RECLAIM
    assert memmap.buff_size == (memmap.nr_desc - 1 + 8) * 48  # the buffer itself split a range


def test_memory_map_again_in_the_same_buffer(efi):
    """A refreshed map has the same buffer, a new key, and what was allocated since; nothing was allocated for it."""
    first = efi.get_memory_map(8)
    page = efi.allocate_pages(1, max_address=0x9FFF)
    second = efi.refresh_memory_map(first.gpa, first.buff_size)
    assert (second.gpa, second.buff_size) == (first.gpa, first.buff_size)
    assert second.map_key > first.map_key
    assert [d.type for d in efi.descriptors(second) if d.start == page] == [LOADER_DATA]


def test_memory_map_that_does_not_fit_any_more(efi):
    """A map that outgrew the buffer is EFI_BUFFER_TOO_SMALL."""
    first = efi.get_memory_map(8)
    for limit in range(0x4FFF, 0x1FFFF, 0x2000):
        efi.allocate_pages(1, max_address=limit)
    with pytest.raises(EfiError, match="0x8000000000000005"):
        efi.refresh_memory_map(first.gpa, first.buff_size)


def test_a_freed_pool_is_free(boot, efi):
    """FreePool() gives the pages back; what is no pool is EFI_INVALID_PARAMETER, null too."""
    before = boot.machine.trace.count
    gpa = efi.allocate_pool(100)
    efi.free_pool(gpa)
    efi.free_pool(gpa)
    efi.free_pool(0)
    assert efi.allocate_pool(100) == gpa
    statuses = [r.event.status for r in boot.trace.records[before:] if isinstance(r.event, ServiceCall)]
    assert statuses == [0, 0, 1 << 63 | 2, 1 << 63 | 2, 0]


def test_a_service_that_is_not_offered(boot, efi):
    """It answers EFI_UNSUPPORTED, and the trace shows the call."""
    assert efi.runtime("GetTime", 0, 0) == UNSUPPORTED
    assert boot.trace.records[-1].event == ServiceCall("GetTime", (0, 0), UNSUPPORTED)


def test_a_pointer_to_nowhere(boot, efi):
    """A service pointer that was overwritten leads where no firmware is: the guest dies there."""
    boot_services = efi.system_table["BootServices"]
    boot.physical.write(boot_services + 24 + 8 * 5, (0x1234_5000).to_bytes(8, "little"))  # AllocatePool
    with pytest.raises(GuestPanic, match="call to 0x12345000, where no firmware service is"):
        efi.allocate_pool(1)


def test_boot_services_are_gone_after_exit(boot, efi):
    """A boot service called after ExitBootServices() is fatal, a runtime service is not."""
    boot.run("efi-stub")
    assert efi.runtime("GetVariable", 0, 0, 0, 0, 0) == INVALID_PARAMETER
    with pytest.raises(GuestPanic, match="boot service AllocatePool called after ExitBootServices"):
        efi.allocate_pool(1)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("n" * 247, "ERROR: " + "n" * 247),
        ("n" * 248, "ERROR: " + "n" * 248 + "[Message truncated]"),
        ("n" * 999, "ERROR: " + "n" * 248 + "[Message truncated]"),
        ("\u20ac" * 83, "ERROR: " + "\u20ac" * 82 + "[Message truncated]"),
        ("half \ud800", "ERROR: half \ufffd"),
    ],
    ids=["fits", "one too long", "long", "UTF-8 of three bytes", "half a pair"],
)
def test_a_long_line_is_cut(boot, efi, text, line):
    """Of a message 255 bytes are printed, its line end among them."""
    efi.error(text)
    assert [r.event.text for r in boot.trace.records if isinstance(r.event, Print)][-1] == f"EFI stub: {line}"
