"""The kernel's ELF file: entry, segments, end; the decompressor's refusals."""

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootstub.bzimage import parse_bzimage
from bootstub.payload import decompress
from bootstub.sample_kernel import build_vmlinux
from bootstub.vmlinux import Segment, load_segments
from guest.errors import BootError, FormatError
from tests.refusals import value_or_refusal

VMLINUX = build_vmlinux()
HEADERS = 64 + 5 * 56


def patched(at: int, form: str, value: int) -> bytes:
    data = bytearray(VMLINUX)
    struct.pack_into("<" + form, data, at, value)
    return bytes(data)


def refusal(data: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        load_segments(data)
    return caught.value


def test_sample():
    """The sample kernel has text, data, per-cpu data at address 0, and init with bss, all behind one another."""
    kernel = load_segments(VMLINUX)
    text, data, percpu, init = kernel.segments
    assert kernel.entry == text.p_paddr == 0x1000000
    assert text.p_vaddr == 0xFFFFFFFF81000000
    assert [s.p_flags for s in kernel.segments] == [5, 6, 6, 7]
    assert [s.p_align for s in kernel.segments] == [0x200000] * 4
    assert percpu.p_vaddr == 0
    assert data.p_paddr + data.p_memsz == percpu.p_paddr
    assert percpu.p_paddr + percpu.p_memsz == init.p_paddr
    assert init.p_filesz < init.p_memsz
    assert init.p_paddr + init.p_memsz == 0x1000000 + (6 << 20)
    assert VMLINUX[init.p_offset : init.p_offset + 16] == b"init          0\n"


def test_sample_moves_down_in_place():
    """No segment of the sample kernel is moved onto one that still waits in the file."""
    segments = load_segments(VMLINUX).segments
    for moved, waiting in pairwise(segments):
        assert moved.p_paddr - 0x1000000 + moved.p_filesz <= waiting.p_offset
    assert all(s.p_offset % s.p_align == s.p_vaddr % s.p_align for s in segments)


def test_sample_relocations():
    """Behind the sample kernel's ELF file lie the three lists, and they point at pointers into the kernel."""
    kernel = load_segments(VMLINUX)
    table = struct.unpack(f"<{(len(VMLINUX) - kernel.elf_end) // 4}i", VMLINUX[kernel.elf_end :])
    assert [i for i, entry in enumerate(table) if entry == 0] == [0, 17, 34]
    assert len(table) == 51
    text, data, *_ = kernel.segments

    def value(address: int, form: str) -> int:
        segment = next(s for s in (text, data) if 0 <= address - s.p_vaddr < s.p_filesz)
        return struct.unpack_from("<" + form, VMLINUX, segment.p_offset + address - segment.p_vaddr)[0]

    addresses = [entry & (1 << 64) - 1 for entry in table]
    pages = range(0, 0x10000, 0x1000)
    assert [value(a, "Q") for a in addresses[1:17]] == [text.p_vaddr + page for page in pages]
    assert [value(a, "I") for a in addresses[18:34]] == [page - text.p_vaddr & 0xFFFFFFFF for page in pages]
    assert [value(a, "I") for a in addresses[35:51]] == [data.p_vaddr + page & 0xFFFFFFFF for page in pages]


def test_too_small():
    """A sample kernel smaller than its segments is a mistake of the caller."""
    with pytest.raises(ValueError, match="kernel_total_size"):
        build_vmlinux(kernel_total_size=1 << 20)


def test_debian(exact_debian_kernel):
    """The segments of Debian's kernel are those that readelf prints."""
    data = exact_debian_kernel.read_bytes()
    vmlinux = decompress(parse_bzimage(data).payload(data))
    kernel = load_segments(vmlinux)
    high = 0xFFFFFFFF00000000
    assert kernel.entry == 0x1000B53
    assert kernel.segments == (
        Segment(5, 0x200000, high + 0x81000000, 0x1000000, 0x1AA7960, 0x1AA7960, 0x200000),
        Segment(6, 0x1E00000, high + 0x82C00000, 0x2C00000, 0x6DD000, 0x6DD000, 0x200000),
        Segment(6, 0x2600000, 0, 0x32DD000, 0x39000, 0x39000, 0x200000),
        Segment(7, 0x2716000, high + 0x83316000, 0x3316000, 0xEEA000, 0xEEA000, 0x200000),
    )
    assert (kernel.elf_end, len(vmlinux) - kernel.elf_end) == (56626536, 948868)


@pytest.mark.parametrize("data", [b"", b"\x7fELF", VMLINUX[:63], b"\x7fELG" + VMLINUX[4:]])
def test_not_elf(data):
    """What is no ELF file is refused with the kernel's words."""
    assert refusal(data).what.startswith("Kernel is not a valid ELF file")


@pytest.mark.parametrize("align", [1, 0x1000, 0x300000])
def test_alignment(align):
    """A PT_LOAD that is not aligned to 2 MiB is refused with the kernel's words."""
    error = refusal(patched(64 + 48, "Q", align))
    assert error.what.startswith("Alignment of LOAD segment isn't multiple of 2MB")
    assert (error.at, error.found) == (64, f"{align:#x}")


@pytest.mark.parametrize(
    ("what", "at", "form", "value"),
    [
        ("e_ident", 4, "B", 1),
        ("e_ident", 5, "B", 2),
        ("e_ident", 6, "B", 0),
        ("e_machine", 18, "H", 3),
        ("e_machine", 18, "H", 0xFFFF),
        ("e_phentsize", 54, "H", 32),
        ("program headers", 32, "Q", len(VMLINUX)),
        ("program headers", 32, "Q", (1 << 64) - 1),
        ("section headers", 60, "H", 1 << 15),
        ("e_phnum", 56, "H", 0),
        ("PT_LOAD segment of program header 0", 64 + 8, "Q", len(VMLINUX)),
        ("PT_LOAD segment of program header 0", 64 + 8, "Q", (1 << 64) - 1),
        ("PT_LOAD segment of program header 3", 64 + 3 * 56 + 32, "Q", 1 << 40),
        ("PT_LOAD segment of program header 1: p_memsz", 64 + 56 + 40, "Q", 0xFFFF),
        ("PT_LOAD segment of program header 1: p_memsz", 64 + 56 + 24, "Q", (1 << 64) - 1),
    ],
)
def test_falsified_field(what, at, form, value):
    """A header that points outside the file, or is not of this machine, is refused by name."""
    data = bytearray(patched(at, form, value))
    if what == "section headers":
        struct.pack_into("<QH", data, 40, len(VMLINUX) - 1, 0)
        struct.pack_into("<H", data, 58, 64)
    assert refusal(bytes(data)).what == what


@given(st.lists(st.tuples(st.integers(0, HEADERS - 1), st.integers(0, 255)), max_size=8))
def test_hostile_headers(changes):
    """Headers with any bytes changed give segments that lie in the file, or a BootError."""
    data = bytearray(VMLINUX)
    for at, value in changes:
        data[at] = value
    try:
        kernel = load_segments(bytes(data))
    except BootError:
        return
    assert all(s.p_offset + s.p_filesz <= len(data) for s in kernel.segments)
    assert kernel.elf_end <= len(data)


@given(st.binary(max_size=HEADERS))
def test_hostile_bytes(tail):
    """Any bytes behind a valid e_ident give a value or a BootError."""
    with value_or_refusal():
        load_segments(VMLINUX[:7] + tail)
