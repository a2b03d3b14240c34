"""Family ``v9`` of the recorded cases: the stub, the decompressor and the kernel helpers of the v9 series."""

from __future__ import annotations

from typing import Any

from bootstub.boot_params import parse_e820_table
from bootstub.protocol import V9
from bootstub.unaccepted_memory import accept_memory
from guest.bitmap import GuestBitmap
from guest.records import GuestRecord
from guest.units import BITS_PER_BYTE, DIV_ROUND_UP, PAGE_SHIFT, PMD_SIZE
from kernel.unaccepted_memory import UnacceptedMemory
from tools.conformance.recorded_code import (
    Comparison,
    RecordedCase,
    bit_runs,
    changed,
    compare_log,
    differences,
    e820_bytes,
    end_of_ram_pfn,
)


def run_case(case: dict[str, Any]) -> list[str]:
    """The differences between our stages and the recorded case, one line each; empty if they agree."""
    return differences(_Case(case))


class _Case(RecordedCase):
    protocol = V9
    bitmap: GuestBitmap | None = None

    def record(self, params: GuestRecord) -> Comparison:
        """The bitmap, and what the booting kernel reserves of it."""
        gpa, case = params["unaccepted_memory"], self.case
        size = self._cleared_at(gpa)
        yield "bm", [size, self.firmware.pages[-1]] if gpa else None, case["bm"]
        self.bitmap = GuestBitmap(self.machine.memory, gpa) if gpa else None
        yield "bits", bit_runs(self.bitmap, 0, size * BITS_PER_BYTE), case["bits"]
        table, ext = e820_bytes(params, self.machine), self.extension(params) or b""
        ram_pfn = end_of_ram_pfn(parse_e820_table(table), parse_e820_table(ext))
        yield "ram_pfn", ram_pfn, case["ram_pfn"]
        if case["bm"] is not None:
            yield "rsv", DIV_ROUND_UP(ram_pfn << PAGE_SHIFT, PMD_SIZE * BITS_PER_BYTE), case["rsv"]

    def operation(self, name: str, op: list[Any]) -> Comparison:
        """``R``: range_contains_unaccepted_memory(); ``K``, ``S``: accept_memory() of kernel and boot stage."""
        kind, start, end = op[:3]
        if not 0 <= start <= end:
            raise ValueError(f"operation on [{start:#x}, {end:#x})")
        kernel = UnacceptedMemory(self.bitmap, self.arch_accept)
        if kind == "R":
            yield name, int(kernel.range_contains_unaccepted_memory(start, end)), op[3]
            return
        self.forget()
        high = DIV_ROUND_UP(end, PMD_SIZE) + 1
        before = bit_runs(self.bitmap, 0, high)
        if kind == "K":
            kernel.accept_memory(start, end)
        elif self.bitmap is not None:
            accept_memory(self.bitmap, self.arch_accept, start, end)
        yield name + " cleared", changed(before, bit_runs(self.bitmap, 0, high)), op[3]
        yield name + " accepted", self.ranges, op[4]
        yield from compare_log(name + " log", self.host.log, op[5])

    def _cleared_at(self, gpa: int) -> int:
        """Bytes of the first write at ``gpa``; 0 if there was none, or if ``gpa`` is null."""
        sizes = (end - start for _, start, end in self.machine.memory.writes if start == gpa)
        return next(sizes, 0) if gpa else 0
