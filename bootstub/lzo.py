"""The lzop container of an lzo payload: its header, and blocks that a library unpacks.

A block is the size of what comes out, the size of what is stored, a checksum, and the data; a size of 0 ends them.
All numbers are big endian. What is stored in its full size is not packed.
Source: lib/decompress_unlzo.c; lzop's own flags for the checksum.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

MAGIC = bytes.fromhex("894c5a4f000d0a1a0a")
BLOCK_SIZE = 256 << 10
"""LZO_BLOCK_SIZE: no block is larger once it is unpacked."""
_VERSION_WITH_LEVEL = 0x940
"""From this version on the header has a level and a second word of the time."""
_F_ADLER32_D = 0x1
_F_H_FILTER = 0x800
_HEADER_MAX = len(MAGIC) + 7 + 1 + 8 + 12 + 1 + 255 + 4


class LzoError(Exception):
    """Data that does not follow the container's layout, or a block that does not unpack."""


class LzoStream:
    """An lzo payload; ``unpack(data, size)`` unpacks one block of ``size`` bytes, any ``refusal`` of it ends."""

    eof = False

    def __init__(self, unpack: Callable[[bytes, int], bytes], refusal: type[Exception]) -> None:
        self._unpack, self._refusal = unpack, refusal

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        """All blocks of ``data``, up to ``max_length`` bytes of output."""
        at, checked = _skip_header(data)
        out = bytearray()
        while len(out) < max_length:
            size = _number(data, at, 4)
            if size == 0:
                self.eof = True
                break
            stored, checksum = _number(data, at + 4, 4), _number(data, at + 8, 4)
            at += 12
            if size > BLOCK_SIZE or not 0 < stored <= min(size, len(data) - at):
                raise LzoError(f"a block of {stored} bytes for {size}, where {len(data) - at} are left")
            block = self._block(data[at : at + stored], size)
            if checked and zlib.adler32(block) != checksum:
                raise LzoError("a block with another checksum")
            out += block
            at += stored
        return bytes(out[:max_length])

    def _block(self, packed: bytes, size: int) -> bytes:
        """``size`` bytes out of ``packed``."""
        if len(packed) == size:
            return packed
        try:
            block = self._unpack(packed, size)
        except self._refusal as error:
            raise LzoError(f"a block that does not unpack: {error.args[0]}") from error
        if len(block) != size:
            raise LzoError(f"a block of {len(block)} bytes instead of {size}")
        return block


def _skip_header(data: bytes) -> tuple[int, bool]:
    """Offset of the first block, and whether checksums of unpacked blocks are there. The header's own is not read."""
    header = data[:_HEADER_MAX]
    if not header.startswith(MAGIC):
        raise LzoError("no lzop magic")
    at = len(MAGIC)
    recent = _number(header, at, 2) >= _VERSION_WITH_LEVEL
    at += 8 if recent else 7  # versions of file and library, version needed, method; level
    flags = _number(header, at, 4)
    at += 8 if flags & _F_H_FILTER else 4
    at += 12 if recent else 8  # mode, time
    at += 1 + _number(header, at, 1) + 4  # name and its length, checksum
    return at, bool(flags & _F_ADLER32_D)


def _number(data: bytes, at: int, size: int) -> int:
    """The number at ``at``, all of which must be there."""
    raw = data[at : at + size]
    if len(raw) < size:
        raise LzoError(f"the end of the data where a number of {size} bytes should be")
    return int.from_bytes(raw, "big")
