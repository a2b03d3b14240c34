"""The EFI stub on a real small boot: boot_params to the byte, command line, initrd, relocation."""

from __future__ import annotations

import struct

import pytest

from bootstub.protocol import MAINLINE, PROTOCOLS, V9
from bootstub.sample_kernel import sample_bzimage
from firmware.memory_descriptor import MemoryDescriptor
from guest.errors import FormatError, GuestPanic, MemoryFault
from guest.trace import ServiceCall
from tests.bootstub.conftest import printed

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
LOADER_CODE, LOADER_DATA, BOOT_DATA, CONVENTIONAL, ACPI_RECLAIM, UNACCEPTED = 1, 2, 4, 7, 9, 15
WB, SP = 0xF, 0x40000
IMAGE_BASE, SIZE_OF_IMAGE, VIRTUAL_SIZE = 0x70, 0x90, 0x100  # in the sample's PE headers
SETUP_SECTS, SETUP_DATA, INIT_SIZE = 0x1F1, 0x250, 0x260
INITRD = b"070701 not really a cpio archive\n" * 300

E820_OF_4G = [  # of OVMF's memory map with an initrd of 9900 bytes; sizes in bytes
    (0x0000000000000000, 0xA0000, 1),
    (0x0000000000100000, 0x700000, 1),
    (0x0000000000800000, 0x6000, 4),
    (0x0000000000806000, 0x5000, 1),
    (0x000000000080B000, 0x2000, 4),
    (0x000000000080D000, 0x7D0EA000, 1),
    (0x000000007D8F7000, 0x1000, 3),  # the last memory map, EfiACPIReclaimMemory
    (0x000000007D8F8000, 0x11A8000, 1),
    (0x000000007EAA0000, 0x102000, 2),
    (0x000000007EBA2000, 0x94A000, 1),
    (0x000000007F4EC000, 0x280000, 2),
    (0x000000007F76C000, 0x12000, 3),
    (0x000000007F77E000, 0x80000, 4),
    (0x000000007F7FE000, 0x6F6000, 1),
    (0x000000007FEF4000, 0x84000, 2),
    (0x000000007FF78000, 0x88000, 4),
    (0x00000000E0000000, 0x10000000, 2),
    (0x00000000FFC00000, 0x400000, 2),
    (0x0000000100000000, 0x80000000, 1),
]


def u32(page: bytes, offset: int) -> int:
    return struct.unpack_from("<I", page, offset)[0]


def calls(boot, service):
    """The calls to a boot service while the stub ran."""
    records = [r.event for r in boot.trace.records if r.stage == "efi-stub" and isinstance(r.event, ServiceCall)]
    return [event for event in records if event.service == service]


def given_map(*rows: tuple[int, int, int]) -> dict[str, object]:
    """An ``efi_map`` of (type, start, end), with low memory that every boot needs."""
    rows = ((CONVENTIONAL, 0x1000, 0xA0000), *rows)
    return {"efi_map": tuple(MemoryDescriptor.of_range(*row, WB) for row in rows)}


