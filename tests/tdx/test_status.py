"""Completion status words: value, name and fields, typed from the table of the fact sheet (section 3)."""

from __future__ import annotations

import pytest

from tdx import status as words
from tdx.status import OperandId, Status, StatusClass, decode_status, status_name

ERROR, NON_RECOVERABLE, FATAL, HINT = 8, 4, 2, 1
TABLE = [
    # value, name, bits 63:60, class, code
    (0x0000_0000_0000_0000, "TDX_SUCCESS", 0, 0, 0),
    (0x4000_0001_0000_0000, "TDX_NON_RECOVERABLE_VCPU", NON_RECOVERABLE, 0, 1),
    (0x6000_0002_0000_0000, "TDX_NON_RECOVERABLE_TD", NON_RECOVERABLE | FATAL, 0, 2),
    (0x8000_0003_0000_0000, "TDX_INTERRUPTED_RESUMABLE", ERROR, 0, 3),
    (0x8000_0004_0000_0000, "TDX_INTERRUPTED_RESTARTABLE", ERROR, 0, 4),
    (0xC000_0100_0000_0000, "TDX_OPERAND_INVALID", ERROR | NON_RECOVERABLE, 1, 0),
    (0xC000_0101_0000_0000, "TDX_OPERAND_ADDR_RANGE_ERROR", ERROR | NON_RECOVERABLE, 1, 1),
    (0x8000_0200_0000_0000, "TDX_OPERAND_BUSY", ERROR, 2, 0),
    (0x8000_0201_0000_0000, "TDX_PREVIOUS_TLB_EPOCH_BUSY", ERROR, 2, 1),
    (0x8000_0203_0000_0000, "TDX_RND_NO_ENTROPY", ERROR, 2, 3),
    (0x8000_0204_0000_0000, "TDX_OPERAND_BUSY_HOST_PRIORITY", ERROR, 2, 4),
    (0x9000_0205_0000_0000, "TDX_HOST_PRIORITY_BUSY_TIMEOUT", ERROR | HINT, 2, 5),
    (0xC000_0300_0000_0000, "TDX_PAGE_METADATA_INCORRECT", ERROR | NON_RECOVERABLE, 3, 0),
    (0xC000_0303_0000_0000, "TDX_PAGE_NOT_FREE", ERROR | NON_RECOVERABLE, 3, 3),
    (0xC000_0704_0000_0000, "TDX_NO_VALID_VE_INFO", ERROR | NON_RECOVERABLE, 7, 4),
    (0xC000_0B00_0000_0000, "TDX_EPT_WALK_FAILED", ERROR | NON_RECOVERABLE, 0xB, 0),
    (0xC000_0B01_0000_0000, "TDX_EPT_ENTRY_FREE", ERROR | NON_RECOVERABLE, 0xB, 1),
    (0xC000_0B02_0000_0000, "TDX_EPT_ENTRY_NOT_FREE", ERROR | NON_RECOVERABLE, 0xB, 2),
    (0xC000_0B03_0000_0000, "TDX_EPT_ENTRY_NOT_PRESENT", ERROR | NON_RECOVERABLE, 0xB, 3),
    (0xC000_0B04_0000_0000, "TDX_EPT_ENTRY_NOT_LEAF", ERROR | NON_RECOVERABLE, 0xB, 4),
    (0xC000_0B05_0000_0000, "TDX_EPT_ENTRY_LEAF", ERROR | NON_RECOVERABLE, 0xB, 5),
    (0xC000_0B06_0000_0000, "TDX_GPA_RANGE_NOT_BLOCKED", ERROR | NON_RECOVERABLE, 0xB, 6),
    (0x0000_0B07_0000_0000, "TDX_GPA_RANGE_ALREADY_BLOCKED", 0, 0xB, 7),
    (0xC000_0B08_0000_0000, "TDX_TLB_TRACKING_NOT_DONE", ERROR | NON_RECOVERABLE, 0xB, 8),
    (0xC000_0B09_0000_0000, "TDX_EPT_INVALID_PROMOTE_CONDITIONS", ERROR | NON_RECOVERABLE, 0xB, 9),
    (0x0000_0B0A_0000_0000, "TDX_PAGE_ALREADY_ACCEPTED", 0, 0xB, 0xA),
    (0xC000_0B0B_0000_0000, "TDX_PAGE_SIZE_MISMATCH", ERROR | NON_RECOVERABLE, 0xB, 0xB),
    (0xC000_0B0C_0000_0000, "TDX_GPA_RANGE_BLOCKED", ERROR | NON_RECOVERABLE, 0xB, 0xC),
    (0xC000_0B0D_0000_0000, "TDX_EPT_ENTRY_STATE_INCORRECT", ERROR | NON_RECOVERABLE, 0xB, 0xD),
    (0xC000_0B0F_0000_0000, "TDX_L2_SEPT_WALK_FAILED", ERROR | NON_RECOVERABLE, 0xB, 0xF),
    (0xC000_0B11_0000_0000, "TDX_PAGE_ATTR_INVALID", ERROR | NON_RECOVERABLE, 0xB, 0x11),
    (0xC000_0C00_0000_0000, "TDX_METADATA_FIELD_ID_INCORRECT", ERROR | NON_RECOVERABLE, 0xC, 0),
    (0xC000_0C01_0000_0000, "TDX_METADATA_FIELD_NOT_WRITABLE", ERROR | NON_RECOVERABLE, 0xC, 1),
    (0xC000_0C02_0000_0000, "TDX_METADATA_FIELD_NOT_READABLE", ERROR | NON_RECOVERABLE, 0xC, 2),
    (0xC000_0C03_0000_0000, "TDX_METADATA_FIELD_VALUE_NOT_VALID", ERROR | NON_RECOVERABLE, 0xC, 3),
    (0x0000_0C0B_0000_0000, "TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT", 0, 0xC, 0xB),
    (0xC000_1000_0000_0000, "TDX_INVALID_CPUSVN", ERROR | NON_RECOVERABLE, 0x10, 0),
    (0xC000_1001_0000_0000, "TDX_INVALID_REPORTMACSTRUCT", ERROR | NON_RECOVERABLE, 0x10, 1),
]


