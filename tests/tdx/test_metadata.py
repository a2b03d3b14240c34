"""TD metadata through TDG.VM.RD and TDG.VM.WR, and what PENDING_VE_DISABLE does to a touch of memory."""

from __future__ import annotations

import pytest

from guest.clock import CostTable, VirtualClock
from guest.errors import MemoryFault
from guest.memory import PhysicalMemory
from guest.ranges import RangeSet
from guest.registers import Registers
from guest.trace import Trace
from tdx.events import TdCall
from tdx.module import TdConfig, TdxModule
from tdx.sept import LEVEL_2M, SecureEpt
from tdx.status import status_name
from tdx.vmm import Host

VM_RD, VM_WR = 7, 8
ATTRIBUTES, XFAM, CONFIG_FLAGS, TD_CTLS = (0x1110_0003_0000_0000 + code for code in (0, 1, 0x16, 0x17))
NOTIFY_ENABLES_LINUX, NOTIFY_ENABLES = 0x9100_0000_0000_0010, 0x9110_0003_0000_0010
ID_INCORRECT, NOT_WRITABLE, VALUE_NOT_VALID = 0xC000_0C00_0000_0000, 0xC000_0C01_0000_0000, 0xC000_0C03_0000_0000
OPERAND_INVALID_RCX = 0xC000_0100_0000_0001
SEPT_VE_DISABLE = 1 << 28
ALL = (1 << 64) - 1
PENDING = 1 << 21


class Td:
    """A TD whose RAM from 2 MiB to 4 MiB is PENDING."""

    def __init__(self, **config: bool | int) -> None:
        td = TdConfig(**config)
        clock, sept, physical = VirtualClock(), SecureEpt(), PhysicalMemory()
        self.trace = Trace(clock)
        host = Host(physical, sept, self.trace, clock, CostTable(), RangeSet([(0, 1 << 24)]))
        self.module = TdxModule(physical, sept, host, self.trace, clock, CostTable(), td)
        sept.page_aug(PENDING, 2 * PENDING, LEVEL_2M)

    def read(self, field: int, rcx: int = 0) -> tuple[int, int]:
        regs = Registers(rax=VM_RD, rcx=rcx, rdx=field, r8=0x5A5A)
        self.module.tdcall(regs)
        return regs.rax, regs.r8

    def write(self, field: int, value: int, mask: int, rcx: int = 0) -> tuple[int, int]:
        regs = Registers(rax=VM_WR, rcx=rcx, rdx=field, r8=value, r9=mask)
        self.module.tdcall(regs)
        return regs.rax, regs.r8

    def touch(self) -> str:
        with pytest.raises(MemoryFault) as fault:
            self.module.admit(PENDING, 8, "read")
        return fault.value.end


@pytest.mark.parametrize(
    "config, field, value",
    [
        ({}, ATTRIBUTES, SEPT_VE_DISABLE),
        ({"sept_ve_disable": False}, ATTRIBUTES, 0),
        ({}, XFAM, 3),
        ({}, CONFIG_FLAGS, 0b01),
        ({"gpaw": 48}, CONFIG_FLAGS, 0b00),
        ({"flexible_pending_ve": True}, CONFIG_FLAGS, 0b11),
        ({}, TD_CTLS, 1),
        ({"sept_ve_disable": False}, TD_CTLS, 0),
        ({}, NOTIFY_ENABLES, 0),
        ({}, NOTIFY_ENABLES_LINUX, 0),
    ],
)
def test_fields_say_how_the_td_was_configured(config: dict[str, bool | int], field: int, value: int) -> None:
    """TDG.VM.RD returns the field's value, which follows from the TD's configuration."""
    assert Td(**config).read(field) == (0, value)


@pytest.mark.parametrize("bit", [*range(32, 34), *range(50, 55), 63])
def test_context_and_sizes_of_a_field_id_are_ignored(bit: int) -> None:
    """Element size, INC_SIZE, WRITE_MASK_VALID, context and NON_ARCH do not change which field is meant."""
    assert Td().read(ATTRIBUTES ^ 1 << bit) == (0, SEPT_VE_DISABLE)


@pytest.mark.parametrize("bit", [*range(24, 32), *range(34, 50), 55, 62])
def test_reserved_bits_and_sequences_are_refused(bit: int) -> None:
    """A reserved bit, LAST_ELEMENT_IN_FIELD or LAST_FIELD_IN_SEQUENCE gives METADATA_FIELD_ID_INCORRECT."""
    td = Td(flexible_pending_ve=True)
    assert td.read(ATTRIBUTES | 1 << bit) == (ID_INCORRECT, 0)
    assert td.write(TD_CTLS | 1 << bit, 0, 1) == (ID_INCORRECT, 0)


