"""The decompressor: where the kernel goes, what is accepted before, what is refused."""

from __future__ import annotations

import struct

import pytest

from bootstub.sample_kernel import build_bzimage, build_vmlinux
from firmware.memory_descriptor import MemoryDescriptor
from guest.errors import FormatError, GuestPanic, MemoryFault
from tdx.events import TdCall
from tests.bootstub.conftest import printed

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BOOT_DATA, CONVENTIONAL, UNACCEPTED = 4, 7, 15
IMAGE_BASE, KERNEL_ALIGNMENT, PREF_ADDRESS = 0x70, 0x230, 0x258
E_ENTRY, P_OFFSET, P_PADDR = 24, 64 + 8, 64 + 24  # the latter in the first program header
INIT_SIZE = 0x68B000
NEEDED = 8 * MIB  # a file of 6.1 MiB, rounded up to 2 MiB
X = 512 * MIB


def changed_vmlinux(offset: int, value: int) -> bytes:
    """A bzImage whose ELF file has another 64-bit field."""
    vmlinux = bytearray(build_vmlinux())
    struct.pack_into("<Q", vmlinux, offset, value)
    return build_bzimage(bytes(vmlinux), compression="gzip")


@pytest.fixture
def unaccepted_boot(new_boot):
    """A guest where KASLR has nothing but unaccepted memory to choose from: its command line says that what is
    accepted from 16 MiB on is no RAM. It ran up to the decompressor."""
    rows = [(CONVENTIONAL, 0x1000, 0xA0000), (CONVENTIONAL, MIB, X), (UNACCEPTED, X, GIB)]
    efi_map = tuple(MemoryDescriptor.of_range(*row, 0xF) for row in rows)
    return new_boot("efi-stub", efi_map=efi_map, cmdline="memmap=496M$16M")


def test_kernel_at_its_place(new_boot):
    """The segments of the sample kernel lie where the ELF file wants them, and RIP is its entry point."""
    boot = new_boot("decompress")
    assert boot.machine.regs.rip == 0x1000000
    assert boot.physical.read(0x1000000, 3) == b"\xf4\xeb\xfd"  # hlt, and back to it
    for offset, name in ((0x1010, "text"), (0x201010, "data"), (0x211010, "percpu"), (0x221010, "init")):
        assert boot.physical.read(0x1000000 + offset, 16) == f"{name:7}       1\n".encode()
    assert printed(boot, "decompress") == [
        "KASLR disabled: 'nokaslr' on cmdline.",
        "Decompressing Linux... Accepting memory... Parsing ELF... No relocation needed... done.",
        "Booting the kernel.",
    ]


def test_guest_without_unaccepted_memory(new_boot):
    """Without a bitmap nothing is said about accepting."""
    boot = new_boot("decompress", memory=GIB)
    assert printed(boot, "decompress")[1] == "Decompressing Linux... Parsing ELF... No relocation needed... done."


