"""struct setup_data: a linked list of blobs behind boot_params, in guest memory.

Sources: arch/x86/include/uapi/asm/setup_data.h; Documentation/arch/x86/boot.rst, field ``setup_data``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import construct as c

from guest.errors import FormatError
from guest.records import parse
from guest.units import PHYSICAL_ADDRESS_END, SZ_64M

Reader = Callable[[int, int], bytes]
"""``read(gpa, size)``: the bytes there. It may answer with fewer bytes than asked for where memory ends."""

MAX_NODES = 1024
MAX_LEN = SZ_64M
"""Longer data is no boot loader's: an option ROM has 16 MiB at most, other blobs are smaller."""

_SOURCE = "Documentation/arch/x86/boot.rst, field setup_data"


class SetupDataType(IntEnum):
    """Values of ``type``."""

    SETUP_NONE = 0
    SETUP_E820_EXT = 1
    SETUP_DTB = 2
    SETUP_PCI = 3
    SETUP_EFI = 4
    SETUP_APPLE_PROPERTIES = 5
    SETUP_JAILHOUSE = 6
    SETUP_CC_BLOB = 7
    SETUP_IMA = 8
    SETUP_RNG_SEED = 9
    SETUP_INDIRECT = 1 << 31


SETUP_DATA = c.Struct("next" / c.Int64ul, "type" / c.Int32ul, "len" / c.Int32ul)
"""The header alone; ``len`` bytes of data follow it."""

_SETUP_INDIRECT = c.Struct("type" / c.Int32ul, "reserved" / c.Int32ul, "len" / c.Int64ul, "addr" / c.Int64ul)


@dataclass(frozen=True, slots=True)
class SetupData:
    """A node: where it lies (``gpa``), and its header. ``len`` is bytes of data, without the header."""

    gpa: int
    next: int
    type: int
    len: int

    @property
    def data_gpa(self) -> int:
        """Guest physical address of the data."""
        return self.gpa + SETUP_DATA.sizeof()

    @property
    def end(self) -> int:
        """End of the data, exclusive."""
        return self.data_gpa + self.len


@dataclass(frozen=True, slots=True)
class SetupIndirect:
    """struct setup_indirect: the data proper is ``len`` bytes at ``addr``."""

    type: int
    len: int
    addr: int


def walk_setup_data(read: Reader, head: int) -> Iterator[SetupData]:
    """The nodes of the list that starts at ``head``, in order; 0 ends a list.

    A list with a loop, with more than ``MAX_NODES`` nodes, or with a node that is too long or not in memory is
    a ``FormatError``, raised when the walk gets there.
    """
    seen: set[int] = set()
    gpa = head
    while gpa:
        if gpa in seen:
            raise _error("next", gpa, f"node {gpa:#x} for the second time", "a list without a loop")
        if len(seen) == MAX_NODES:
            raise _error("next", gpa, f"more than {MAX_NODES} nodes", f"at most {MAX_NODES}")
        seen.add(gpa)
        node = _read_node(read, gpa)
        yield node
        gpa = node.next


def read_indirect(read: Reader, node: SetupData) -> SetupIndirect | None:
    """What a node of type ``SETUP_INDIRECT`` points to; None for any other node."""
    if node.type != SetupDataType.SETUP_INDIRECT:
        return None
    size = _SETUP_INDIRECT.sizeof()
    if node.len < size:
        raise _error("len", node.gpa, f"{node.len} bytes", f"at least {size} bytes of struct setup_indirect")
    fields = parse(_SETUP_INDIRECT, "setup_indirect", read(node.data_gpa, size), at=node.data_gpa, source=_SOURCE)
    if fields.addr + fields.len > PHYSICAL_ADDRESS_END:
        raise _error("indirect", node.data_gpa, f"data up to {fields.addr + fields.len:#x}", "an end below 2^52")
    return SetupIndirect(fields.type, fields.len, fields.addr)


def _read_node(read: Reader, gpa: int) -> SetupData:
    size = SETUP_DATA.sizeof()
    if gpa + size > PHYSICAL_ADDRESS_END:
        raise _error("next", gpa, f"a node at {gpa:#x}", "an address below 2^52")
    fields = parse(SETUP_DATA, "setup_data", read(gpa, size), at=gpa, source=_SOURCE)
    node = SetupData(gpa, fields.next, fields.type, fields.len)
    if node.len > MAX_LEN:
        raise _error("len", gpa, f"{node.len:#x} bytes", f"at most {MAX_LEN:#x} bytes")
    if node.end > PHYSICAL_ADDRESS_END:
        raise _error("len", gpa, f"data up to {node.end:#x}", "an end below 2^52")
    return node


def _error(field: str, at: int, found: str, expected: str) -> FormatError:
    return FormatError(f"setup_data.{field}", at=at, found=found, expected=expected, source=_SOURCE)
