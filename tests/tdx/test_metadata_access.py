"""Metadata of all three contexts through its leaves: field by field, step by step, and as a list."""

from __future__ import annotations

import hashlib
import struct

import pytest

from guest.registers import Registers

VM_RD, VM_RD_V1, VM_WR, VP_RD, VP_WR, SYS_RD, SYS_RDALL = 7, 1 << 16 | 7, 8, 9, 10, 11, 12
NULL = (1 << 64) - 1
INVALID, FIRST_FIELD = 0xC000_0100_0000_0000, 0x0000_0C0B_0000_0000
ID_INCORRECT, NOT_WRITABLE, NOT_READABLE, VALUE_NOT_VALID = (0xC000_0C00_0000_0000 | n << 32 for n in range(4))
EMPTY = hashlib.sha384().digest()
MRTD = [int.from_bytes(EMPTY[at : at + 8], "little") for at in range(0, 48, 8)]
LIST = 0x5000
SHARED = 1 << 51

TD_FIELDS = [
    # field id, value, as TDX 1.5.01 lists what a guest may read
    *((0x8010_0003_0000_0020 + n, 0) for n in range(4)),  # TD_UUID
    (0x9010_0002_0000_0001, 4),  # NUM_VCPUS
    (0x9010_0001_0000_0005, 0),  # NUM_L2_VMS
    (0x1110_0003_0000_0000, 1 << 28),  # ATTRIBUTES
    (0x1110_0003_0000_0001, 3),  # XFAM
    (0x1110_0002_0000_0002, 4),  # MAX_VCPUS
    (0x1110_0000_0000_0003, 1),  # GPAW
    (0x1110_0001_0000_000C, 40),  # TSC_FREQUENCY, in 25 MHz
    (0x9110_0003_0000_0010, 0),  # NOTIFY_ENABLES
    (0x9110_0003_0000_0016, 1),  # CONFIG_FLAGS
    (0x9110_0003_0000_0017, 1),  # TD_CTLS
    *((0x1310_0003_0000_0000 + n, MRTD[n]) for n in range(6)),
    *((0x1310_0003_0000_0010 + n, 0) for n in range(6)),  # MRCONFIGID
    *((0x1310_0003_0000_0018 + n, 0) for n in range(6)),  # MROWNER
    *((0x1310_0003_0000_0020 + n, 0) for n in range(6)),  # MROWNERCONFIG
    *((0x1310_0003_0000_0040 + n, 0) for n in range(24)),  # RTMR
]
VP_FIELDS = [(0xA020_0002_0000_0002, 0), (0xA020_0000_0000_0007, 0), (0xA020_0000_0000_0008, 0)]
SYS_FIELDS = [
    (0x0800_0002_0000_0000, 0x8086), (0x0800_0001_0000_0003, 5), (0x0800_0001_0000_0004, 1),
    (0x0A00_0002_0000_0000, 0), (0x0A00_0000_0000_0001, 1), (0x0A00_0003_0000_0008, 0),
]  # fmt: skip


@pytest.fixture
def td(make_td):
    """A TD with 4 VCPUs and one accepted page."""
    td = make_td(vcpus=4)
    td.module.tdcall(Registers(rax=6, rcx=LIST))
    return td


def call(td, leaf: int, **regs: int) -> tuple[int, int, int]:
    """RAX, RDX, R8."""
    found = Registers(rax=leaf, **regs)
    td.module.tdcall(found)
    return found.rax, found.rdx, found.r8


@pytest.mark.parametrize(
    "leaf, fields", [(VM_RD_V1, TD_FIELDS), (VP_RD, VP_FIELDS), (SYS_RD, SYS_FIELDS)], ids=["td", "vp", "sys"]
)
def test_a_guest_can_step_through_a_context(td, leaf, fields):
    """A null id gives the first field and a status that says so; each read gives the next id, null at the end."""
    status, field, value = call(td, leaf, rdx=NULL, r8=5)
    assert (status, value) == (FIRST_FIELD, 0)
    found = []
    while field != NULL and len(found) <= len(fields):
        status, following, value = call(td, leaf, rdx=field)
        assert status == 0
        found.append((field, value))
        field = following
    assert found == fields


@pytest.mark.parametrize("field, value", TD_FIELDS[::5])
def test_version_0_reads_the_same_and_leaves_rdx(td, field, value):
    """TDG.VM.RD, version 0, gives the value alone."""
    assert call(td, VM_RD, rdx=field) == (0, field, value)


