"""The setup header of a bzImage: what is read, and what is refused."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootstub.bzimage import BzImage, parse_bzimage, read_bzimage
from bootstub.pack_payload import PACKERS
from bootstub.sample_kernel import KERNEL_VERSION, build_bzimage, build_vmlinux, sample_bzimage
from bootstub.setup_header import LoadFlags, XLoadFlags
from guest.errors import BootError, FormatError
from tools.pipeline import Boot, BootConfig

HEADER_END = 0x26C


def patched(at: int, value: bytes) -> bytes:
    data = bytearray(sample_bzimage())
    data[at : at + len(value)] = value
    return bytes(data)


def refusal(data: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        parse_bzimage(data)
    return caught.value


def test_sample():
    """The header of the sample kernel is read as it was written."""
    image = parse_bzimage(sample_bzimage())
    assert (image.version, image.kernel_version) == (0x20F, KERNEL_VERSION)
    assert (image.setup_sects, image.protected_mode_offset) == (7, 0x1000)
    assert image.protected_mode_offset + image.protected_mode_size == len(sample_bzimage())
    assert image.loadflags == LoadFlags.LOADED_HIGH
    assert image.xloadflags == XLoadFlags(0x7F)
    assert image.relocatable_kernel
    assert image.payload_offset == 0x1000 + 0x2C0
    assert image.payload(sample_bzimage()).startswith(bytes.fromhex("28b52ffd"))
    assert len(image.payload(sample_bzimage())) == image.payload_length


def test_debian(exact_debian_kernel):
    """The header of Debian's kernel is read as other tools read it."""
    image = parse_bzimage(exact_debian_kernel.read_bytes())
    assert image == BzImage(
        setup_sects=39,
        version=0x20F,
        kernel_version="6.12.117+deb12-cloud-amd64 (debian-kernel@lists.debian.org) "
        "#1 SMP PREEMPT_DYNAMIC Debian 6.12.117-1~deb12u1 (2026-11-14)",
        loadflags=LoadFlags(1),
        xloadflags=XLoadFlags(0x7F),
        protected_mode_offset=20480,
        protected_mode_size=727072 * 16,
        code32_start=0x100000,
        payload_offset=21196,
        payload_length=11409810,
        pref_address=0x1000000,
        init_size=0x37DC000,
        kernel_alignment=0x200000,
        min_alignment=21,
        relocatable_kernel=True,
        cmdline_size=2047,
        initrd_addr_max=0x7FFFFFFF,
        handover_offset=11555120,
    )


