"""TDREPORT_STRUCT: its layout against a table typed by hand, and the leaves that make and check it."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from guest.errors import MemoryFault
from guest.records import offsets
from guest.registers import Registers
from tdx.report import REPORTMACSTRUCT, TDINFO_STRUCT, TDREPORT_STRUCT, TEE_TCB_INFO

PAGE, SHARED = 0x5000, 1 << 51
REPORT, DATA = PAGE, PAGE + 0x800
MR_REPORT, VERIFYREPORT = 4, 22
INVALID = 0xC000_0100_0000_0000
INVALID_CPUSVN, INVALID_REPORTMACSTRUCT = 0xC000_1000_0000_0000, 0xC000_1001_0000_0000

LAYOUTS = [
    (REPORTMACSTRUCT, 256, [
        ("ReportType", 0), ("Reserved1", 4), ("CpuSvn", 16), ("TeeTcbInfoHash", 32), ("TeeInfoHash", 80),
        ("ReportData", 128), ("Reserved2", 192), ("Mac", 224),
    ]),
    (TEE_TCB_INFO, 239, [
        ("Valid", 0), ("TeeTcbSvn", 8), ("MrSeam", 24), ("MrSignerSeam", 72), ("Attributes", 120),
        ("TeeTcbSvn2", 128), ("Reserved", 144),
    ]),
    (TDINFO_STRUCT, 512, [
        ("Attributes", 0), ("Xfam", 8), ("MrTd", 16), ("MrConfigId", 64), ("MrOwner", 112), ("MrOwnerConfig", 160),
        ("Rtmr", 208), ("ServTdHash", 400), ("Reserved", 448),
    ]),
    (TDREPORT_STRUCT, 1024, [("ReportMac", 0), ("TeeTcbInfo", 256), ("Reserved", 495), ("TdInfo", 512)]),
]  # fmt: skip


@pytest.mark.parametrize("record, size, fields", LAYOUTS, ids=["mac", "tcb", "td", "report"])
def test_layout(record, size, fields) -> None:
    """Each structure has the size and the offsets of the specification."""
    found = {name: at for name, at in offsets(record).items() if "." not in name}
    assert (record.sizeof(), found) == (size, dict(fields))


def call(td, leaf: int, **regs: int) -> int:
    """One TDCALL; returns RAX. No other register changes."""
    found = Registers(rax=leaf, **regs)
    td.module.tdcall(found)
    assert found == Registers(rax=found.rax, **regs)
    return found.rax


@pytest.fixture
def td(make_td):
    """A TD whose pages at PAGE and behind are accepted, RTMR1 extended, with report data in place."""
    td = make_td()
    for page in (PAGE, PAGE + 0x1000):
        td.module.tdcall(Registers(rax=6, rcx=page))
    assert call(td, 2, rcx=PAGE + 0x1000, rdx=1) == 0
    td.machine.memory.write(DATA, b"nonce".ljust(64, b"."))
    return td


def test_a_report_holds_what_was_measured(td) -> None:
    """Hashes cover the two info structures, the MAC covers the rest with a key that is public."""
    assert call(td, MR_REPORT, rcx=REPORT, rdx=DATA) == 0
    report = td.machine.memory.read(REPORT, 1024)
    assert report[:16] == b"\x81".ljust(16, b"\0")
    assert report[16:32] == b"not genuine TDX!"
    assert report[32:80] == hashlib.sha384(report[256:495]).digest()
    assert report[80:128] == hashlib.sha384(report[512:]).digest()
    assert report[128:192] == b"nonce".ljust(64, b".")
    assert report[224:256] == hmac.digest(b"unaccepted: this report is not genuine", report[:224], "sha256")
    assert report[512:528] == (1 << 28).to_bytes(8, "little") + (3).to_bytes(8, "little")
    assert report[528:576] == td.module.measurement.mrtd == hashlib.sha384().digest()
    assert report[720:912] == b"".join(td.module.measurement.rtmr)
    assert report[768:816] == hashlib.sha384(bytes(96)).digest()


@pytest.mark.parametrize(
    "regs, status",
    [
        ({"rcx": REPORT + 512, "rdx": DATA}, INVALID | 1),
        ({"rcx": REPORT, "rdx": DATA + 32}, INVALID | 2),
        ({"rcx": REPORT, "rdx": 1 << 52 | DATA}, INVALID | 2),
        ({"rcx": REPORT, "rdx": DATA, "r8": 1}, INVALID | 8),
        ({"rcx": 1 << 52 | REPORT, "rdx": DATA, "r8": 1}, INVALID | 8),  # the report's address comes last
        ({"rcx": 1 << 52 | REPORT, "rdx": DATA}, INVALID | 1),
        ({"rcx": REPORT + 512, "rdx": DATA + 32}, INVALID | 1),
    ],
)
def test_mr_report_refuses(td, regs, status) -> None:
    """Alignments are checked first, then REPORTDATA, the subtype, and where the report goes."""
    assert call(td, MR_REPORT, **regs) == status
    assert td.machine.memory.read(REPORT, 8) == bytes(8)


def test_a_report_may_go_to_shared_memory(td) -> None:
    """Both operands may be shared addresses that the host maps."""
    map_gpa = Registers(rax=0, rcx=0xFC00, r11=0x10001, r12=SHARED | 0x8000, r13=0x1000)
    td.module.tdcall(map_gpa)
    assert call(td, MR_REPORT, rcx=SHARED | 0x8000, rdx=DATA) == 0
    assert td.machine.memory.read(SHARED | 0x8000, 1) == b"\x81"


def test_a_report_into_memory_that_is_not_accepted_kills(td) -> None:
    """The leaf's write is the guest's write."""
    with pytest.raises(MemoryFault) as died:
        call(td, MR_REPORT, rcx=0x8000, rdx=DATA)
    assert (died.value.gpa, died.value.kind) == (0x8000, "write")


@pytest.mark.parametrize(
    "at, status",
    [
        (None, 0),
        (0, INVALID_REPORTMACSTRUCT),
        (1, INVALID_REPORTMACSTRUCT),
        (16, INVALID_CPUSVN),
        (31, INVALID_CPUSVN),
        (32, INVALID_REPORTMACSTRUCT),
        (80, INVALID_REPORTMACSTRUCT),
        (128, INVALID_REPORTMACSTRUCT),
        (223, INVALID_REPORTMACSTRUCT),
        (224, INVALID_REPORTMACSTRUCT),
        (255, INVALID_REPORTMACSTRUCT),
        (256, 0),  # behind REPORTMACSTRUCT: its hash is the reader's to check
    ],
)
def test_verifyreport_accepts_what_was_not_changed(td, at, status) -> None:
    """One changed bit of REPORTMACSTRUCT is found."""
    assert call(td, MR_REPORT, rcx=REPORT, rdx=DATA) == 0
    if at is not None:
        (byte,) = td.machine.memory.read(REPORT + at, 1)
        td.machine.memory.write(REPORT + at, bytes([byte ^ 1]))
    assert call(td, VERIFYREPORT, rcx=REPORT) == status


@pytest.mark.parametrize("gpa", [REPORT + 128, SHARED | REPORT, 1 << 52 | REPORT], ids=hex)
def test_verifyreport_refuses_an_address(td, gpa) -> None:
    """The structure must be aligned to 256 bytes and private."""
    assert call(td, VERIFYREPORT, rcx=gpa) == INVALID | 1