def test_output_is_accepted_before_it_is_written(unaccepted_boot):
    """Output in unaccepted memory: exactly its units are accepted, before the first write, and their bits cleared."""
    boot = unaccepted_boot
    bitmap = struct.unpack_from("<Q", boot.boot_params, 0x78)[0]
    assert boot.physical.read(bitmap + 32, 33) == b"\xff" * 32 + b"\0"
    boot.run("decompress")
    output = boot.machine.regs.rip
    assert X <= output <= GIB - NEEDED
    assert list(boot.sept.mapped(X, GIB)) == [(output, output + NEEDED)]
    bits = int.from_bytes(boot.physical.read(bitmap + 32, 33), "little")
    assert bits == (1 << 256) - 1 & ~(0xF << (output - X) // (2 * MIB))
    accepts = [r for r in boot.trace.records if r.stage == "decompress" and isinstance(r.event, TdCall)]
    writes = [number for number, start, _ in boot.machine.memory.writes if output <= start < output + NEEDED]
    assert max(record.number for record in accepts) < min(writes)
    assert boot.physical.read(output + 0x1010, 16) == b"text          1\n"
    boot.run()
    assert boot.kernel.image == (output, output + INIT_SIZE)


def test_without_the_bitmap_the_write_is_fatal(unaccepted_boot):
    """If boot_params loses the bitmap, the decompressor writes to unaccepted memory and dies of it."""
    boot = unaccepted_boot
    boot.physical.write(boot.machine.regs.rsi + 0x78, bytes(8))
    with pytest.raises(MemoryFault) as caught:
        boot.run("decompress")
    fault = caught.value
    assert (fault.stage, fault.kind, X <= fault.gpa < GIB) == ("decompress", "write", True)


def test_a_refused_accept_stops_the_decompressor(unaccepted_boot):
    """A page that is accepted already makes the whole accept fail, in the kernel's words."""
    boot = unaccepted_boot
    boot.sept.page_aug(X, GIB, 0)
    boot.sept.page_accept(X, GIB, 0)
    with pytest.raises(GuestPanic, match=r"Accepting memory failed: 0x[0-9a-f]{8}-0x[0-9a-f]{8}$"):
        boot.run("decompress")


@pytest.mark.parametrize(
    ("alignment", "output"),
    [(2 * MIB, 22 * MIB), (4 * MIB, 24 * MIB), (16 * MIB, 32 * MIB)],
)
def test_output_is_aligned(new_boot, patched_kernel, alignment, output):
    """The output is the start of the image's memory, rounded up to kernel_alignment; here the image is at 21 MiB."""
    kernel = patched_kernel((IMAGE_BASE, "Q", 21 * MIB), (KERNEL_ALIGNMENT, "I", alignment))
    boot = new_boot("setup-arch", kernel=kernel)
    assert (boot.machine.regs.rip, boot.kernel.image.start) == (output, output)


@pytest.mark.parametrize("alignment", [0, 1, 4 * KIB, MIB, 3 * MIB, 0x80000001])
def test_alignment_that_is_none(new_boot, alignment):
    """A kernel_alignment below 2 MiB, or no power of two, is refused with the field's address."""
    boot = new_boot("efi-stub")
    boot.physical.write(boot.machine.regs.rsi + KERNEL_ALIGNMENT, alignment.to_bytes(4, "little"))
    with pytest.raises(FormatError, match=r"setup_header\.kernel_alignment") as caught:
        boot.run("decompress")
    assert caught.value.at == boot.machine.regs.rsi + 0x230


def test_kernel_larger_than_its_address_space(new_boot):
    """A kernel that is too large for its mapping is refused before anything is accepted or placed."""
    size = GIB - 14 * MIB
    kernel = build_bzimage(build_vmlinux(kernel_total_size=size), kernel_total_size=NEEDED)
    boot = new_boot("efi-stub", kernel=kernel)
    with pytest.raises(FormatError, match="kernel size: found 0x3f200000 bytes, expected at most 0x3f000000"):
        boot.run("decompress")
    assert printed(boot, "decompress") == []


@pytest.mark.parametrize(("offset", "length"), [(0xFFFF_FFFF, 1), (0, 0xFFFF_FFFF), (0x2C0, INIT_SIZE - 0x2BF)])
def test_payload_that_leaves_the_image(new_boot, offset, length):
    """A payload that does not end inside init_size is refused before it is read."""
    boot = new_boot("efi-stub")
    boot.physical.write(boot.machine.regs.rsi + 0x248, struct.pack("<II", offset, length))
    with pytest.raises(FormatError, match=r"setup_header\.payload_length") as caught:
        boot.run("decompress")
    assert caught.value.at == boot.machine.regs.rsi + 0x24C


@pytest.mark.parametrize("size", [0, 3, INIT_SIZE - 0x2C0])
def test_payload_of_a_wrong_length(new_boot, size):
    """A payload_length that ends somewhere else does not end with a believable size."""
    boot = new_boot("efi-stub")
    boot.physical.write(boot.machine.regs.rsi + 0x24C, size.to_bytes(4, "little"))
    with pytest.raises(FormatError, match="payload output_len"):
        boot.run("decompress")


def test_payload_where_there_is_no_memory(new_boot):
    """RIP into unaccepted memory: the payload behind it cannot be read."""
    boot = new_boot("efi-stub")
    boot.machine.regs.rip = 5 * GIB
    with pytest.raises(MemoryFault):
        boot.run("decompress")


def test_damaged_payload(new_boot):
    """One flipped byte in the payload is found by the decompressor."""
    boot = new_boot("efi-stub")
    boot.physical.write(0x1001000 + 0x2C0 + 40, b"\xff\x00\xff\x00")
    with pytest.raises(FormatError, match="payload"):
        boot.run("decompress")
    assert "Booting the kernel." not in printed(boot, "decompress")


@pytest.mark.parametrize(
    "paddr",
    [0, 0x1000000 - 2 * MIB, 0x1000000 + NEEDED, 0x1000000 + NEEDED - 0xFFFF, 1 << 46, (1 << 52) - MIB],
)
def test_segment_outside_the_memory_of_the_kernel(new_boot, paddr):
    """A PT_LOAD segment below 16 MiB or beyond the needed size is refused, and nothing is written there."""
    boot = new_boot("efi-stub", kernel=changed_vmlinux(P_PADDR, paddr))
    with pytest.raises(FormatError, match=r"PT_LOAD|kernel size"):
        boot.run("decompress")
    written = [(start, end) for n, start, end in boot.machine.memory.writes if start >= 0x1000000 + NEEDED]
    assert not [w for w in written if w[0] <= paddr < w[1]]


def test_segment_that_just_fits(new_boot):
    """The last byte of a segment may be the last byte of the needed memory."""
    boot = new_boot("decompress", kernel=changed_vmlinux(P_PADDR, 0x1000000 + NEEDED - 0x10000))
    assert boot.physical.read(0x1000000 + NEEDED - 0x10000 + 0x1010, 16) == b"text          1\n"


@pytest.mark.parametrize("entry", [0, 0xFF_FFFF, 0x1000000 + NEEDED, 1 << 51, (1 << 64) - 1])
def test_entry_point_outside_the_kernel(new_boot, entry):
    """An entry point that is not in the kernel's memory is refused."""
    with pytest.raises(FormatError, match="e_entry"):
        new_boot("decompress", kernel=changed_vmlinux(E_ENTRY, entry))


def test_entry_point_inside_the_kernel(new_boot):
    """An entry point further on is where RIP goes."""
    assert new_boot("decompress", kernel=changed_vmlinux(E_ENTRY, 0x1000200)).machine.regs.rip == 0x1000200
