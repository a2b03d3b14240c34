"""Device paths: a list of nodes in memory that says where a device, or a file on it, is.

Source: UEFI 2.10, sections 10.2 and 10.3.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from uuid import UUID

from firmware.char16 import char16_bytes
from firmware.efi_types import guid_bytes
from guest.units import SZ_64K

_HEADER = struct.Struct("<BBH")
_MEDIA, _END = 0x04, 0x7F
_VENDOR_MEDIA, _FILE_PATH = 0x03, 0x04
_MAX_SIZE = SZ_64K
END_NODE = _HEADER.pack(_END, 0xFF, _HEADER.size)
"""End of the entire path (table 10.2)."""


def vendor_media(guid: UUID) -> bytes:
    """A vendor-defined media node (section 10.3.5.3)."""
    return _node(_MEDIA, _VENDOR_MEDIA, guid_bytes(guid))


def file_path(name: str) -> bytes:
    """A file path node (section 10.3.5.4)."""
    return _node(_MEDIA, _FILE_PATH, char16_bytes(name))


def first_instance(read: Callable[[int, int], bytes], gpa: int) -> bytes | None:
    """The nodes of the path at ``gpa`` up to its first end node, which is left out.

    ``read`` gives bytes by address and size. None for what is no path: a node shorter than its own header, or
    64 KiB without an end.
    """
    path = b""
    while len(path) < _MAX_SIZE:
        kind, _, length = _HEADER.unpack(read(gpa + len(path), _HEADER.size))
        if kind == _END:
            return path
        if length < _HEADER.size:
            return None
        path += read(gpa + len(path), length)
    return None


def _node(kind: int, sub_type: int, data: bytes) -> bytes:
    return _HEADER.pack(kind, sub_type, _HEADER.size + len(data)) + data
