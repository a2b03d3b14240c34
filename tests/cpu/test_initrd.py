import io
import mmap
import re
import struct

import pytest
from elftools.elf.elffile import ELFFile

from cpu.binding import RAX, RDI, RDX, RSI, RSP, Engine
from cpu.initrd import DONE, INTERRUPTS, MEMINFO, START, CpioFile, build_initrd, cpio_newc
from guest.trace import Print
from guest.units import SZ_1M, SZ_4G
from tools.pipeline import Boot, BootConfig

NEWC_FIELDS = (
    "ino", "mode", "uid", "gid", "nlink", "mtime", "filesize",
    "maj", "min", "rmaj", "rmin", "namesize", "chksum",
)  # fmt: skip


SHORT_CUTS = "swiotlb=512 cryptomgr.notests initcall_blacklist=jent_mod_init"
"""What the kernel need not do here: clear a bounce buffer of 512 MiB, and test its ciphers and its entropy."""


SLEEP_MS = 100


def unpack_newc(archive):
    """Slow and obvious: the entries of an archive, as buffer-format.rst has them."""
    at, entries = 0, []
    while at < len(archive):
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        values = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        entry = dict(zip(NEWC_FIELDS, values, strict=True))
        name_end = at + 110 + entry["namesize"]
        assert archive[name_end - 1] == 0
        entry["name"] = archive[at + 110 : name_end - 1].decode()
        start = (name_end + 3) & ~3
        entry["data"] = archive[start : start + entry["filesize"]]
        at = (start + entry["filesize"] + 3) & ~3
        entries.append(entry)
    return entries


def init_of(touches, size, sleep_ms=0):
    return next(e["data"] for e in unpack_newc(build_initrd(touches, size, sleep_ms)) if e["name"] == "init")


def test_archive_can_be_unpacked():
    """What goes into an archive comes out of it, with modes and device numbers, and a trailer at the end."""
    files = [
        CpioFile("d", 0o040755),
        CpioFile("d/c", 0o020600, rdev_major=5, rdev_minor=1),
        CpioFile("f", 0o100644, b"12345"),
    ]
    entries = unpack_newc(cpio_newc(files))
    assert [e["name"] for e in entries] == ["d", "d/c", "f", "TRAILER!!!"]
    assert [e["mode"] for e in entries] == [0o040755, 0o020600, 0o100644, 0]
    assert [(e["rmaj"], e["rmin"]) for e in entries] == [(0, 0), (5, 1), (0, 0), (0, 0)]
    assert entries[2]["data"] == b"12345"
    assert [e["ino"] for e in entries] == [1, 2, 3, 4]


def test_initrd_has_what_the_kernel_opens():
    """The archive has /init, the console that the kernel opens for it, the log, and a place for /proc."""
    entries = {e["name"]: e for e in unpack_newc(build_initrd())}
    assert (entries["dev/console"]["rmaj"], entries["dev/console"]["rmin"]) == (5, 1)
    assert (entries["dev/kmsg"]["rmaj"], entries["dev/kmsg"]["rmin"]) == (1, 11)
    assert entries["proc"]["mode"] == 0o040755
    assert entries["init"]["mode"] == 0o100755


def test_initrd_repeats():
    """The same arguments give the same bytes, others do not."""
    assert build_initrd(2, SZ_1M) == build_initrd(2, SZ_1M)
    assert build_initrd(2, SZ_1M) != build_initrd(3, SZ_1M)


@pytest.mark.parametrize("arguments", [(-1, SZ_1M), (1001, SZ_1M), (1, 0), (1, SZ_1M + 4096), (1, -SZ_1M)])
def test_wrong_arguments(arguments):
    """A count out of range, and sizes that are not whole MiB, are refused."""
    with pytest.raises(ValueError, match="expected 0 to 1000"):
        build_initrd(*arguments)


