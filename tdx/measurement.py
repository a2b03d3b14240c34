"""Measurement of a TD: MRTD, what the host built it from, and RTMR0 to 3, what the guest extends itself.

MRTD is SHA-384 over the records of the building calls, in their order. A block is 128 bytes, an address stands in it
at byte 16:

    TDH.MEM.PAGE.ADD   a block: "MEM.PAGE.ADD", GPA of the page
    TDH.MR.EXTEND      a block: "MR.EXTEND", GPA of the chunk; then the 256 bytes of the chunk

The records are kept as ranges and hashed when somebody asks.
Source: Intel TDX Module 1.5, Measurement and Attestation; Intel TDX Virtual Firmware Design Guide, MRTD.
"""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

from guest.units import PAGE_SIZE

DIGEST_SIZE = 48
"""Bytes of a SHA-384 digest."""
RTMRS = 4
CHUNK_SIZE = 256
"""Bytes that one TDH.MR.EXTEND measures."""
_BLOCK = struct.Struct("<16sQ104x")


class _Record(NamedTuple):
    """Pages of ``[start, end)``, added one by one; ``data``, then zeros, is measured with each if it is not None."""

    start: int
    end: int
    data: bytes | None


class Measurement:
    """The measurement registers of one TD."""

    def __init__(self) -> None:
        self.rtmr = [bytes(DIGEST_SIZE)] * RTMRS
        self._records: list[_Record | tuple[int, bytes]] = []
        self._mrtd: bytes | None = None

    @property
    def mrtd(self) -> bytes:
        """Digest of the records so far, which is final when the TD can run."""
        if self._mrtd is None:
            sha384 = hashlib.sha384()
            for record in self._records:
                if isinstance(record, _Record):
                    _hash_pages(sha384, record)
                else:
                    sha384.update(_BLOCK.pack(b"MR.EXTEND", record[0]) + record[1])
            self._mrtd = sha384.digest()
        return self._mrtd

    def page_add(self, start: int, end: int, data: bytes | None = None) -> None:
        """TDH.MEM.PAGE.ADD of each page of ``[start, end)``; with ``data`` TDH.MR.EXTEND of all of it follows each."""
        self._records.append(_Record(start, end, data))
        self._mrtd = None

    def mr_extend(self, gpa: int, chunk: bytes) -> None:
        """TDH.MR.EXTEND of the 256 bytes at ``gpa``."""
        self._records.append((gpa, chunk))
        self._mrtd = None

    def rtmr_extend(self, index: int, data: bytes) -> None:
        """RTMR = SHA384(RTMR || data)."""
        self.rtmr[index] = hashlib.sha384(self.rtmr[index] + data).digest()


def _hash_pages(sha384: hashlib._Hash, record: _Record) -> None:
    for gpa in range(record.start, record.end, PAGE_SIZE):
        blocks = [_BLOCK.pack(b"MEM.PAGE.ADD", gpa)]
        if record.data is not None:
            at = gpa - record.start
            page = record.data[at : at + PAGE_SIZE].ljust(PAGE_SIZE, b"\0")
            for chunk in range(0, PAGE_SIZE, CHUNK_SIZE):
                blocks += _BLOCK.pack(b"MR.EXTEND", gpa + chunk), page[chunk : chunk + CHUNK_SIZE]
        sha384.update(b"".join(blocks))