@pytest.mark.parametrize("value, name, flags, status_class, code", TABLE, ids=[row[1] for row in TABLE])
@pytest.mark.parametrize("details", [0, 1, 0xFFFF_FFFF])
def test_a_status_word(value, name, flags, status_class, code, details):
    """Each word has its value and name, and comes apart into flags, class, code and details."""
    assert getattr(words, name) == value
    assert status_name(value | details) == name
    bits = [bool(flags & bit) for bit in (ERROR, NON_RECOVERABLE, FATAL, HINT)]
    assert decode_status(value | details) == Status(*bits, status_class, code, details)


def test_every_word_of_the_module_stands_in_the_table():
    """No word is defined that this table does not check, but for OP_STATE_INCORRECT, which the sheet leaves out."""
    names = {name for name in vars(words) if name.startswith("TDX_")}
    assert names - {row[1] for row in TABLE} == {"TDX_OP_STATE_INCORRECT"}
    assert words.TDX_OP_STATE_INCORRECT == 0xC000_0608_0000_0000


def test_an_unknown_word_is_a_number():
    """A word without a name prints as hex, with its details."""
    assert status_name(0xC000_0BFF_0000_0001) == "0xc0000bff00000001"


def test_operands_and_classes_have_the_numbers_of_the_specification():
    """Registers count as they are encoded; objects of the module have numbers of their own."""
    assert [OperandId[name].value for name in ("RAX", "RCX", "RDX", "RBX", "RSI", "R8", "R15")] == [
        0,
        1,
        2,
        3,
        6,
        8,
        15,
    ]
    assert (OperandId.SEPT_TREE, OperandId.SEPT_ENTRY, OperandId.RTMR, OperandId.TD_EPOCH) == (146, 147, 168, 169)
    assert OperandId.METADATA_FIELD == 176
    assert (StatusClass.SEPT, StatusClass.METADATA_FIELD, StatusClass.REPORT, StatusClass.L2) == (0xB, 0xC, 0x10, 0x11)