@pytest.mark.parametrize("sleep_ms", [-1, 3_600_001])
def test_a_sleep_out_of_range(sleep_ms):
    """A sleep of less than nothing, or of more than an hour, is refused."""
    with pytest.raises(ValueError, match="expected 0 to 3600000"):
        build_initrd(1, SZ_1M, sleep_ms)


def test_init_is_a_static_executable():
    """/init is an x86-64 executable of two read-only segments, entered inside its code."""
    elf = ELFFile(io.BytesIO(init_of(1, SZ_1M)))
    assert (elf["e_type"], elf["e_machine"]) == ("ET_EXEC", "EM_X86_64")
    code, strings = elf.iter_segments()
    assert (code["p_flags"], strings["p_flags"]) == (5, 4)
    assert code["p_vaddr"] <= elf["e_entry"] < code["p_vaddr"] + code["p_filesz"]
    for segment in (code, strings):
        assert segment["p_offset"] % segment["p_align"] == segment["p_vaddr"] % segment["p_align"]


class User:
    """A process without a kernel: system calls are recorded, and answered as in a quiet world."""

    STACK, HEAP, SIZE = 0x1F_0000, 0x80_0000, 0x200_0000
    MEMINFO = b"MemTotal: 3 kB\nUnaccepted: 2 kB\n"
    INTERRUPTS = b"CPU0\nLOC: 1\n"

    def __init__(self, executable):
        self.calls, self.messages = [], []
        self.heap = self.HEAP
        self.engine = Engine()
        self.memory = mmap.mmap(-1, self.SIZE)
        self.engine.map(0, memoryview(self.memory))
        elf = ELFFile(io.BytesIO(executable))
        for segment in elf.iter_segments():
            self.memory[segment["p_vaddr"] : segment["p_vaddr"] + segment["p_filesz"]] = segment.data()
        self.engine.uc.hook_add(
            self.engine.unicorn.UC_HOOK_INSN, self.on_syscall, aux1=self.engine.const.UC_X86_INS_SYSCALL
        )
        self.engine.state.regs[RSP] = self.STACK
        self.engine.run(elf["e_entry"])

    def text(self, address):
        return self.memory[address : self.memory.find(b"\0", address)].decode()

    def on_syscall(self, uc, data):
        regs = self.engine.state.regs
        answer = getattr(self, f"sys_{regs[RAX]}")(regs)
        regs[RAX] = 0 if answer is None else answer
        regs[1] = regs[11] = 0xBAD  # RCX and R11 are spoiled

    def sys_165(self, regs):
        self.calls.append(f"mount {self.text(regs[RSI])} {self.text(regs[RDX])}")

    def sys_2(self, regs):
        self.calls.append(f"open {self.text(regs[RDI])}")
        return {"/dev/kmsg": 3, "/proc/meminfo": 4, "/proc/interrupts": 5}[self.text(regs[RDI])]

    def sys_3(self, regs):
        self.calls.append(f"close {regs[RDI]}")

    def sys_0(self, regs):
        text = {4: self.MEMINFO, 5: self.INTERRUPTS}[regs[RDI]]
        self.memory[regs[RSI] : regs[RSI] + len(text)] = text
        return len(text)

    def sys_35(self, regs):
        seconds, ns = struct.unpack_from("<QQ", self.memory, regs[RDI])
        assert regs[RSI] == 0
        self.calls.append(f"sleep {seconds} s {ns} ns")

    def sys_1(self, regs):
        assert regs[RDI] == 3
        self.messages.append(self.memory[regs[RSI] : regs[RSI] + regs[RDX]].decode())

    def sys_9(self, regs):
        assert (regs[RDI], regs[RDX], regs[10], regs[9]) == (0, 3, 0x22, 0)
        self.calls.append(f"mmap {regs[RSI]:#x}")
        self.heap += regs[RSI]
        return self.heap - regs[RSI]

    def sys_169(self, regs):
        assert (regs[RDI], regs[RSI]) == (0xFEE1DEAD, 672274793)
        self.calls.append(f"reboot {regs[RDX]:#x}")
        self.engine.stop()


