"""What a boot did, as text and as JSON: its events, its log, its table of stages. Both come from the same values."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

from bootstub.events import KaslrChoice, KernelPlaced, PagingLevels
from firmware.efi_types import status_name as efi_status_name
from guest.trace import Event, Note, Print, Record, ServiceCall, StageBegin, StageEnd
from guest.units import size_text
from kernel.events import (
    Allocation,
    CommandResult,
    EndlessReclaim,
    FileRead,
    FileWrite,
    MemoryAdded,
    MemoryRead,
    MmPageAllocExtfrag,
    OutOfMemory,
    ParallelAllocation,
    Taken,
)
from tdx.events import AcceptInterrupted, FaultInjected, Finding, PageAdd, SeamCall, TdCall, TdExit, TdVmCall
from tdx.seamcall import SeamLeaf
from tdx.status import status_name
from tools.pipeline import KERNEL_STAGES
from tools.report import StageSummary

_LEVELS = ("4K", "2M", "1G", "512G", "256T")
_SCRIPT_EVENTS = (
    FileWrite | Allocation | ParallelAllocation | MemoryRead | MemoryAdded | CommandResult
    | Taken | OutOfMemory | EndlessReclaim
)  # fmt: skip
_AUG = SeamLeaf.TDH_MEM_PAGE_AUG.spec_name


def event_text(event: Event) -> str:
    """One event in one line, in the words of the specification it belongs to."""
    match event:
        case Print() | Note() | FaultInjected() | Finding():
            return event.text
        case ServiceCall(service, args, status):
            return f"{service}({', '.join(f'{arg:#x}' for arg in args)}) = {efi_status_name(status)}"
        case KernelPlaced(physical, virtual, segments):
            return f"kernel at {physical:#x}, {segments} segments, virtual offset {virtual:#x}"
        case KaslrChoice(areas, align, size, _):
            return f"KASLR: {event.slots} places in {len(areas)} areas, {align:#x} apart, for {size:#x} bytes"
        case PagingLevels(levels, la57):
            return f"page tables of {levels} levels, processor {'with' if la57 else 'without'} LA57"
        case StageBegin():
            return "stage begins"
        case StageEnd():
            return "stage ends"
        case _:
            return _kernel_event_text(event)


def _kernel_event_text(event: Event) -> str:
    """The same for the events of our kernel."""
    match event:
        case FileRead(path, text):
            return f"cat {path}: {len(text)} characters"
        case FileWrite(path, text, result):
            return f"echo {text} > {path}: {result}"
        case Allocation(order, count, wanted, accepted_pages):
            return f"alloc order {order}: {count} of {wanted} blocks, {accepted_pages * 4} KiB accepted"
        case MmPageAllocExtfrag():
            return f"mm_page_alloc_extfrag: {event.text}"
        case OutOfMemory(gfp, order, victim, pages):
            killed = f"killed process {victim}" if victim else "nobody to kill"
            return f"out of memory: gfp_mask={gfp:#x}, order={order}, {pages * 4} KiB unaccepted: {killed}"
        case EndlessReclaim(who, rounds, reclaimed, pages):
            what = f"{rounds} rounds, {reclaimed} pages reclaimed, {pages * 4} KiB unaccepted"
            return f"endless reclaim: {who}, {what}: it would go on for ever"
        case Taken(who, taken, wanted, pages, killed):
            end = ", killed" if killed else ""
            return f"{who}: {taken * 4} of {wanted * 4} KiB, {pages * 4} KiB accepted{end}"
        case ParallelAllocation() | MemoryRead() | MemoryAdded() | CommandResult():
            return _script_event_text(event)
        case _:
            return _tdx_event_text(event)


def _script_event_text(event: ParallelAllocation | MemoryRead | MemoryAdded | CommandResult) -> str:
    """What a command of stage runtime came to."""
    match event:
        case ParallelAllocation(cpus, order, count, wanted, pages, ns):
            done = f"{count} of {wanted} blocks, {pages * 4} KiB accepted"
            return f"on cpus {cpus} alloc order {order}: {done}, {ns / 1e6:.3f} ms"
        case MemoryRead("zeropad", ranges, _, zeros):
            return f"read zeropad: {ranges} blocks, {zeros} bytes padded with zeros"
        case MemoryRead(reader, _, touched, zeros):
            return f"read {reader}: {size_text(touched)} touched, zeros for {size_text(zeros)}"
        case MemoryAdded(start, end, accepted):
            return f"hotadd [mem {start:#018x}-{end - 1:#018x}]: {'accepted, ' if accepted else ''}online"
        case CommandResult(command, result, reason):
            name = f" {errno.errorcode[-result]}" if result < 0 else ""
            return f"{command}: {result}{name}{': ' if reason else ''}{reason}"


def _tdx_event_text(event: Event) -> str:
    """The same for the events of the TDX module and the host."""
    match event:
        case TdCall(leaf, rcx, status, count) | SeamCall(leaf, rcx, status, count):
            return f"{leaf} RCX={rcx:#x} x{count}: {status_name(status)}"
        case TdVmCall(sub_function, r12, r13, status):
            return f"TDG.VP.VMCALL<{sub_function}> R12={r12:#x} R13={r13:#x}: {status:#x}"
        case TdExit(gpa, level, count):
            return f"TD exit, EPT violation at {gpa:#x} x{count}, {_LEVELS[level]} pages"
        case AcceptInterrupted(gpa, progress):
            return f"TDG.MEM.PAGE.ACCEPT of {gpa:#x} interrupted after {progress} of 512 pieces"
        case PageAdd(start, end, what):
            return f"TDH.MEM.PAGE.ADD [{start:#x}, {end:#x}) {what}"
        case _:
            return repr(event)


class LogText:
    """Turns events into what a person at the console and in the log would have read.

    Lines of our own kernel stages carry the time since the kernel's entry, as dmesg has it; here it is virtual
    time. A real kernel stamps its lines itself.
    """

    def __init__(self) -> None:
        self._entry_ns: int | None = None

    def lines(self, record: Record) -> list[str]:
        """The lines of one event; most events have none."""
        event = record.event
        if self._entry_ns is None and record.stage in KERNEL_STAGES:
            self._entry_ns = record.ns
        if isinstance(event, Print):
            return [(_stamp(record.ns - self._entry_ns) if self._entry_ns is not None else "") + event.text]
        if isinstance(event, FileRead):
            return [f"# cat {event.path}", *event.text.splitlines()]
        if isinstance(event, _SCRIPT_EVENTS):
            return [f"# {event_text(event)}"]
        return []


def log_lines(records: Iterable[Record]) -> list[str]:
    """The log of a whole boot."""
    log = LogText()
    return [line for record in records for line in log.lines(record)]


def _stamp(ns: int) -> str:
    return f"[{ns // 1_000_000_000:5}.{ns // 1000 % 1_000_000:06}] "


def summary_rows(stages: Sequence[StageSummary]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table of stages, with a line of sums."""
    statuses = sorted({name for stage in stages for name in stage.tdcalls}, key=lambda n: (n != "TDX_SUCCESS", n))
    headers = [
        "stage",
        "added",
        "accepted",
        *(_short(s) for s in statuses),
        "TDVMCALL",
        "TD exits",
        "PAGE.AUG",
        "SEAMCALL",
        "virtual time",
    ]
    rows = [_row(stage.stage, [stage], statuses) for stage in stages]
    return headers, [*rows, _row("sum", stages, statuses)]


