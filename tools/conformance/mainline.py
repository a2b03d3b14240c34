"""Family ``mainline`` of the recorded cases: the stub and the kernel helpers of 6.12, with its table.

``pre`` is a table that is installed before the stub runs; operations take a start and a size.
"""

from __future__ import annotations

from typing import Any

from bootstub.protocol import MAINLINE
from bootstub.unaccepted_table import EFI_UNACCEPTED_MEMORY, UnacceptedTable
from firmware.efi_types import LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID, guid_bytes
from guest.records import GuestRecord
from guest.units import BITS_PER_BYTE
from kernel.unaccepted_memory import UnacceptedMemory
from tools.conformance.recorded_code import Comparison, RecordedCase, bit_runs, changed, compare_log, differences
from tools.conformance.unaccepted_table import build_table

_GUID = guid_bytes(LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID)


def run_case(case: dict[str, Any]) -> list[str]:
    """The differences between our stages and the recorded case, one line each; empty if they agree."""
    return differences(_Case(case))


class _Case(RecordedCase):
    protocol = MAINLINE
    table: UnacceptedTable | None = None

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        if "pre" in case:
            version, unit_size, phys_base, size, bits = case["pre"]
            runs = [list(run) for run in zip(bits[::2], bits[1::2], strict=True)]
            data = build_table(version, unit_size, phys_base, size, runs)
            gpa = self.firmware.take(len(data))
            self.machine.memory.write(gpa, data)
            self.firmware.install(_GUID, gpa)

    def record(self, params: GuestRecord) -> Comparison:
        """The table."""
        case, gpa = self.case, self.firmware.tables.get(_GUID)
        if gpa is not None:
            self.table = UnacceptedTable.at(self.machine.memory, gpa)
            header = GuestRecord(self.machine.memory, gpa, EFI_UNACCEPTED_MEMORY)
        fields = [header[name] for name in ("version", "unit_size", "phys_base", "size")] if gpa is not None else None
        yield "tbl", fields, case["tbl"]
        yield "bits", self._bits(), case["bits"]
        _, allocated = self.firmware.pools.get(gpa or 0, (0, 0))
        yield "tbl_pool", allocated, case["tbl_pool"]

    def operation(self, name: str, op: list[Any]) -> Comparison:
        """``R``: range_contains_unaccepted_memory(); ``K``, ``S``: accept_memory() of kernel and boot stage."""
        kind, start, size = op[:3]
        if start < 0 or size < 0:
            raise ValueError(f"operation on {size:#x} bytes at {start:#x}")
        table = self.table
        kernel = UnacceptedMemory(None, self.arch_accept)
        if table is not None:
            described = table.size * BITS_PER_BYTE * table.unit_size
            kernel = UnacceptedMemory(table.bitmap, self.arch_accept, table.phys_base, described, table.unit_size)
        if kind == "R":
            yield name, int(kernel.range_contains_unaccepted_memory(start, start + size)), op[3]
            return
        self.forget()
        before = self._bits()
        if kind == "K":
            kernel.accept_memory(start, start + size)
        elif table is not None:
            table.accept_memory(self.arch_accept, start, size)
        yield name + " cleared", changed(before, self._bits()), op[3]
        yield name + " accepted", self.ranges, op[4]
        yield from compare_log(name + " log", self.host.log, op[5])

    def _bits(self) -> list[int]:
        table = self.table
        return [] if table is None else bit_runs(table.bitmap, 0, table.size * BITS_PER_BYTE)
