"""Run a real kernel image up to user space on the set-up of a recorded case, and write down what came of it.

The initrd is ours (``cpu.initrd``): its ``/init`` prints /proc/meminfo, touches 256 MiB, prints again, four times.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import dropwhile, islice, takewhile
from typing import Any

from bootstub.bzimage import parse_bzimage
from bootstub.kernel_layout import LOAD_PHYSICAL_ADDR
from bootstub.payload import decompress
from cpu.binding import RDI, RSI
from cpu.initrd import MEMINFO, build_initrd
from cpu.postmortem import guess_callers
from cpu.run import RealCode, RunOptions
from cpu.symbols import Symbols, read_kallsyms
from guest.errors import GuestPanic
from guest.trace import Print, Record
from guest.units import SZ_64K
from tdx.events import TdCall
from tdx.instructions import Instructions
from tools.conformance.record_stub import config_tables, map_rows
from tools.conformance.recorded_firmware import start_firmware
from tools.conformance.recorded_td import RecordedTd
from tools.conformance.unaccepted_table import read_table
from tools.report import ACCEPT

SET_UP = ("id", "name", "cmdline", "descs", "tdx_max_level", "until")
"""Fields of a case that say what is run; the others say what came of it. ``until``: see ``cpu.run.RunOptions``."""
TIMEOUT_INSTRUCTIONS = 1 << 33
_INITRD_SIZE = SZ_64K // 4
"""Bytes of the recorded initrd, whole pages. The kernel passes over zeros behind an archive."""
_PIC_MASKS = (0x21, 0xA1)
"""Ports by which a kernel sees that there are two 8259A; the recorded machine had as much of them."""
_STAMP = re.compile(r"^\[ *\d+\.\d+\] ")
_MEMINFO = re.compile(r"(MemTotal|MemFree|MemAvailable|Unaccepted): +(\d+) kB")
_ONCE = ("MemTotal", "MemAvailable")
"""Lines of /proc/meminfo that are kept the first time only."""
_FIRST_WITH_SIZE = (6, 12)
"""Since then, accept_memory() takes start and size; before, start and end."""
_CALLERS = 7
_STUB, _KERNEL = "efi-stub", "kernel"


def run_boot(case: dict[str, Any], image: bytes) -> dict[str, Any]:
    """Boot ``image``; returns the fields of a recorded case that say what came of it."""
    return _Run(case, image).run()


def record(case: dict[str, Any], image: bytes) -> dict[str, Any]:
    """A case with the set-up of ``case`` and what came of it here."""
    return {name: case[name] for name in SET_UP if name in case} | run_boot(case, image)


class _Run:
    def __init__(self, case: dict[str, Any], image: bytes) -> None:
        self._td = RecordedTd.of_boot(case)
        machine = self._td.machine
        machine.trace.stage = _STUB
        initrd = build_initrd().ljust(_INITRD_SIZE, b"\0")
        self._services, _ = start_firmware(self._td, case, image, initrd)
        options = RunOptions(until=case.get("until"), timeout=TIMEOUT_INSTRUCTIONS)
        self._code = RealCode(machine, self._td.physical, image, options)
        self._code.devices.latches |= dict.fromkeys(_PIC_MASKS, 0xFF)
        self._td.host.instructions = Instructions(self._code.devices)
        self._code.vcpu.tsc = self._td.noisy_rdtsc
        self._td.module.rip = lambda: self._code.vcpu.state.rip
        self._calls = _AcceptCalls(self._td, self._code, image)

    def run(self) -> dict[str, Any]:
        self._code.stub()
        table = dict(config_tables(self._services)).get("LINUX_UNACCEPTED_MEM_TABLE")
        pa, va = self._code.unpacked_for or (0, LOAD_PHYSICAL_ADDR)
        self._calls.watch(va - LOAD_PHYSICAL_ADDR)
        self._td.trace.stage = _KERNEL
        stop = self._run_kernel()
        lines = [_STAMP.sub("", r.event.text) for r in self._td.trace.records if isinstance(r.event, Print)]
        return {
            "stop": stop,
            "kernel_pa": pa,
            "kernel_va": va,
            "map_at_exit": map_rows(self._services.maps[-1]),
            "table": None if table is None else _at_end(read_table(self._td.physical, table)),
            "accept_stub": self._td.accepts(_STUB),
            "accept_kernel": self._td.accepts(_KERNEL),
            "accept_memory_calls": self._calls.accept_memory,
            "tdx_accept_memory_ranges": self._calls.tdx_accept_memory,
            "still_pending": self._td.still_pending(),
            "tdcalls": self._td.module.calls,
            "mapgpa_shared": [list(part) for part in self._td.host.shared],
            "memory_line": next((line for line in lines if line.startswith("Memory: ")), None),
            "e820": [line for line in lines if line.startswith("BIOS-e820: ")],
            "zones": _list_after(lines, "Zone ranges:"),
            "early_nodes": _list_after(lines, "Early memory node ranges"),
            "meminfo": list(_meminfo(lines)),
            "dmesg": "\n".join(r.event.text for r in self._td.trace.records if isinstance(r.event, Print)),
        }

    def _run_kernel(self) -> str:
        try:
            self._code.kernel()
        except GuestPanic as error:
            return f"panic: {error.text}"
        return "done"


class _AcceptCalls:
    """The calls of the kernel's accept_memory() and tdx_accept_memory(), with who called the first."""

    def __init__(self, td: RecordedTd, code: RealCode, image: bytes) -> None:
        self._code, self._tdcalls = code, 0
        td.trace.watchers.append(self._count)
        self._symbols, self._has_size = _symbols(image), _release(image) >= _FIRST_WITH_SIZE
        self.accept_memory: list[dict[str, Any]] = []
        self.tdx_accept_memory: list[list[int]] = []

    def watch(self, moved: int) -> None:
        """Look on from now on. ``moved`` is how far the kernel is from where it was linked, in virtual memory."""
        actions = {"accept_memory": self._on_accept_memory, "tdx_accept_memory": self._on_tdx_accept_memory}
        for name, action in actions.items():
            address = self._symbols.address(name)
            if address is not None:
                self._code.vcpu.break_at(address + moved, action)

    def _on_accept_memory(self) -> None:
        regs = self._code.vcpu.state.regs
        names = (self._symbols.name(word).partition("+")[0] for word in guess_callers(self._code.vcpu, self._symbols))
        self.accept_memory.append(
            {
                "start": regs[RDI],
                "size": regs[RSI] if self._has_size else regs[RSI] - regs[RDI],
                "by": list(islice(names, _CALLERS)),
                "tdcalls_before": self._tdcalls,
            }
        )

    def _count(self, record: Record) -> None:
        if isinstance(record.event, TdCall) and record.stage == _KERNEL and record.event.leaf == ACCEPT:
            self._tdcalls += record.event.count

    def _on_tdx_accept_memory(self) -> None:
        regs = self._code.vcpu.state.regs
        self.tdx_accept_memory.append([regs[RDI], regs[RSI]])


@lru_cache(maxsize=1)
def _symbols(image: bytes) -> Symbols:
    return read_kallsyms(decompress(parse_bzimage(image).payload(image))) or Symbols((), "", ())


def _release(image: bytes) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", parse_bzimage(image).kernel_version or "")
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _at_end(table: dict[str, Any]) -> dict[str, Any]:
    return {name: table[name] for name in ("pa", "unit_size", "phys_base", "size")} | {"bits_at_end": table["bits"]}


def _list_after(lines: list[str], title: str) -> list[str]:
    """The indented lines that follow ``title``."""
    after = islice(dropwhile(lambda line: line != title, lines), 1, None)
    return list(takewhile(lambda line: line.startswith("  "), after))


def _meminfo(lines: list[str]) -> Iterator[list[Any]]:
    """What ``/init`` saw in /proc/meminfo."""
    times = 0
    for line in lines:
        times += line == MEMINFO
        found = _MEMINFO.match(line)
        if found and (times == 1 or found[1] not in _ONCE):
            yield [found[1], int(found[2])]