@pytest.mark.parametrize("field", [ALL, 0, ATTRIBUTES + 5, ATTRIBUTES + (1 << 56)], ids=hex)
def test_an_unknown_field_is_refused(field: int) -> None:
    """A class or field that is not there gives METADATA_FIELD_ID_INCORRECT and a value of 0."""
    assert Td().read(field) == (ID_INCORRECT, 0)
    assert Td().write(field, 0, ALL) == (ID_INCORRECT, 0)


def test_rcx_must_be_zero() -> None:
    """RCX is reserved for another VM's id: anything but 0 gives OPERAND_INVALID | RCX."""
    assert Td().read(ATTRIBUTES, rcx=1) == (OPERAND_INVALID_RCX, 0)
    assert Td().write(TD_CTLS, 1, 1, rcx=1) == (OPERAND_INVALID_RCX, 0)


@pytest.mark.parametrize("field", [ATTRIBUTES, XFAM, CONFIG_FLAGS], ids=hex)
def test_read_only_fields_are_not_written(field: int) -> None:
    """A field without a bit for the guest gives METADATA_FIELD_NOT_WRITABLE, even for the value it has."""
    td = Td()
    _, value = td.read(field)
    assert td.write(field, value, ALL) == (NOT_WRITABLE, 0)
    assert td.read(field) == (0, value)


def test_an_empty_mask_writes_nothing() -> None:
    """A write mask without a bit that the guest may change gives METADATA_FIELD_NOT_WRITABLE."""
    td = Td(flexible_pending_ve=True)
    assert td.write(TD_CTLS, 0, 0) == (NOT_WRITABLE, 0)
    assert td.write(TD_CTLS, 2, 2) == (NOT_WRITABLE, 0)
    assert td.read(TD_CTLS) == (0, 1)


def test_a_bit_that_is_not_the_guests_must_stay() -> None:
    """A mask may cover more bits than the guest may change, if those others keep their value."""
    td = Td(flexible_pending_ve=True)
    assert td.write(TD_CTLS, 0b10, 0b11) == (VALUE_NOT_VALID, 0)
    assert td.read(TD_CTLS) == (0, 1)
    assert td.write(TD_CTLS, 0, ALL) == (0, 1)
    assert td.read(TD_CTLS) == (0, 0)


def test_notify_enables_as_linux_clears_it() -> None:
    """Writing 0 with a full mask under Linux's id succeeds; R8 is the value before."""
    td = Td()
    assert td.write(NOTIFY_ENABLES, 1, 1) == (0, 0)
    assert td.write(NOTIFY_ENABLES_LINUX, 0, ALL) == (0, 1)
    assert td.read(NOTIFY_ENABLES) == (0, 0)


def test_pending_ve_is_the_hosts_without_flexible_pending_ve() -> None:
    """Without FLEXIBLE_PENDING_VE the guest may write PENDING_VE_DISABLE only as it is."""
    td = Td()
    assert td.write(TD_CTLS, 0, 1) == (VALUE_NOT_VALID, 0)
    assert td.write(TD_CTLS, 1, 1) == (0, 1)
    assert td.touch() == "EPT violation, TD exit"


def test_pending_ve_disable_steers_a_touch_of_pending_memory() -> None:
    """A PENDING page raises #VE or exits to the host, as TD_CTLS says at the time of the touch."""
    td = Td(sept_ve_disable=False, flexible_pending_ve=True)
    assert td.touch() == "#VE"
    assert td.write(TD_CTLS, 1, 1) == (0, 0)
    assert td.touch() == "EPT violation, TD exit"
    assert td.write(TD_CTLS, 0, 1) == (0, 1)
    assert td.touch() == "#VE"


def test_metadata_calls_are_in_the_trace() -> None:
    """Each call leaves an event with its name, and its status has a name."""
    td = Td()
    td.read(ATTRIBUTES)
    td.write(XFAM, 0, ALL)
    assert [record.event for record in td.trace.records] == [
        TdCall("TDG.VM.RD", 0, 0, 1), TdCall("TDG.VM.WR", 0, NOT_WRITABLE, 1),
    ]  # fmt: skip
    names = [status_name(status) for status in (ID_INCORRECT, NOT_WRITABLE, VALUE_NOT_VALID)]
    assert names == [f"TDX_METADATA_FIELD_{what}" for what in ("ID_INCORRECT", "NOT_WRITABLE", "VALUE_NOT_VALID")]
