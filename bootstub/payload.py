"""The payload of a bzImage: which compression it has, and the kernel that it holds.

Source: Documentation/arch/x86/boot.rst (payload_offset, payload_length) and lib/decompress.c. The last four bytes
of the payload are the size of what comes out, little endian (output_len of arch/x86/boot/compressed/mkpiggy.c):
scripts/Makefile.lib appends them to every format but gzip, whose own trailer ends with them. Only the first stream of
a payload counts, as for the kernel's own decompressors; what lies between it and the size is not read. lz4 has no end
of stream, and goes on to the size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from functools import lru_cache
from types import ModuleType
from typing import Protocol

from bootstub.lzo import LzoError, LzoStream
from guest.errors import FormatError
from guest.units import SZ_1G, SZ_1M

_BOOT_RST = "Documentation/arch/x86/boot.rst, payload_offset"
_MKPIGGY = "arch/x86/boot/compressed/mkpiggy.c, output_len"

OUTPUT_LIMIT = SZ_1G
"""No kernel is larger: it must fit KERNEL_IMAGE_SIZE. Bounds the memory that a hostile payload can ask for."""

_LZMA_MEMORY_LIMIT = 256 * SZ_1M
"""For the dictionary; the kernel's build uses at most 128 MiB (scripts/xz_wrap.sh)."""

_LZ4_MAGIC, _LZ4_BLOCK, _UINT32 = 0x184C_2102, 8 * SZ_1M, 4


class Compression(StrEnum):
    """The compressions that lib/decompress.c knows."""

    GZIP = "gzip"
    BZIP2 = "bzip2"
    LZMA = "lzma"
    XZ = "xz"
    LZO = "lzo"
    LZ4 = "lz4"
    ZSTD = "zstd"


_MAGICS = {
    Compression.GZIP: bytes.fromhex("1f8b"),
    Compression.BZIP2: b"BZh",
    Compression.LZMA: bytes.fromhex("5d0000"),
    Compression.XZ: bytes.fromhex("fd377a585a00"),
    Compression.LZO: bytes.fromhex("894c5a4f"),
    Compression.LZ4: bytes.fromhex("02214c18"),
    Compression.ZSTD: bytes.fromhex("28b52ffd"),
}


class _Stream(Protocol):
    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _gzip() -> tuple[_Stream, type[Exception]]:
    import zlib

    return zlib.decompressobj(wbits=31), zlib.error


def _bzip2() -> tuple[_Stream, type[Exception]]:
    import bz2

    return bz2.BZ2Decompressor(), OSError


def _lzma() -> tuple[_Stream, type[Exception]]:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY_LIMIT), lzma.LZMAError


def _xz() -> tuple[_Stream, type[Exception]]:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY_LIMIT), lzma.LZMAError


def _zstd() -> tuple[_Stream, type[Exception]]:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd.ZstdDecompressor(), zstd.ZstdError


class _Lz4:
    """The legacy frame of lz4: blocks of up to 8 MiB, each with its size before it; any number of frames in a row.

    It has no end mark: the last four bytes are the payload's ``output_len``, not a block. Source: lz4's
    doc/lz4_Frame_format.md, Legacy frame; lib/decompress_unlz4.c.
    """

    eof = False

    def __init__(self, block: ModuleType) -> None:
        self._block = block

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        """All blocks of ``data``, up to ``max_length`` bytes of output."""
        out, at, end = bytearray(), 0, len(data) - _UINT32
        while at + _UINT32 <= end and len(out) < max_length:
            size = int.from_bytes(data[at : at + _UINT32], "little")
            at += _UINT32
            if size == _LZ4_MAGIC:
                continue
            if not 0 < size <= end - at:
                raise self._block.LZ4BlockError(f"a block of {size} bytes where {end - at} are left")
            out += self._block.decompress(data[at : at + size], uncompressed_size=_LZ4_BLOCK)
            at += size
        self.eof = at == end
        return bytes(out[:max_length])


def _lz4() -> tuple[_Stream, type[Exception]]:
    try:
        from lz4 import block
    except ImportError as error:
        raise _missing("lz4", "lz4") from error
    return _Lz4(block), block.LZ4BlockError


def _lzo() -> tuple[_Stream, type[Exception]]:
    try:
        from lzallright import LZOCompressor, LZOError
    except ImportError as error:
        raise _missing("lzo", "lzallright") from error
    return LzoStream(LZOCompressor.decompress, LZOError), LzoError


def _missing(extra: str, module: str) -> FormatError:
    found, expected = f"an {extra} payload, and no module {module}", f"{module}: pip install 'unaccepted[{extra}]'"
    return FormatError("payload compression", found=found, expected=expected, source=_BOOT_RST)


_STREAMS: dict[Compression, Callable[[], tuple[_Stream, type[Exception]]]] = {
    Compression.GZIP: _gzip,
    Compression.BZIP2: _bzip2,
    Compression.LZMA: _lzma,
    Compression.XZ: _xz,
    Compression.ZSTD: _zstd,
    Compression.LZ4: _lz4,
    Compression.LZO: _lzo,
}
"""The decompressors, imported only when they are used."""


def detect(payload: bytes, *, at: int = 0) -> Compression:
    """The compression of ``payload``, which was found at ``at``; an unknown magic is a ``FormatError``."""
    for compression, magic in _MAGICS.items():
        if payload.startswith(magic):
            return compression
    known = ", ".join(f"{magic.hex()} ({compression})" for compression, magic in _MAGICS.items())
    found = payload[:6].hex() or "nothing"
    raise FormatError("payload magic", at=at, found=found, expected=f"one of {known}", source=_BOOT_RST)


def output_len(payload: bytes, *, at: int = 0) -> int:
    """Size in bytes of what ``payload`` decompresses to, as its last four bytes say."""
    size_at = max(len(payload) - 4, 0)
    size = int.from_bytes(payload[size_at:], "little")
    if len(payload) < 4 or not 0 < size <= OUTPUT_LIMIT:
        raise FormatError(
            "payload output_len",
            at=at + size_at,
            found=f"{size} bytes",
            expected=f"a size from 1 to {OUTPUT_LIMIT} bytes",
            source=_MKPIGGY,
        )
    return size


def decompress(payload: bytes, *, at: int = 0) -> bytes:
    """What ``payload`` decompresses to: the kernel's ELF file and the relocation table behind it.

    Never makes more than one byte above ``output_len()``. ``at`` is where the payload was found, for messages. What
    was made last is kept, since several stages and commands ask for it.
    """
    try:
        return _decompress(payload)
    except FormatError as error:
        raise _moved(error, at) from error.__cause__


def _moved(error: FormatError, by: int) -> FormatError:
    """The same error, for a payload that does not lie at 0 but at ``by``."""
    at = error.at + by if error.at is not None else None
    return FormatError(error.what, at=at, found=error.found, expected=error.expected, source=error.source)


@lru_cache(maxsize=1)
def _decompress(payload: bytes) -> bytes:
    compression, size = detect(payload), output_len(payload)
    stream, error = _STREAMS[compression]()
    try:
        output = stream.decompress(payload, size + 1)
    except error as refusal:
        found, expected = f"damaged data ({refusal})", f"a {compression} stream"
        raise FormatError("payload", at=0, found=found, expected=expected, source=_BOOT_RST) from refusal
    if len(output) != size or not stream.eof:
        found = f"more than {size}" if len(output) > size else f"{len(output)}"
        found += " bytes" if stream.eof or len(output) > size else " bytes in a stream that is cut short"
        raise FormatError("payload output", at=0, found=found, expected=f"{size} bytes", source=_MKPIGGY)
    return output
