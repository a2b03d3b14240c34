"""Completion status words of the TDX module (RAX after TDCALL and SEAMCALL).

Source: Intel TDX Module 1.5, Interface Function Completion Status; tdx_error_codes_defs.h.

    63 ERROR | 62 NON_RECOVERABLE | 61 FATAL | 60 HOST_RECOVERABILITY_HINT | 47:40 class | 39:32 code
    31:0 details: operand id, SEPT level, exit reason
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

TDX_SUCCESS = 0x0000_0000_0000_0000
TDX_NON_RECOVERABLE_VCPU = 0x4000_0001_0000_0000
TDX_NON_RECOVERABLE_TD = 0x6000_0002_0000_0000
TDX_INTERRUPTED_RESUMABLE = 0x8000_0003_0000_0000
TDX_INTERRUPTED_RESTARTABLE = 0x8000_0004_0000_0000
TDX_OPERAND_INVALID = 0xC000_0100_0000_0000
TDX_OPERAND_ADDR_RANGE_ERROR = 0xC000_0101_0000_0000
TDX_OPERAND_BUSY = 0x8000_0200_0000_0000
TDX_PREVIOUS_TLB_EPOCH_BUSY = 0x8000_0201_0000_0000
TDX_RND_NO_ENTROPY = 0x8000_0203_0000_0000
TDX_OPERAND_BUSY_HOST_PRIORITY = 0x8000_0204_0000_0000
"""Inside the module only: the guest sees ``TDX_OPERAND_BUSY``."""
TDX_HOST_PRIORITY_BUSY_TIMEOUT = 0x9000_0205_0000_0000
TDX_PAGE_METADATA_INCORRECT = 0xC000_0300_0000_0000
TDX_PAGE_NOT_FREE = 0xC000_0303_0000_0000
TDX_OP_STATE_INCORRECT = 0xC000_0608_0000_0000
TDX_NO_VALID_VE_INFO = 0xC000_0704_0000_0000
TDX_EPT_WALK_FAILED = 0xC000_0B00_0000_0000
TDX_EPT_ENTRY_FREE = 0xC000_0B01_0000_0000
TDX_EPT_ENTRY_NOT_FREE = 0xC000_0B02_0000_0000
TDX_EPT_ENTRY_NOT_PRESENT = 0xC000_0B03_0000_0000
TDX_EPT_ENTRY_NOT_LEAF = 0xC000_0B04_0000_0000
TDX_EPT_ENTRY_LEAF = 0xC000_0B05_0000_0000
TDX_GPA_RANGE_NOT_BLOCKED = 0xC000_0B06_0000_0000
TDX_GPA_RANGE_ALREADY_BLOCKED = 0x0000_0B07_0000_0000
"""A warning: the ERROR bit is clear."""
TDX_TLB_TRACKING_NOT_DONE = 0xC000_0B08_0000_0000
TDX_EPT_INVALID_PROMOTE_CONDITIONS = 0xC000_0B09_0000_0000
TDX_PAGE_ALREADY_ACCEPTED = 0x0000_0B0A_0000_0000
"""The ERROR bit is clear, and still it is not success."""
TDX_PAGE_SIZE_MISMATCH = 0xC000_0B0B_0000_0000
TDX_GPA_RANGE_BLOCKED = 0xC000_0B0C_0000_0000
TDX_EPT_ENTRY_STATE_INCORRECT = 0xC000_0B0D_0000_0000
TDX_L2_SEPT_WALK_FAILED = 0xC000_0B0F_0000_0000
TDX_PAGE_ATTR_INVALID = 0xC000_0B11_0000_0000
TDX_METADATA_FIELD_ID_INCORRECT = 0xC000_0C00_0000_0000
TDX_METADATA_FIELD_NOT_WRITABLE = 0xC000_0C01_0000_0000
TDX_METADATA_FIELD_NOT_READABLE = 0xC000_0C02_0000_0000
TDX_METADATA_FIELD_VALUE_NOT_VALID = 0xC000_0C03_0000_0000
TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT = 0x0000_0C0B_0000_0000
TDX_INVALID_CPUSVN = 0xC000_1000_0000_0000
TDX_INVALID_REPORTMACSTRUCT = 0xC000_1001_0000_0000


class OperandId(IntEnum):
    """Which operand a status is about, in bits 31:0: a register, or an object of the module."""

    RAX = 0
    RCX = 1
    RDX = 2
    RBX = 3
    RSP = 4
    RBP = 5
    RSI = 6
    RDI = 7
    R8 = 8
    R9 = 9
    R10 = 10
    R11 = 11
    R12 = 12
    R13 = 13
    R14 = 14
    R15 = 15
    SEPT_TREE = 146
    SEPT_ENTRY = 147
    RTMR = 168
    TD_EPOCH = 169
    METADATA_FIELD = 176


OPERAND_ID_RAX = int(OperandId.RAX)
OPERAND_ID_RCX = int(OperandId.RCX)


class StatusClass(IntEnum):
    """Bits 47:40 of a status word."""

    GENERAL = 0x0
    OPERAND_INVALID = 0x1
    RESOURCE_BUSY = 0x2
    PAGE_METADATA = 0x3
    DEPENDENCIES = 0x4
    SYSTEM = 0x5
    TD_STATE = 0x6
    VCPU = 0x7
    KEYS = 0x8
    PLATFORM = 0x9
    TDMR = 0xA
    SEPT = 0xB
    METADATA_FIELD = 0xC
    SERVICE_TD = 0xD
    MIGRATION = 0xE
    REPORT = 0x10
    L2 = 0x11


class Status(NamedTuple):
    """The fields of a status word. ``error`` says that the call failed; without it a word can still be a warning."""

    error: bool
    non_recoverable: bool
    fatal: bool
    host_recoverability_hint: bool
    status_class: int
    code: int
    details: int


def decode_status(status: int) -> Status:
    """Take a status word apart."""
    return Status(
        error=bool(status >> 63 & 1),
        non_recoverable=bool(status >> 62 & 1),
        fatal=bool(status >> 61 & 1),
        host_recoverability_hint=bool(status >> 60 & 1),
        status_class=status >> 40 & 0xFF,
        code=status >> 32 & 0xFF,
        details=status & 0xFFFF_FFFF,
    )


_NAMES = {value: name for name, value in globals().items() if name.startswith("TDX_")}


def status_name(status: int) -> str:
    """Name of the status without its details, or the number."""
    return _NAMES.get(status & ~0xFFFF_FFFF, f"{status:#018x}")