CODE_SIZE = parse_bzimage(sample_bzimage()).protected_mode_size
FALSIFIED = [
    # field, offset, format, values; offsets from boot.rst
    ("setup_sects", 0x1F1, "B", [16, 255]),
    ("syssize", 0x1F4, "I", [0, CODE_SIZE // 16 + 1, 0xFFFFFFFF]),
    ("boot_flag", 0x1FE, "H", [0, 0x55AA]),
    ("header", 0x202, "4s", [b"HdrT", b"\0\0\0\0"]),
    ("version", 0x206, "H", [0, 0x0200, 0x0201, 0x0209]),
    ("kernel_version", 0x20E, "H", [7 * 512, 0xFFFF]),
    ("loadflags", 0x211, "B", [0, 0xFE]),
    ("kernel_alignment", 0x230, "I", [0, 0x800, 0x300000, 0xFFFFFFFF]),
    ("min_alignment", 0x235, "B", [0, 11, 22, 255]),
    ("xloadflags", 0x236, "H", [0, 0xFFFE]),
    ("payload_offset", 0x248, "I", [CODE_SIZE, 0xFFFFFFFF]),
    ("payload_length", 0x24C, "I", [0, CODE_SIZE, 0xFFFFFFFF]),
    ("pref_address", 0x258, "Q", [0x1000001, 0x1100000, 1 << 52, (1 << 64) - 0x200000]),
    ("init_size", 0x260, "I", [0, CODE_SIZE - 1]),
    ("handover_offset", 0x264, "I", [CODE_SIZE, 0xFFFFFFFF]),
]


@pytest.mark.parametrize(
    ("field", "at", "value"),
    [(field, at, struct.pack("<" + form, value)) for field, at, form, values in FALSIFIED for value in values],
)
def test_falsified_field(field, at, value):
    """A field that cannot be right is refused, by its name, at its offset, with its source."""
    error = refusal(patched(at, value))
    assert (error.what, error.at) == (f"setup_header.{field}", at)
    assert error.source.startswith("Documentation/arch/x86/boot.rst")


def test_message():
    """A refusal says what, where, found, expected and by which source in one line."""
    assert str(refusal(patched(0x202, b"ABCD"))) == (
        "setup_header.header at 0x202: found b'ABCD', expected b'HdrS' [Documentation/arch/x86/boot.rst]"
    )


def test_setup_sects_zero():
    """A setup_sects of 0 means 4, as boot.rst says."""
    image = parse_bzimage(patched(0x1F1, b"\0") + bytes(512))
    assert (image.setup_sects, image.protected_mode_offset) == (4, 5 * 512)


def test_no_kernel_version():
    """A kernel_version of 0 points nowhere."""
    assert parse_bzimage(patched(0x20E, b"\0\0")).kernel_version is None


@pytest.mark.parametrize("text", [b"6.3\x1b[2J\0", b"\xff\0", b"x" * 300], ids=["escape", "8 bit", "endless"])
def test_kernel_version_text(text):
    """A kernel version that a terminal should not see is refused."""
    assert refusal(patched(0x300, text)).what == "setup_header.kernel_version"


def test_old_protocol():
    """A kernel from before the EFI stub is refused with both versions in words, and so is one from before 2.02."""
    error = refusal(build_bzimage(b"kernel", version=0x207))
    assert error.found == "boot protocol 2.07"
    assert error.expected == "2.10 or later: an older kernel has no EFI stub"
    with pytest.raises(FormatError, match=r"found boot protocol 2\.01, expected 2\.02 or later"):
        read_bzimage(patched(0x206, b"\x01\x02"))


# The fields that BzImage has, with the protocol that brought each (boot.rst, table of the header), what the sample's
# header says, and what holds without it.
SAMPLE = read_bzimage(sample_bzimage())
FIELDS = [
    ("initrd_addr_max", 0x203, 0x7FFFFFFF, 0x37FFFFFF),
    ("protected_mode_size", 0x204, SAMPLE.protected_mode_size, SAMPLE.protected_mode_size + 512),
    ("kernel_alignment", 0x205, 0x200000, 0),
    ("relocatable_kernel", 0x205, True, False),
    ("cmdline_size", 0x206, 2047, 255),
    ("payload_length", 0x208, SAMPLE.payload_length, 0),
    ("min_alignment", 0x20A, 21, 0),
    ("pref_address", 0x20A, 0x1000000, 0x100000),
    ("init_size", 0x20A, SAMPLE.init_size, 0),
    ("handover_offset", 0x20B, SAMPLE.handover_offset, 0),
    ("xloadflags", 0x20C, 0x7F, 0),
]


@pytest.mark.parametrize("version", range(0x202, 0x210))
def test_every_protocol(version):
    """Each protocol from 2.02 to 2.15 is read: what came later has its default, whatever bytes stand there."""
    file = build_bzimage(build_vmlinux(), version=version) + bytes(512)
    image = read_bzimage(file)
    assert image.version == version
    assert image.kernel_version == KERNEL_VERSION
    for name, since, there, default in FIELDS:
        assert getattr(image, name) == (there if version >= since else default), name
    since = {"protected_mode_size": "syssize"}
    assert image.missing & {since.get(name, name) for name, *_ in FIELDS} == {
        since.get(name, name) for name, begin, *_ in FIELDS if version < begin
    }


@pytest.mark.parametrize("version", range(0x20A, 0x210))
def test_every_protocol_with_a_stub_boots(version):
    """A kernel of each protocol since the EFI stub, 2.10, boots to its entry point and is the same there."""
    boot = Boot(BootConfig(build_bzimage(build_vmlinux(), version=version)))
    boot.run("decompress")
    assert boot.machine.regs.rip == 0x1000000
    assert boot.physical.read(0x1000000, 7) == b"\xf4\xeb\xfdt   "
    header = boot.boot_params[0x1F1:0x290]
    assert struct.unpack_from("<H", header, 0x206 - 0x1F1) == (version,)
    if version < 0x20B:  # where the header of 2.10 ends, boot_params stays zero
        assert header[0x264 - 0x1F1 :] == bytes(0x290 - 0x264)


@pytest.mark.parametrize("size", [0, 1, 0x1F1, 0x1FF, HEADER_END - 1, HEADER_END, 0x1000, 0x1001, -1])
def test_truncated(size):
    """A file cut anywhere is refused."""
    refusal(sample_bzimage()[:size])


@pytest.mark.parametrize("compression", PACKERS)
def test_init_size(compression):
    """The sample kernel asks for room to decompress in place and for itself."""
    vmlinux = build_vmlinux(kernel_total_size=32 << 20)
    image = parse_bzimage(build_bzimage(vmlinux, compression=compression, kernel_total_size=32 << 20))
    assert image.init_size == 32 << 20
    image = parse_bzimage(build_bzimage(vmlinux, compression=compression))
    assert len(vmlinux) + image.protected_mode_size - image.payload_length < image.init_size < 16 << 20


@given(st.lists(st.tuples(st.integers(0x1F1, HEADER_END - 1), st.integers(0, 255)), max_size=8))
def test_hostile_header(changes):
    """A header with any bytes changed gives a value whose payload is in the file, or a BootError."""
    data = bytearray(sample_bzimage())
    for at, value in changes:
        data[at] = value
    try:
        image = parse_bzimage(bytes(data))
    except BootError:
        return
    assert len(image.payload(bytes(data))) == image.payload_length
