"""Payloads as the kernel's build packs them: a stream, and behind it the size of what it unpacks to.

Source: scripts/Makefile.lib, the commands that end in ``_with_size``; gzip's own trailer has the size already.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable

from bootstub.lzo import BLOCK_SIZE, MAGIC
from guest.units import SZ_1M

_LZ4_MAGIC, _LZ4_BLOCK = bytes.fromhex("02214c18"), 8 * SZ_1M
_LZOP_HEADER = struct.pack(">HHHBBIIIIB", 0x1040, 0x20A0, 0x0940, 1, 5, 0x1, 0o100644, 0, 0, 0)
"""Versions of file and library, version needed, method LZO1X-1, level; flag: a checksum of what is unpacked; mode,
time, and no name."""


def pack(data: bytes, compression: str) -> bytes:
    """``data`` as a payload; ``compression`` is a key of ``PACKERS``, another one is a ``ValueError``."""
    if compression not in PACKERS:
        raise ValueError(f"compression {compression!r}: expected one of {', '.join(PACKERS)}")
    size = b"" if compression == "gzip" else struct.pack("<I", len(data))
    return PACKERS[compression](data) + size


def _gzip(data: bytes) -> bytes:
    return zlib.compress(data, 1, wbits=31)


def _bzip2(data: bytes) -> bytes:
    import bz2

    return bz2.compress(data, 1)


def _lzma(data: bytes) -> bytes:
    import lzma

    lzma1 = {"id": lzma.FILTER_LZMA1, "preset": 0, "dict_size": 16 * SZ_1M}
    return lzma.compress(data, lzma.FORMAT_ALONE, filters=[lzma1])


def _xz(data: bytes, *, bcj: bool = True) -> bytes:
    import lzma

    filters: list[dict[str, int]] = [{"id": lzma.FILTER_X86}] if bcj else []
    filters.append({"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 32 * SZ_1M})
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)


def _lzo(data: bytes) -> bytes:
    from lzallright import LZOCompressor

    compress = LZOCompressor().compress
    out = [MAGIC, _LZOP_HEADER, struct.pack(">I", zlib.adler32(_LZOP_HEADER))]
    for at in range(0, len(data), BLOCK_SIZE):
        piece = data[at : at + BLOCK_SIZE]
        packed = compress(piece)
        stored = packed if len(packed) < len(piece) else piece
        out += (struct.pack(">III", len(piece), len(stored), zlib.adler32(piece)), stored)
    return b"".join([*out, bytes(4)])


def _lz4(data: bytes) -> bytes:
    from lz4 import block

    pieces = [data[at : at + _LZ4_BLOCK] for at in range(0, len(data), _LZ4_BLOCK)]
    blocks = [block.compress(piece, store_size=False) for piece in pieces]
    return b"".join([_LZ4_MAGIC, *(struct.pack("<I", len(each)) + each for each in blocks)])


def _zstd(data: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    return zstd.compress(data, 1)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": _gzip,
    "bzip2": _bzip2,
    "lzma": _lzma,
    "xz": _xz,
    "xz-without-bcj": lambda data: _xz(data, bcj=False),
    "lzo": _lzo,
    "lz4": _lz4,
    "zstd": _zstd,
}
"""A kernel's xz has the BCJ filter for x86 code (scripts/xz_wrap.sh); the filter is optional in the format."""