@pytest.mark.parametrize(
    "leaf, regs, result",
    [
        (VM_RD, {"rdx": NULL}, (ID_INCORRECT, NULL, 0)),
        (VM_RD, {"rdx": 0x1110_0003_0000_0004}, (NOT_READABLE, 0x1110_0003_0000_0004, 0)),  # EPTP
        (VM_RD_V1, {"rdx": 0x1110_0003_0000_0004}, (NOT_READABLE, NULL, 0)),
        (VM_RD_V1, {"rdx": 0x1110_0003_0000_0000, "rcx": 1}, (INVALID | 1, NULL, 0)),
        (VM_RD_V1, {"rdx": NULL, "rcx": 1}, (INVALID | 1, NULL, 0)),
        (VM_RD_V1, {"rdx": 5}, (ID_INCORRECT, NULL, 0)),
        (VP_RD, {"rdx": 0xA020_0000_0000_0007, "rcx": 1}, (INVALID | 1, NULL, 0)),
        (VP_RD, {"rdx": 0x1110_0003_0000_0000}, (ID_INCORRECT, NULL, 0)),
        (VP_WR, {"rdx": 0xA020_0000_0000_0007, "r8": 1, "r9": 1, "rcx": 1}, (INVALID | 1, 0xA020_0000_0000_0007, 0)),
        (VP_WR, {"rdx": 0xA020_0002_0000_0002, "r8": 1, "r9": 1}, (NOT_WRITABLE, 0xA020_0002_0000_0002, 0)),
        (VP_WR, {"rdx": 0xA020_0000_0000_0007, "r8": 256, "r9": NULL}, (VALUE_NOT_VALID, 0xA020_0000_0000_0007, 0)),
        (SYS_RD, {"rdx": 0x0800_0002_0000_0000, "rcx": 1}, (0, 0x0800_0001_0000_0003, 0x8086)),  # RCX is free
        (SYS_RD, {"rdx": 0x0800_0002_0000_0001}, (ID_INCORRECT, NULL, 0)),
    ],
)
def test_what_is_refused(td, leaf, regs, result):
    """RCX, ids, and access rights, with the outputs that a failure leaves."""
    assert call(td, leaf, **regs) == result


def test_measurements_are_fields(td):
    """An RTMR that was extended reads so through TDG.VM.RD."""
    assert call(td, 2, rcx=LIST, rdx=3)[0] == 0
    words = [call(td, VM_RD, rdx=0x1310_0003_0000_0040 + 18 + n)[2] for n in range(6)]
    assert struct.pack("<6Q", *words) == hashlib.sha384(bytes(96)).digest()


@pytest.mark.parametrize("bits", [0b00, 0b01, 0b10, 0b11])
def test_cpuidve_set_is_two_fields(td, bits):
    """TDG.VP.CPUIDVE.SET writes what TDG.VP.RD reads, and then CPUID of that privilege is not the module's any more."""
    assert call(td, 5, rcx=bits)[0] == 0
    assert [call(td, VP_RD, rdx=0xA020_0000_0000_0007 + n)[2] for n in (0, 1)] == [bits & 1, bits >> 1]
    assert td.module.cpuid_is_native(1, 0, 0) is not bool(bits & 1)
    assert td.module.cpuid_is_native(1, 0, 3) is not bool(bits >> 1)
    assert td.module.cpuid(0x21) == ((0, 0, 0, 0) if bits & 1 else (0, 0x65746E49, 0x2020_2020, 0x5844_546C))


@pytest.mark.parametrize("rcx", [4, 1 << 63, NULL])
def test_cpuidve_set_refuses_reserved_bits(td, rcx):
    """Bits other than 0 and 1 of RCX give OPERAND_INVALID | RCX."""
    assert call(td, 5, rcx=rcx)[0] == INVALID | 1
    assert td.module.cpuid_is_native(1, 0, 0)


def test_cpuid_ve_by_metadata(td):
    """TDG.VP.WR does what TDG.VP.CPUIDVE.SET does, and gives the value before."""
    assert call(td, VP_WR, rdx=0xA020_0000_0000_0007, r8=1, r9=1)[::2] == (0, 0)
    assert not td.module.cpuid_is_native(1, 0, 0)
    assert call(td, VP_WR, rdx=0xA020_0000_0000_0007, r8=0, r9=1)[::2] == (0, 1)
    assert td.module.cpuid_is_native(1, 0, 0)


SEQUENCES = [
    (0x0800_0002_0000_0000, [0x8086]),
    (0x0800_0041_0000_0003, [5, 1]),  # two neighbours of one size: LAST_FIELD_IN_SEQUENCE is 1
    (0x0A00_0002_0000_0000, [0]),
    (0x0A00_0000_0000_0001, [1]),
    (0x0A00_0003_0000_0008, [0]),
]


@pytest.mark.parametrize("first, skipped", [(NULL, 0), (0x0800_0002_0000_0000, 0), (0x0A00_0002_0000_0000, 2)])
def test_sys_rdall_writes_a_list(td, first, skipped):
    """Header (bytes, sequences), then each sequence's header and values; R8 is null when all of it fitted."""
    assert call(td, SYS_RDALL, rdx=LIST, r8=first) == (0, LIST, NULL)
    body = b"".join(struct.pack(f"<{1 + len(v)}Q", header, *v) for header, v in SEQUENCES[skipped:])
    want = struct.pack("<HHI", 8 + len(body), 5 - skipped, 0) + body
    assert td.machine.memory.read(LIST, 0x1000) == want.ljust(0x1000, b"\0")


@pytest.mark.parametrize(
    "gpa, first, status",
    [
        (LIST + 8, NULL, INVALID | 2),
        (SHARED | LIST, NULL, INVALID | 2),
        (1 << 52 | LIST, NULL, INVALID | 2),
        (LIST, 5, ID_INCORRECT),
    ],
)
def test_sys_rdall_refuses(td, gpa, first, status):
    """The list is a private page, and the first field must be there; R8 is null."""
    assert call(td, SYS_RDALL, rdx=gpa, r8=first) == (status, gpa, NULL)
    assert td.machine.memory.read(LIST, 8) == bytes(8)
