"""Payloads of a bzImage: every compression, and every way in which one can lie."""

import bz2
import gzip
import lzma
import random
import struct
import sys
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bootstub.bzimage import parse_bzimage
from bootstub.lzo import BLOCK_SIZE
from bootstub.pack_payload import PACKERS
from bootstub.payload import OUTPUT_LIMIT, decompress, detect, output_len
from bootstub.sample_kernel import build_bzimage, build_vmlinux
from guest.errors import BootError, FormatError

KERNEL = b"a kernel " * 1000
COMPRESSIONS = list(PACKERS)


def packed(compression: str, kernel: bytes = KERNEL) -> bytes:
    image = build_bzimage(kernel, compression=compression)
    return parse_bzimage(image).payload(image)


def refusal(payload: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        decompress(payload, at=0x1000)
    return caught.value


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_round_trip(compression):
    """The sample kernel comes out of each compression as it went in."""
    vmlinux = build_vmlinux()
    payload = packed(compression, vmlinux)
    assert detect(payload) == compression.removesuffix("-without-bcj")
    assert output_len(payload) == len(vmlinux)
    assert decompress(payload) == vmlinux


def test_other_packers():
    """Streams that other programs make are read: gzip with a file name, lzma that knows its size."""
    size = struct.pack("<I", len(KERNEL))
    assert decompress(gzip.compress(KERNEL)) == KERNEL
    assert decompress(bz2.compress(KERNEL) + size) == KERNEL
    assert decompress(lzma.compress(KERNEL) + size) == KERNEL
    with_size = bytearray(lzma.compress(KERNEL, lzma.FORMAT_ALONE))
    with_size[5:13] = struct.pack("<Q", len(KERNEL))
    assert decompress(bytes(with_size) + size) == KERNEL


def test_debian(exact_debian_kernel):
    """Debian's kernel comes out in the size that its payload ends with, and is an ELF file."""
    data = exact_debian_kernel.read_bytes()
    payload = parse_bzimage(data).payload(data)
    assert detect(payload) == "zstd"
    vmlinux = decompress(payload)
    assert len(vmlinux) == 57575404
    assert vmlinux.startswith(b"\x7fELF")


@pytest.mark.parametrize(("compression", "module"), [("lz4", "lz4"), ("lzo", "lzallright")])
def test_an_extra_is_named(monkeypatch, compression, module):
    """Without its module, a kernel that needs it is refused with the extra's name."""
    payload = packed(compression)
    monkeypatch.setitem(sys.modules, module, None)
    error = refusal(payload)
    expected = f"{module}: pip install 'unaccepted[{compression}]'"
    assert (error.what, error.expected) == ("payload compression", expected)


def test_lz4_of_several_frames_and_blocks():
    """Blocks follow each other up to the size at the end, across the magic of a further frame."""
    kernel = bytes(range(251)) * 80_000  # three blocks
    frame = packed("lz4", kernel)[:-4]
    assert decompress(frame + struct.pack("<I", len(kernel))) == kernel
    assert decompress(frame + frame + struct.pack("<I", 2 * len(kernel))) == kernel + kernel


@pytest.mark.parametrize("size", [0, 1 << 31, 0xFFFF_FFFF])
def test_lz4_block_that_lies(size):
    """A block of no bytes, or of more than there are, is refused."""
    payload = packed("lz4")
    error = refusal(payload[:4] + struct.pack("<I", size) + payload[8:])
    assert (error.what, "a block of" in str(error.found)) == ("payload", True)


CODE = b"\xe8\x10\x20\x00\x00\x90" * 5000
"""Calls, which the BCJ filter turns into absolute ones."""


def test_bcj_filter():
    """The filter for x86 code changes what is packed, and nothing of what comes out."""
    plain, filtered = packed("xz-without-bcj", CODE), packed("xz", CODE)
    x86_filter = bytes([lzma.FILTER_X86, 0])  # in the block's header: the filter's number, no properties
    assert (x86_filter in plain[:32], x86_filter in filtered[:32]) == (False, True)
    assert decompress(filtered) == decompress(plain) == CODE


LZOP = bytes.fromhex(
    "894c5a4f000d0a1a0a104020a0094003090300000d000000006b083ae500000000002ac1030800002328000000405e583d85"
    "1a61206b65726e656c202000000000000000e620002000000000000000e620002000000000000000e6200020000000000000"
    "00e620002000000001200011000000000000"
)
"""What lzop 1.04, -9, makes of KERNEL on its standard input."""


def test_lzop():
    """What the program that packs kernels makes is read, and its checksum agrees."""
    size = struct.pack("<I", len(KERNEL))
    assert decompress(LZOP + size) == KERNEL
    damaged = bytearray(LZOP)
    damaged[51] ^= 0x20  # the "a" of "a kernel"
    assert "another checksum" in str(refusal(bytes(damaged) + size).found)


def lzo(*blocks: bytes, version: int = 0x1040, flags: int = 0, name: bytes = b"") -> bytes:
    """An lzo payload by hand, up to its size: the header in one of its shapes, and blocks as they are given."""
    recent = version >= 0x940
    header = struct.pack(">HHHB", version, 0x20A0, 0x940, 1) + (b"\5" if recent else b"")
    header += struct.pack(">I", flags) + (bytes(4) if flags & 0x800 else b"")
    header += bytes(12 if recent else 8) + bytes([len(name)]) + name + b"sum!"
    return b"\x89LZO\x00\r\n\x1a\n" + header + b"".join(blocks) + bytes(4)


def stored(data: bytes, checksum: int = 0) -> bytes:
    return struct.pack(">III", len(data), len(data), checksum) + data


@pytest.mark.parametrize("shape", [{}, {"version": 0x0930}, {"flags": 0x800}, {"name": b"vmlinux.bin" * 20}])
def test_lzo_header(shape):
    """The header has more fields in newer versions, with a filter, and with a name; blocks may be stored."""
    payload = lzo(stored(KERNEL), stored(b"more"), **shape) + struct.pack("<I", len(KERNEL) + 4)
    assert decompress(payload) == KERNEL + b"more"


def test_lzo_of_several_blocks():
    """Blocks follow each other, packed or stored as they are smaller."""
    kernel = bytes(2 * BLOCK_SIZE) + random.Random(1).randbytes(BLOCK_SIZE + 1)
    payload = packed("lzo", kernel)
    assert BLOCK_SIZE < len(payload) < 2 * BLOCK_SIZE
    assert decompress(payload) == kernel


def test_lzo_checksum():
    """A block whose checksum the header promises is refused if it is another's; without the promise it is not read."""
    size = struct.pack("<I", len(KERNEL))
    assert decompress(lzo(stored(KERNEL, zlib.adler32(KERNEL)), flags=1) + size) == KERNEL
    assert "another checksum" in str(refusal(lzo(stored(KERNEL, 7), flags=1) + size).found)
    assert decompress(lzo(stored(KERNEL, 7)) + size) == KERNEL


LZO_BLOCKS = {
    "too large": struct.pack(">III", BLOCK_SIZE + 1, 4, 0) + b"abcd",
    "no data": struct.pack(">III", 100, 0, 0),
    "grows when packed": struct.pack(">III", 3, 4, 0) + b"abcd",
    "cut short": struct.pack(">III", 100, 50, 0) + b"abcd",
    "cut in its header": b"\0\0\1",
    "not packed": struct.pack(">III", 100, 50, 0) + bytes(50),
    "other size": struct.pack(">III", 100, 23, 0) + packed("lzo", bytes(99))[-31:-8],
}


@pytest.mark.parametrize("block", LZO_BLOCKS.values(), ids=LZO_BLOCKS)
def test_lzo_block_that_lies(block):
    """A block that the kernel's own reader refuses is refused."""
    error = refusal(lzo()[:-4] + block + struct.pack("<I", 100))
    assert (error.what, error.expected) == ("payload", "a lzo stream")


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_trailing_data(compression):
    """What lies between the stream and the size is not read; lz4 has no end of stream, and takes it for a block."""
    payload = packed(compression)
    end = payload if compression == "gzip" else payload[:-4]
    padded = end + b"xyz" + payload[-4:]
    if compression == "lz4":
        assert refusal(padded).found == f"{len(KERNEL)} bytes in a stream that is cut short"
    else:
        assert decompress(padded) == KERNEL


@pytest.mark.parametrize("compression", [name for name in COMPRESSIONS if name not in ("gzip", "lz4")])
def test_only_the_first_stream_counts(compression):
    """A second frame or stream is not read, as the kernel does not read it: the size must be that of the first."""
    stream = packed(compression)[:-4]
    assert decompress(stream + stream + struct.pack("<I", len(KERNEL))) == KERNEL
    error = refusal(stream + stream + struct.pack("<I", 2 * len(KERNEL)))
    assert (error.found, error.expected) == (f"{len(KERNEL)} bytes", f"{2 * len(KERNEL)} bytes")


@pytest.mark.parametrize("start", [b"", b"\x1f", b"\x7fELF\x02\x01", b"PK\x03\x04", bytes(16)])
def test_unknown_magic(start):
    """An unknown magic is refused with the bytes found."""
    error = refusal(start)
    assert (error.what, error.at, error.found) == ("payload magic", 0x1000, start[:6].hex() or "nothing")


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_cut_short(compression, keep):
    """A stream that is cut short is refused, though the size behind it is right."""
    payload = packed(compression)
    size = payload[-4:]
    stream = payload if compression == "gzip" else payload[:-4]
    error = refusal(stream[: max(int(len(stream) * keep), 8)] + size)
    assert error.what in ("payload", "payload output")


@pytest.mark.parametrize("compression", [name for name in COMPRESSIONS if name != "gzip"])
@pytest.mark.parametrize("difference", [-1, 1, 1000])
def test_size_that_lies(compression, difference):
    """Output that is longer or shorter than the payload's last four bytes say is refused."""
    error = refusal(packed(compression)[:-4] + struct.pack("<I", len(KERNEL) + difference))
    assert (error.what, error.expected) == ("payload output", f"{len(KERNEL) + difference} bytes")
    assert error.found == (f"more than {len(KERNEL) - 1} bytes" if difference < 0 else f"{len(KERNEL)} bytes")


@pytest.mark.parametrize("size", [0, OUTPUT_LIMIT + 1, 0xFFFFFFFF])
def test_size_out_of_bounds(size):
    """A size of nothing, or above any kernel's, is refused before decompression."""
    payload = packed("zstd")[:-4] + struct.pack("<I", size)
    error = refusal(payload)
    assert (error.what, error.at) == ("payload output_len", 0x1000 + len(payload) - 4)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_bomb(compression):
    """A stream that would grow without end is stopped one byte above the size that it admits to."""
    bomb = packed(compression, bytes(64 << 20))[:-4] + struct.pack("<I", 1 << 20)
    tracemalloc.start()
    error = refusal(bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error.found == f"more than {1 << 20} bytes"
    assert peak < 40 << 20  # of which a dictionary takes up to 32 MiB


def test_lzma_dictionary():
    """A stream that asks for a dictionary of 4 GiB is refused, not served."""
    payload = bytearray(packed("lzma"))
    payload[1:5] = b"\0\0\0\xff"
    assert "limit" in str(refusal(bytes(payload)).found)


@settings(max_examples=60)
@given(
    st.sampled_from(COMPRESSIONS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_hostile_payload(compression, changes):
    """A payload with any bytes changed gives a value of the size it ends with, or a BootError."""
    payload = bytearray(packed(compression))
    for where, value in changes:
        payload[int(where * (len(payload) - 4))] = value
    try:
        kernel = decompress(bytes(payload))
    except BootError:
        return
    assert len(kernel) == output_len(bytes(payload))


def test_gzip_checksum():
    """Damage that only a checksum shows is refused."""
    stored = bytearray(zlib.compress(KERNEL, 0, wbits=31))
    stored[100] ^= 1
    assert refusal(bytes(stored)).what == "payload"