def _row(name: str, stages: Sequence[StageSummary], statuses: Sequence[str]) -> list[str]:
    return [
        name,
        _kib(sum(stage.added_bytes for stage in stages)),
        _kib(sum(stage.accepted_bytes for stage in stages)),
        *(str(sum(stage.tdcalls[status] for stage in stages)) for status in statuses),
        str(sum(stage.tdvmcalls for stage in stages)),
        str(sum(stage.td_exits for stage in stages)),
        str(sum(stage.seamcalls[_AUG] for stage in stages)),
        str(sum(stage.seamcalls.total() for stage in stages)),
        f"{sum(stage.ns for stage in stages) / 1e6:.3f} ms",
    ]


def _short(status: str) -> str:
    return "TDCALL ok" if status == "TDX_SUCCESS" else status.removeprefix("TDX_")


def _kib(size: int) -> str:
    return f"{size >> 10} KiB"


def summary_json(stages: Iterable[StageSummary]) -> list[dict[str, Any]]:
    """The table of stages as JSON values."""
    return [
        {
            "stage": stage.stage,
            "added_bytes": stage.added_bytes,
            "accepted_bytes": stage.accepted_bytes,
            "tdcalls": dict(sorted(stage.tdcalls.items())),
            "tdvmcalls": stage.tdvmcalls,
            "td_exits": stage.td_exits,
            "seamcalls": dict(sorted(stage.seamcalls.items())),
            "virtual_ns": stage.ns,
        }
        for stage in stages
    ]


def record_json(record: Record) -> dict[str, Any]:
    """One record of the trace as JSON values. Addresses are text: JSON readers lose the low bits of 64-bit numbers."""
    fields = {name: _json_value(name, value) for name, value in record.event.as_dict().items()}
    return {"number": record.number, "stage": record.stage, "ns": record.ns, "event": record.event.name} | fields


_ADDRESSES = frozenset({"rcx", "r12", "r13", "gpa", "start", "end", "status", "hash", "given"})


def _json_value(name: str, value: object) -> object:
    if isinstance(value, tuple):
        return [_json_value(name, item) if isinstance(item, tuple) else f"{item:#x}" for item in value]
    if isinstance(value, int) and not isinstance(value, Enum) and name in _ADDRESSES:
        return f"{value:#x}"
    return value
