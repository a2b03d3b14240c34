"""#VE information: stored by an exit, read once by TDG.VP.VEINFO.GET."""

from __future__ import annotations

import pytest

from guest.registers import Registers
from tdx.module import TdxModule
from tdx.status import status_name
from tdx.ve import VECTOR_DF, VECTOR_VE, ExitReason, VeInfo, io_qualification

VEINFO_GET = 3
NO_VALID_VE_INFO = 0xC000_0704_0000_0000
CPUID = VeInfo(ExitReason.CPUID, 0, 2)
OUT = VeInfo(ExitReason.IO_INSTRUCTION, io_qualification(0x3F8, 1, is_in=False), 1)


def veinfo_get(module: TdxModule) -> Registers:
    regs = Registers(rax=VEINFO_GET, rcx=1, rdx=2, r8=3, r9=4, r10=5, r11=6)
    module.tdcall(regs)
    return regs


def test_veinfo_is_read_once(module: TdxModule) -> None:
    """The first call returns what was stored; the second has NO_VALID_VE_INFO and zeros."""
    info = VeInfo(ExitReason.IO_INSTRUCTION, 0x3F8_0008, 2, gla=0x1111, gpa=0x2222)
    assert module.inject_ve(info) == VECTOR_VE
    assert veinfo_get(module) == Registers(rax=0, rcx=30, rdx=0x3F8_0008, r8=0x1111, r9=0x2222, r10=2, r11=6)
    assert veinfo_get(module) == Registers(rax=NO_VALID_VE_INFO, r11=6)
    assert status_name(NO_VALID_VE_INFO) == "TDX_NO_VALID_VE_INFO"


def test_a_second_ve_before_the_first_was_read_is_a_double_fault(module: TdxModule) -> None:
    """While VE information is valid another exit gives #DF, and the information stays that of the first."""
    assert module.inject_ve(CPUID) == VECTOR_VE == 20
    assert module.inject_ve(OUT) == VECTOR_DF == 8
    assert veinfo_get(module).rcx == ExitReason.CPUID
    assert module.inject_ve(OUT) == VECTOR_VE


@pytest.mark.parametrize(
    "port, size, is_in, qualification",
    [
        (0x3F8, 1, False, 0x03F8_0000),
        (0x3FD, 1, True, 0x03FD_0008),
        (0xCF8, 4, False, 0x0CF8_0003),
        (0xFFFF, 2, True, 0xFFFF_0009),
    ],
)
def test_exit_qualification_of_io(port: int, size: int, is_in: bool, qualification: int) -> None:
    """Size less one, direction in bit 3, string in bit 4, port in the upper half."""
    assert io_qualification(port, size, is_in) == qualification
    assert io_qualification(port, size, is_in, is_string=True) == qualification | 0x10