def test_boot_params_to_the_byte(new_boot):
    """Every byte of the page is what the stub's rules say: the listed fields, and zero everywhere else."""
    boot = new_boot("efi-stub", initrd=INITRD)
    regs, page = boot.machine.regs, boot.boot_params
    want = bytearray(4096)
    want[0x200:0x26C] = sample_bzimage()[0x200:0x26C]  # setup_header from `jump` on, as it stands in the image
    for offset, fmt, *values in (
        (0x078, "Q", 0x7D8F6000),  # unaccepted_memory
        (0x1C0, "4s", b"EL64"),
        (0x1C4, "I", 0x7EAA03B0),  # efi_systab
        (0x1C8, "II", 48, 1),  # efi_memdesc_size, efi_memdesc_version
        (0x1D0, "II", 0x7D8F7028, 28 * 48),  # efi_memmap, behind struct efi_boot_memmap; efi_memmap_size
        (0x1E0, "I", 32768),  # alt_mem_k
        (0x1E8, "B", 19),  # e820_entries
        (0x1EC, "B", 2),  # secure_boot: disabled
        (0x1F2, "H", 1),  # root_flags
        (0x1FA, "H", 0xFFFF),  # vid_mode
        (0x1FE, "H", 0xAA55),  # boot_flag
        (0x202, "4s", b"HdrS"),
        (0x210, "B", 0x21),  # type_of_loader
        (0x214, "I", 0x1001000),  # code32_start
        (0x218, "II", 0x7D8F8000, 9900),  # ramdisk_image, ramdisk_size
        (0x228, "I", 0x7D8FB000),  # cmd_line_ptr
    ):
        struct.pack_into("<" + fmt, want, offset, *values)
    for number, entry in enumerate(E820_OF_4G):
        struct.pack_into("<QQI", want, 0x2D0 + 20 * number, *entry)
    assert [hex(at) for at in range(4096) if page[at] != want[at]] == []
    assert boot.physical.read(0x7D8F8000, len(INITRD)) == INITRD
    assert boot.physical.read(0x7D8FB000, 18) == b"nokaslr efi=debug\0"
    assert boot.physical.read(0x7EAA03B0, 8) == b"IBI SYST"
    assert (regs.rsi, regs.rip) == (0x7D8FC000, 0x1001200)
    assert "EFI stub: Loaded initrd from LINUX_EFI_INITRD_MEDIA_GUID device path" in printed(boot, "efi-stub")


def test_memory_that_only_the_page_points_to_is_loader_data(new_boot):
    """boot_params, command line, initrd and bitmap are EfiLoaderData, the final map EfiACPIReclaimMemory."""
    boot = new_boot("efi-stub", initrd=INITRD)
    page = boot.boot_params
    at, size = u32(page, 0x1D0), u32(page, 0x1D4)
    rows = [struct.unpack_from("<I4xQ8xQQ", boot.physical.read(at + n, 40)) for n in range(0, size, 48)]

    def kind(gpa: int) -> int:
        (found,) = [row[0] for row in rows if row[1] <= gpa < row[1] + row[2] * 4096]
        return found

    pointers = (boot.machine.regs.rsi, u32(page, 0x228), u32(page, 0x218), u32(page, 0x078))
    assert [kind(gpa) for gpa in pointers] == [LOADER_DATA] * 4
    assert kind(at) == ACPI_RECLAIM
    assert rows[-1] == (UNACCEPTED, 4 * GIB, 2 * GIB // 4096, 0)


def test_bitmap_of_a_4g_guest(new_boot):
    """385 bytes are cleared, and the bits of [4 GiB, 6 GiB) are set: bytes 256 to 383."""
    boot = new_boot("efi-stub")
    bitmap = struct.unpack_from("<Q", boot.boot_params, 0x78)[0]
    assert boot.physical.read(bitmap, 385) == bytes(256) + b"\xff" * 128 + b"\0"
    assert (bitmap, bitmap + 385) in {(start, end) for _, start, end in boot.machine.memory.writes}


def test_without_unaccepted_memory_the_pointer_is_null(new_boot):
    """A guest whose memory all lies below 4 GiB has no bitmap: its firmware accepted everything."""
    boot = new_boot("efi-stub", memory=2 * GIB)
    assert boot.boot_params[0x78:0x80] == bytes(8)
    assert boot.bitmap() == b""


def test_order_of_services(new_boot):
    """The stub asks for what the classic flow asks for, in its order, and no service after ExitBootServices."""
    boot = new_boot("efi-stub", initrd=INITRD)
    services = [r.event.service for r in boot.trace.records if isinstance(r.event, ServiceCall)]
    assert services[services.index("HandleProtocol") :] == [
        "HandleProtocol",  # the loaded image
        "AllocatePages",  # boot_params
        "AllocatePool",  # command line
        "LocateDevicePath", "HandleProtocol", "LoadFile", "AllocatePages", "LoadFile", "OutputString",
        "GetVariable",  # SecureBoot
        "GetMemoryMap", "AllocatePool", "GetMemoryMap", "AllocatePages", "FreePool",  # allocate_e820: the bitmap
        "GetMemoryMap", "AllocatePool", "InstallConfigurationTable", "GetMemoryMap", "ExitBootServices",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("", b""),
        ("root=/dev/vda\nsecond line", b"root=/dev/vda"),
        ("root=/dev/vda\0behind", b"root=/dev/vda"),
        ("ñandú=1 \U0001f642", "ñandú=1 \U0001f642".encode()),
        ("a" * 2047, b"a" * 2047),
        ("a" * 2000 + " " + "b" * 47, b"a" * 2000),  # 2048 bytes and no room for NUL
        ("a" * 1000 + ' x="' + "b c " * 400, b"a" * 1000),  # white space in quotes does not count
        ("a" * 2048, b""),
        ("é" * 1024, b""),
        ("x " + "é" * 1023, b"x"),
    ],
)
def test_command_line(new_boot, given, left):
    """Load options end at NUL or line feed; at 2048 bytes they are cut at the last white space outside quotes."""
    boot = new_boot("efi-stub", cmdline=given)
    at = u32(boot.boot_params, 0x228) | u32(boot.boot_params, 0x0C8) << 32
    assert boot.physical.read(at, len(left) + 1) == left + b"\0"
    too_long = [text for text in printed(boot, "efi-stub") if "Command line" in text]
    cut = len(given.encode()) >= 2048 and "\n" not in given
    assert too_long == [f"EFI stub: ERROR: Command line is too long: truncated to {len(left)} bytes"] * cut


