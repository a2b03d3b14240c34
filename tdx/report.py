"""Leaves about measurement: TDG.MR.RTMR.EXTEND, TDG.MR.REPORT, TDG.MR.VERIFYREPORT; and the report's layout.

A report of this module is not genuine and says so: CPUSVN is a text, and the MAC is HMAC-SHA-256 with a key that
stands below for all to read. VERIFYREPORT accepts exactly such reports.
Source: Intel TDX Module 1.5, TDREPORT_STRUCT, TDG.MR.*; TDX_1.5.01, tdg_mr_*.c; SDM, REPORTMACSTRUCT.
"""

from __future__ import annotations

import hashlib
import hmac

import construct as c

from guest.registers import Registers
from tdx.config import XFAM_X87_SSE
from tdx.measurement import DIGEST_SIZE, RTMRS
from tdx.status import (
    TDX_INVALID_CPUSVN,
    TDX_INVALID_REPORTMACSTRUCT,
    TDX_OPERAND_INVALID,
    TDX_SUCCESS,
    OperandId,
)
from tdx.td import Td

PUBLIC_KEY = b"unaccepted: this report is not genuine"
"""The key of the MAC. It is no secret: it proves nothing but that a report was not changed by accident."""
CPUSVN = b"not genuine TDX!"
REPORT_TYPE_TDX = 0x81
_VALID = 0x3_01FF
_REPORT_ALIGNMENT, _DATA_ALIGNMENT, _MAC_ALIGNMENT = 1024, 64, 256
_REPORTDATA_SIZE = 64

REPORTMACSTRUCT = c.Struct(
    "ReportType" / c.Struct("Type" / c.Int8ul, "SubType" / c.Int8ul, "Version" / c.Int8ul, "Reserved" / c.Int8ul),
    "Reserved1" / c.Bytes(12),
    "CpuSvn" / c.Bytes(16),
    "TeeTcbInfoHash" / c.Bytes(48),
    "TeeInfoHash" / c.Bytes(48),
    "ReportData" / c.Bytes(64),
    "Reserved2" / c.Bytes(32),
    "Mac" / c.Bytes(32),
)
TEE_TCB_INFO = c.Struct(
    "Valid" / c.Int64ul,
    "TeeTcbSvn" / c.Bytes(16),
    "MrSeam" / c.Bytes(48),
    "MrSignerSeam" / c.Bytes(48),
    "Attributes" / c.Int64ul,
    "TeeTcbSvn2" / c.Bytes(16),
    "Reserved" / c.Bytes(95),
)
TDINFO_STRUCT = c.Struct(
    "Attributes" / c.Int64ul,
    "Xfam" / c.Int64ul,
    "MrTd" / c.Bytes(48),
    "MrConfigId" / c.Bytes(48),
    "MrOwner" / c.Bytes(48),
    "MrOwnerConfig" / c.Bytes(48),
    "Rtmr" / c.Bytes(RTMRS * DIGEST_SIZE),
    "ServTdHash" / c.Bytes(48),
    "Reserved" / c.Bytes(64),
)
TDREPORT_STRUCT = c.Struct(
    "ReportMac" / REPORTMACSTRUCT,
    "TeeTcbInfo" / TEE_TCB_INFO,
    "Reserved" / c.Bytes(17),
    "TdInfo" / TDINFO_STRUCT,
)
_MAC_SIZE = 32
_MAC_STRUCT_SIZE = REPORTMACSTRUCT.sizeof()


def mr_rtmr_extend(td: Td, regs: Registers) -> int:
    """TDG.MR.RTMR.EXTEND. The memory operand comes before the index."""
    if not td.operands.is_valid(regs.rcx, _DATA_ALIGNMENT):
        return TDX_OPERAND_INVALID | OperandId.RCX
    data = td.operands.read(regs.rcx, DIGEST_SIZE)
    if regs.rdx >= RTMRS:
        return TDX_OPERAND_INVALID | OperandId.RDX
    td.measurement.rtmr_extend(regs.rdx, data)
    return TDX_SUCCESS


def mr_report(td: Td, regs: Registers) -> int:
    """TDG.MR.REPORT. Order: alignments, REPORTDATA, subtype, and the report's address last. Both may be shared."""
    report, data = regs.rcx, regs.rdx
    if report % _REPORT_ALIGNMENT:
        return TDX_OPERAND_INVALID | OperandId.RCX
    if not td.operands.is_valid(data, _DATA_ALIGNMENT, may_be_shared=True):
        return TDX_OPERAND_INVALID | OperandId.RDX
    report_data = td.operands.read(data, _REPORTDATA_SIZE)
    if regs.r8:
        return TDX_OPERAND_INVALID | OperandId.R8
    if not td.operands.is_valid(report, _REPORT_ALIGNMENT, may_be_shared=True):
        return TDX_OPERAND_INVALID | OperandId.RCX
    td.operands.write(report, build_report(td, report_data))
    return TDX_SUCCESS


def mr_verifyreport(td: Td, regs: Registers) -> int:
    """TDG.MR.VERIFYREPORT."""
    if not td.operands.is_valid(regs.rcx, _MAC_ALIGNMENT):
        return TDX_OPERAND_INVALID | OperandId.RCX
    data = td.operands.read(regs.rcx, _MAC_STRUCT_SIZE)
    mac = REPORTMACSTRUCT.parse(data)
    if mac.CpuSvn != CPUSVN:
        return TDX_INVALID_CPUSVN
    genuine = mac.ReportType.Type == REPORT_TYPE_TDX and hmac.compare_digest(_mac(data), mac.Mac)
    return TDX_SUCCESS if genuine else TDX_INVALID_REPORTMACSTRUCT


def build_report(td: Td, report_data: bytes) -> bytes:
    """A TDREPORT_STRUCT over what the TD is now."""
    digest = bytes(DIGEST_SIZE)
    tcb_info = TEE_TCB_INFO.build(
        {
            "Valid": _VALID, "TeeTcbSvn": bytes(16), "MrSeam": digest, "MrSignerSeam": digest, "Attributes": 0,
            "TeeTcbSvn2": bytes(16), "Reserved": bytes(95),
        }
    )  # fmt: skip
    td_info = TDINFO_STRUCT.build(
        {
            "Attributes": td.config.attributes, "Xfam": XFAM_X87_SSE, "MrTd": td.measurement.mrtd,
            "MrConfigId": digest, "MrOwner": digest, "MrOwnerConfig": digest, "Rtmr": b"".join(td.measurement.rtmr),
            "ServTdHash": digest, "Reserved": bytes(64),
        }
    )  # fmt: skip
    unsigned = REPORTMACSTRUCT.build(
        {
            "ReportType": {"Type": REPORT_TYPE_TDX, "SubType": 0, "Version": 0, "Reserved": 0},
            "Reserved1": bytes(12), "CpuSvn": CPUSVN, "TeeTcbInfoHash": hashlib.sha384(tcb_info).digest(),
            "TeeInfoHash": hashlib.sha384(td_info).digest(), "ReportData": report_data, "Reserved2": bytes(32),
            "Mac": bytes(_MAC_SIZE),
        }
    )  # fmt: skip
    return unsigned[:-_MAC_SIZE] + _mac(unsigned) + tcb_info + bytes(17) + td_info


def _mac(report_mac: bytes) -> bytes:
    """MAC over a REPORTMACSTRUCT without its last field."""
    return hmac.digest(PUBLIC_KEY, report_mac[:-_MAC_SIZE], "sha256")
