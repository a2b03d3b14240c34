"""The frame that all ACPI tables share: the header, and checksums.

Source: ACPI 6.4, section 5.2.6.
"""

from __future__ import annotations

import struct

HEADER_SIZE = 36


def table(signature: bytes, body: bytes, revision: int = 1) -> bytes:
    """A table: the header of 36 bytes, and ``body``."""
    size = HEADER_SIZE + len(body)
    header = struct.pack("<4sIBB6s8sI4sI", signature, size, revision, 0, b"UNACPT", b"UNACCEPT", 1, b"UNAC", 1)
    return checksum(header + body, 9, len(header) + len(body))


def checksum(data: bytes, at: int, size: int) -> bytes:
    """``data`` with the byte at ``at`` set so that its first ``size`` bytes add up to 0 modulo 256."""
    return data[:at] + bytes([-sum(data[:size]) % 256]) + data[at + 1 :]