def test_no_initrd_is_no_error(new_boot):
    """Without an initrd LocateDevicePath finds nothing, and the ramdisk fields stay zero."""
    boot = new_boot("efi-stub")
    assert [call.status for call in calls(boot, "LocateDevicePath")] == [1 << 63 | 14]
    assert boot.boot_params[0x218:0x220] == boot.boot_params[0x0C0:0x0C8] == bytes(8)


def test_initrd_without_room(new_boot):
    """An initrd that no free range can hold stops the stub."""
    with pytest.raises(GuestPanic, match="EFI stub: ERROR: failed, status 0x8000000000000009"):
        new_boot("efi-stub", memory=128 * MIB, initrd=bytes(100 * MIB))


def test_image_at_its_preferred_base_stays(new_boot):
    """An image that lies where it wants to, with room for init_size, is not moved; RDX is the setup code's size."""
    boot = new_boot("efi-stub")
    assert (boot.machine.regs.rip, boot.machine.regs.rdx) == (0x1001200, 0x1000)
    assert [call for call in calls(boot, "AllocatePages") if call.args[0] == 2] == []


def test_image_below_16_mib_moves_to_the_preferred_address(new_boot, patched_kernel):
    """An image loaded at 2 MiB is copied to pref_address, no further than init_size, and starts there."""
    kernel = patched_kernel((IMAGE_BASE, "Q", 2 * MIB))
    memory = given_map((CONVENTIONAL, MIB, 256 * MIB))
    boot = new_boot("efi-stub", kernel=kernel, **memory)
    init_size = struct.unpack_from("<I", kernel, INIT_SIZE)[0]
    assert (boot.machine.regs.rip, boot.machine.regs.rdx) == (16 * MIB + 0x200, 0)
    assert u32(boot.boot_params, 0x214) == 16 * MIB
    assert boot.physical.read(16 * MIB, len(kernel) - 0x1000) == kernel[0x1000:]
    written = [(start, end) for _, start, end in boot.machine.memory.writes if start == 16 * MIB]
    assert written == [(16 * MIB, 16 * MIB + init_size)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(BOOT_DATA, 16 * MIB, 17 * MIB), (CONVENTIONAL, 17 * MIB, 256 * MIB)], 18 * MIB),
        ([(BOOT_DATA, 16 * MIB, 18 * MIB), (CONVENTIONAL, 18 * MIB, 256 * MIB)], 18 * MIB),
        (  # 20 MiB is free and too small
            [
                (BOOT_DATA, 16 * MIB, 20 * MIB), (CONVENTIONAL, 20 * MIB, 22 * MIB), (BOOT_DATA, 22 * MIB, 25 * MIB),
                (CONVENTIONAL, 25 * MIB, 256 * MIB),
            ],
            26 * MIB,
        ),
        (  # the map's order does not matter
            [
                (BOOT_DATA, 16 * MIB, 20 * MIB), (CONVENTIONAL, 128 * MIB, 256 * MIB),
                (CONVENTIONAL, 20 * MIB, 64 * MIB),
            ],
            20 * MIB,
        ),
    ],
)  # fmt: skip
def test_busy_preferred_address(new_boot, patched_kernel, rows, expected):
    """If pref_address is taken, the kernel moves to the lowest free multiple of 2 MiB above it."""
    kernel = patched_kernel((IMAGE_BASE, "Q", 2 * MIB))
    boot = new_boot("efi-stub", kernel=kernel, **given_map((CONVENTIONAL, MIB, 16 * MIB), *rows))
    assert (boot.machine.regs.rip, boot.machine.regs.rdx) == (expected + 0x200, 0)
    boot.run("setup-arch")
    assert boot.kernel.image.start == expected


