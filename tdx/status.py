"""Completion status words of the TDX module (RAX after TDCALL).

Source: Intel TDX Module 1.5, Interface Function Completion Status; tdx_error_codes_defs.h.

    63 ERROR | 62 NON_RECOVERABLE | 61 FATAL | 60 HOST_RECOVERABILITY_HINT | 47:40 class | 39:32 code
    31:0 details: operand id, SEPT level, exit reason
"""

from __future__ import annotations

TDX_SUCCESS = 0x0000_0000_0000_0000
TDX_OPERAND_INVALID = 0xC000_0100_0000_0000
TDX_OPERAND_BUSY = 0x8000_0200_0000_0000
TDX_PAGE_ALREADY_ACCEPTED = 0x0000_0B0A_0000_0000
"""The ERROR bit is clear, and still it is not success."""
TDX_PAGE_SIZE_MISMATCH = 0xC000_0B0B_0000_0000

OPERAND_ID_RAX = 0
OPERAND_ID_RCX = 1

_NAMES = {
    TDX_SUCCESS: "TDX_SUCCESS",
    TDX_OPERAND_INVALID: "TDX_OPERAND_INVALID",
    TDX_OPERAND_BUSY: "TDX_OPERAND_BUSY",
    TDX_PAGE_ALREADY_ACCEPTED: "TDX_PAGE_ALREADY_ACCEPTED",
    TDX_PAGE_SIZE_MISMATCH: "TDX_PAGE_SIZE_MISMATCH",
}


def status_name(status: int) -> str:
    """Name of the status without its details, or the number."""
    return _NAMES.get(status & ~0xFFFF_FFFF, f"{status:#018x}")