def test_init_says_what_it_does():
    """/init mounts /proc, logs one line at a time, takes memory as often as it should, and halts the machine."""
    user = User(init_of(2, SZ_1M))
    meminfo = [f"{MEMINFO}\n", "MemTotal: 3 kB\n", "Unaccepted: 2 kB\n"]
    assert user.messages == [
        f"{START}\n", *meminfo,
        "unaccepted-init: touched 1 MiB\n", *meminfo,
        "unaccepted-init: touched 2 MiB\n", *meminfo,
        f"{DONE}\n",
    ]  # fmt: skip
    ask = ["open /proc/meminfo", "close 4"]
    assert user.calls == [
        "mount /proc proc", "open /dev/kmsg", *ask, "mmap 0x100000", *ask, "mmap 0x100000", *ask, "reboot 0xcdef0123"
    ]  # fmt: skip


def test_init_sleeps_between_two_looks_at_the_interrupts():
    """If it is to sleep, /init logs /proc/interrupts, sleeps for that long, and logs it again."""
    user = User(init_of(0, SZ_1M, 2100))
    interrupts = [f"{INTERRUPTS}\n", "CPU0\n", "LOC: 1\n"]
    assert user.messages[1:7] == [*interrupts, *interrupts]
    ask = ["open /proc/interrupts", "close 5"]
    assert user.calls[2:7] == [*ask, "sleep 2 s 100000000 ns", *ask]


def test_init_touches_every_page():
    """One byte of each page of the memory is written, and nothing behind it."""
    user = User(init_of(3, 2 * SZ_1M))
    heap = user.memory[User.HEAP :]
    assert heap[: 6 * SZ_1M : 4096] == b"\1" * (6 * 256)
    assert heap.count(1) == 6 * 256


def test_real_kernel_runs_init(debian_kernel):
    """Debian's kernel comes to /init, which sleeps while the timer interrupts; memory it touches gets accepted.

    What the kernel says of its local APIC is sane: a TSC deadline timer, and nothing missing.
    """
    config = BootConfig(
        debian_kernel.read_bytes(),
        memory=SZ_4G,
        initrd=build_initrd(2, 320 * SZ_1M, SLEEP_MS),
        cmdline=f"nokaslr console=ttyS0 printk.devkmsg=on {SHORT_CUTS}",
        run="kernel",
        until=DONE,
    )
    boot = Boot(config)
    boot.run()
    lines = [r.event.text for r in boot.trace.records if isinstance(r.event, Print)]
    assert "EFI stub: Loaded initrd from LINUX_EFI_INITRD_MEDIA_GUID device path" in lines
    assert [re.sub(r"^\[.*?\] ", "", line) for line in lines if "unaccepted-init: t" in line] == [
        "unaccepted-init: touched 320 MiB",
        "unaccepted-init: touched 640 MiB",
    ]
    unaccepted = [int(line.split()[-2]) for line in lines if "Unaccepted: " in line]
    assert len(unaccepted) == 3
    assert 0 < unaccepted[2] < unaccepted[0] <= SZ_4G >> 10
    at = [number for number, line in enumerate(lines) if INTERRUPTS in line]
    before, after = (float(re.match(r"\[ *(.*?)\]", lines[number])[1]) for number in at)
    assert SLEEP_MS / 1000 <= after - before < 2 * SLEEP_MS / 1000
    timer = [int(line.split("LOC:")[1].split()[0]) for line in lines if "LOC:" in line]
    assert 0 < timer[0] < timer[1] <= sum(boot.real_code.vcpu.interrupts.delivered.values())
    assert any(line.endswith("TSC deadline timer available") for line in lines)
    assert not any(text in line for line in lines for text in ("No local APIC", "Failed to register legacy timer"))