def test_image_that_declares_only_its_file_is_moved(new_boot, patched_kernel):
    """Newer kernels have SizeOfImage below init_size: such an image moves even from its preferred base."""
    kernel = patched_kernel((SIZE_OF_IMAGE, "I", 0x4000), (VIRTUAL_SIZE, "I", 0x1000))
    boot = new_boot("decompress", kernel=kernel)
    assert boot.machine.regs.rdx == 0
    assert u32(boot.boot_params, 0x214) == 18 * MIB  # 16 MiB is the image's own


def test_nothing_free_for_the_kernel(new_boot, patched_kernel):
    """No conventional memory of init_size above 16 MiB: EFI_NOT_FOUND stops the stub."""
    kernel = patched_kernel((IMAGE_BASE, "Q", 2 * MIB))
    with pytest.raises(GuestPanic, match="EFI stub: ERROR: failed, status 0x800000000000000e"):
        new_boot("efi-stub", kernel=kernel, **given_map((CONVENTIONAL, MIB, 20 * MIB)))


def test_special_purpose_memory_is_soft_reserved_and_left_alone(new_boot, patched_kernel):
    """Conventional memory with EFI_MEMORY_SP becomes soft reserved; neither firmware nor stub puts anything there."""
    special = MemoryDescriptor.of_range(CONVENTIONAL, 20 * MIB, 64 * MIB, WB | SP)
    high = MemoryDescriptor.of_range(CONVENTIONAL, 4 * GIB, 5 * GIB, WB | SP)
    memory = given_map((CONVENTIONAL, MIB, 16 * MIB), (BOOT_DATA, 16 * MIB, 20 * MIB), (CONVENTIONAL, 64 * MIB, GIB))
    memory["efi_map"] += (special, high)
    boot = new_boot("efi-stub", kernel=patched_kernel((IMAGE_BASE, "Q", 2 * MIB)), **memory)
    entries = [struct.unpack_from("<QQI", boot.boot_params, 0x2D0 + 20 * n) for n in range(boot.boot_params[0x1E8])]
    assert (20 * MIB, 44 * MIB, 0xEFFFFFFF) in entries
    assert (4 * GIB, GIB, 0xEFFFFFFF) in entries
    assert boot.machine.regs.rip == 64 * MIB + 0x200
    written = [(start, end) for _, start, end in boot.machine.memory.writes]
    assert not [w for w in written if (w[0] < 64 * MIB and w[1] > 20 * MIB) or w[1] > 4 * GIB]


