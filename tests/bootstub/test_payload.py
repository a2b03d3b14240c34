"""Payloads of a bzImage: every compression, and every way in which one can lie."""

import bz2
import gzip
import lzma
import struct
import sys
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bootstub.bzimage import parse_bzimage
from bootstub.payload import OUTPUT_LIMIT, decompress, detect, output_len
from bootstub.sample_kernel import build_bzimage, build_vmlinux
from guest.errors import BootError, FormatError

KERNEL = b"a kernel " * 1000
COMPRESSIONS = ["gzip", "bzip2", "lzma", "xz", "zstd", "lz4"]


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
    assert detect(payload) == compression
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


def test_known_and_unsupported():
    """lzo is recognised by name and refused as not supported yet."""
    error = refusal(bytes.fromhex("894c5a4f") + bytes(60) + struct.pack("<I", 100))
    assert error.what == "payload compression"
    assert error.found == "lzo, which is known and not supported yet"


def test_lz4_is_an_extra(monkeypatch):
    """Without the module lz4, a kernel that needs it is refused with the extra's name."""
    payload = packed("lz4")
    monkeypatch.setitem(sys.modules, "lz4", None)
    error = refusal(payload)
    assert (error.what, error.expected) == ("payload compression", "lz4: pip install 'unaccepted[lz4]'")


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


@pytest.mark.parametrize("compression", ["bzip2", "lzma", "xz", "zstd", "lz4"])
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
