"""#VE, the virtualization exception: why an instruction left the guest, and what the guest is told of it.

Sources: SDM volume 3, 26.5.7 and appendix C; Intel TDX Module 1.5, TDG.VP.VEINFO.GET.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

VECTOR_DF, VECTOR_VE = 8, 20


class ExitReason(IntEnum):
    """Basic exit reason of VMX; also the number of the TDG.VP.VMCALL sub-function that does the instruction."""

    CPUID = 10
    HLT = 12
    IO_INSTRUCTION = 30
    RDMSR = 31
    WRMSR = 32


@dataclass(frozen=True, slots=True)
class VeInfo:
    """What the module keeps of a #VE. ``gla`` and ``gpa`` belong to EPT violations and are 0 for instructions."""

    exit_reason: ExitReason
    exit_qualification: int
    instruction_length: int
    gla: int = 0
    gpa: int = 0


def io_qualification(port: int, size: int, is_in: bool, is_string: bool = False) -> int:
    """Exit qualification of an I/O instruction: 2:0 size - 1, 3 direction (1 = IN), 4 string, 31:16 port.

    REP (bit 5) and the operand's encoding (bit 6) are left out. Source: SDM volume 3, table 28-5.
    """
    return port << 16 | is_string << 4 | is_in << 3 | size - 1