def test_nosoftreserve(new_boot):
    """With efi=nosoftreserve special purpose memory is ordinary RAM."""
    memory = given_map((CONVENTIONAL, MIB, GIB))
    memory["efi_map"] += (MemoryDescriptor.of_range(CONVENTIONAL, 4 * GIB, 5 * GIB, WB | SP),)
    boot = new_boot("efi-stub", cmdline="quiet efi=debug,nosoftreserve", **memory)
    entries = [struct.unpack_from("<QQI", boot.boot_params, 0x2D0 + 20 * n) for n in range(boot.boot_params[0x1E8])]
    assert entries[-1] == (4 * GIB, GIB, 1)


def test_what_another_loader_left_in_the_header_is_dropped(new_boot, patched_kernel):
    """setup_data and initrd of the image's own header do not reach the kernel."""
    kernel = patched_kernel((SETUP_DATA, "Q", 0x1234_5678), (0x218, "I", 0x1000), (0x21C, "I", 0x2000))
    boot = new_boot("setup-arch", kernel=kernel)
    assert boot.boot_params[0x250:0x258] == boot.boot_params[0x218:0x220] == bytes(8)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ([(0x202, "I", 0x12345678)], FormatError, "setup_header.header"),
        (
            [(SETUP_SECTS, "B", 255), (SIZE_OF_IMAGE, "I", 0x4000), (VIRTUAL_SIZE, "I", 0x1000)],
            FormatError,
            "setup_sects",
        ),
        ([(INIT_SIZE, "I", 0xFFFFFFFF)], GuestPanic, "status 0x800000000000000e"),
    ],
)
def test_hostile_setup_header(new_boot, patched_kernel, fields, error, text):
    """A header that cannot be right is refused, or runs into what the firmware answers."""
    with pytest.raises(error, match=text):
        new_boot("efi-stub", kernel=patched_kernel(*fields))


@pytest.mark.parametrize("base", [0, 0x1000, 1 << 52, 1 << 63, (1 << 64) - 0x1000, 16 * MIB + 1])
def test_image_base_out_of_this_world(new_boot, patched_kernel, base):
    """An ImageBase where there is no memory, or inside a page, sends the image to the highest free place."""
    boot = new_boot("decompress", kernel=patched_kernel((IMAGE_BASE, "Q", base)))
    assert 0x7C00_0000 < boot.machine.regs.rsi < 2 * GIB
    assert boot.machine.regs.rip % (2 * MIB) == 0


def test_system_table_without_its_signature(new_boot):
    """A system table that is none stops the stub before it calls anything."""
    boot = new_boot("firmware")
    boot.physical.write(boot.machine.regs.rdx, b"IBI SYSX")
    with pytest.raises(GuestPanic, match="EFI stub: ERROR: bad system table signature"):
        boot.run("efi-stub")
    assert calls(boot, "HandleProtocol") == []


def test_system_table_in_unaccepted_memory(new_boot):
    """A system table pointer into unaccepted memory is a fault at that address, not an error of ours."""
    boot = new_boot("firmware")
    boot.machine.regs.rdx = 5 * GIB
    with pytest.raises(MemoryFault) as caught:
        boot.run("efi-stub")
    fault = caught.value
    assert (fault.gpa & ~0xFFF, fault.kind, fault.state, fault.stage) == (
        5 * GIB,
        "read",
        "FREE (not accepted)",
        "efi-stub",
    )


def test_protocols():
    """v9's stub keeps room for 8 more descriptors, mainline's for 32."""
    assert PROTOCOLS == {"v9": V9, "mainline": MAINLINE}
    assert (V9.efi_mmap_nr_slack_slots, MAINLINE.efi_mmap_nr_slack_slots) == (8, 32)
