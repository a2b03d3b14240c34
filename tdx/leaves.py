"""Numbers of the guest-side interface: TDCALL leaves, TDG.VP.VMCALL sub-functions, and their status codes.

Sources: Intel TDX Module 1.5 ABI (TDG.* leaves); Intel Guest-Host Communication Interface (sub-functions).
"""

from __future__ import annotations

from enum import IntEnum


class Leaf(IntEnum):
    """TDCALL leaf, RAX bits 15:0."""

    TDG_VP_VMCALL = 0
    """In: RCX = mask of exposed registers (15:0 general, 31:16 XMM); R10 = 0, R11 = sub-function, R12.. = arguments.

    Out: the exposed registers as the host left them. RAX, RCX and RSP cannot be exposed, nor RBP with NO_RBP_MOD.
    """
    TDG_VP_INFO = 1
    """Out: RCX = GPA width, RDX = ATTRIBUTES, R8 = VCPUs (31:0 number, 63:32 maximum), R9 = VCPU index,
    R10 bit 0 = TDG.SYS.RD is there, R11 = 0."""
    TDG_MR_RTMR_EXTEND = 2
    """In: RCX = private GPA of 48 bytes, aligned to 64, RDX = RTMR 0 to 3. Out: RAX only."""
    TDG_VP_VEINFO_GET = 3
    """Out: RCX = exit reason, RDX = exit qualification, R8 = GLA, R9 = GPA, R10 = instruction length (31:0) and
    information (63:32); all 0 if there is no #VE information."""
    TDG_MR_REPORT = 4
    """In: RCX = GPA of the report, aligned to 1024, RDX = GPA of REPORTDATA, aligned to 64, R8 = subtype 0. Both may
    be shared. Out: RAX only; the report is in memory."""
    TDG_VP_CPUIDVE_SET = 5
    """In: RCX bit 0 = #VE for all CPUID at CPL 0, bit 1 = at CPL above 0. Out: RAX only."""
    TDG_MEM_PAGE_ACCEPT = 6
    """In: RCX = GPA | level (0 = 4 KiB, 1 = 2 MiB). Out: RAX only."""
    TDG_VM_RD = 7
    """In: RCX = 0, RDX = field id. Out: R8 = value. Version 1 also: RDX = next field id, -1 if there is none; a field
    id of -1 in gives the first one and the status METADATA_FIRST_FIELD_ID_IN_CONTEXT."""
    TDG_VM_WR = 8
    """In: RCX = 0, RDX = field id, R8 = value, R9 = write mask. Out: R8 = the value before."""
    TDG_VP_RD = 9
    """As version 1 of TDG.VM.RD, for a field of the virtual processor."""
    TDG_VP_WR = 10
    """As TDG.VM.WR, for a field of the virtual processor."""
    TDG_SYS_RD = 11
    """In: RDX = field id of the module; RCX is not looked at. Out: as version 1 of TDG.VM.RD."""
    TDG_SYS_RDALL = 12
    """In: RDX = private GPA of a 4 KiB page, R8 = first field id, -1 for all. Out: the list is in memory, R8 = next
    field id that did not fit, -1 if all did."""
    TDG_MR_VERIFYREPORT = 22
    """In: RCX = private GPA of a REPORTMACSTRUCT, aligned to 256. Out: RAX only."""
    TDG_MEM_PAGE_ATTR_RD = 23
    """In: RCX = private GPA. Out: RCX = GPA of the page | level (2:0) | PENDING (62), RDX = 4 sets of 16 attributes;
    both 0 if it failed."""
    TDG_MEM_PAGE_ATTR_WR = 24
    """In: RCX = GPA | level 0 to 2, RDX = 4 sets of 16 attributes, R8 = masks of them. Out: as TDG.MEM.PAGE.ATTR.RD."""

    @property
    def spec_name(self) -> str:
        """As the specification writes it: ``TDG.MEM.PAGE.ACCEPT``."""
        return self.name.replace("_", ".")


class SubFunction(IntEnum):
    """TDG.VP.VMCALL sub-function, R11. Those of an instruction have the number of its exit reason."""

    Instruction_CPUID = 10
    """R12 = leaf, R13 = subleaf. Out: R12..R15 = EAX, EBX, ECX, EDX."""
    Instruction_HLT = 12
    """R12 = 1 if interrupts are blocked."""
    Instruction_IO = 30
    """R12 = size 1, 2 or 4, R13 = 0 IN, 1 OUT, R14 = port, R15 = data. Out: R11 = data of IN."""
    Instruction_RDMSR = 31
    """R12 = index. Out: R11 = value."""
    Instruction_WRMSR = 32
    """R12 = index, R13 = value."""
    RequestMMIO = 48
    """R12 = size 1, 2, 4 or 8, R13 = 0 read, 1 write, R14 = shared GPA, R15 = data. Out: R11 = data of a read."""
    MapGPA = 0x10001
    """R12 = GPA (shared bit set: make shared), R13 = size in bytes. Out: R10 = status, R11 = failing GPA."""
    GetTdVmCallInfo = 0x10000
    """R12 = 0. Out: R10 = status, R11..R14 = 0: the base sub-functions are there. R12 = 1: R11 bit 1 = there is
    SetupEventNotifyInterrupt."""
    GetQuote = 0x10002
    """R12 = shared GPA of a buffer, R13 = its size in bytes. Out: R10 = status; the quote comes in the buffer."""
    ReportFatalError = 0x10003
    """R12 = code, text in R14, R15, RBX, RDI, RSI, R8, R9, RDX. It does not return."""
    SetupEventNotifyInterrupt = 0x10004
    """R12 = vector, 32 to 255."""

    @property
    def spec_name(self) -> str:
        """As the specification writes it: ``Instruction.CPUID``."""
        return self.name.replace("_", ".")


class VmCallStatus(IntEnum):
    """TDG.VP.VMCALL status, R10 out."""

    SUCCESS = 0
    RETRY = 1
    INVALID_OPERAND = 0x8000_0000_0000_0000
    GPA_INUSE = 0x8000_0000_0000_0001
    ALIGN_ERROR = 0x8000_0000_0000_0002
    SUBFUNC_UNSUPPORTED = 0x8000_0000_0000_0003


EXPOSE_R10_R15 = 0xFC00
"""RCX mask of a TDG.VP.VMCALL that shows the host R10 to R15 and nothing else."""
