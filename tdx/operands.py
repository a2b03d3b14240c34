"""Operands in memory: a leaf that takes the address of a structure reads or writes it as the guest would.

A bad address is refused with OPERAND_INVALID and the register's number. An address that is good but not mapped is
no error of the leaf: the access ends as any access of the guest does, in a TD exit, in #VE, in the guest's death.
Source: TDX_1.5.01, check_walk_and_map_guest_side_gpa().
"""

from __future__ import annotations

from guest.memory import PhysicalMemory
from tdx.access import Access
from tdx.config import TdConfig


class Operands:
    """The memory that the leaves of one TD see."""

    def __init__(self, physical: PhysicalMemory, access: Access, config: TdConfig) -> None:
        self._physical, self._access = physical, access
        self._private_end = config.shared_mask

    def is_valid(self, gpa: int, alignment: int, *, may_be_shared: bool = False) -> bool:
        """Whether ``gpa`` is aligned and inside the address width, and private if it must be."""
        return gpa % alignment == 0 and gpa < (2 * self._private_end if may_be_shared else self._private_end)

    def read(self, gpa: int, size: int) -> bytes:
        """The bytes at ``gpa``. Raises ``MemoryFault`` where the guest's own access would."""
        self._access.admit(gpa, size, "read")
        return self._physical.read(gpa, size)

    def write(self, gpa: int, data: bytes) -> None:
        """Put ``data`` at ``gpa``. Raises ``MemoryFault`` where the guest's own access would."""
        self._access.admit(gpa, len(data), "write")
        self._physical.write(gpa, data)
