"""Milestones of acceptance: what was accepted when the kernel printed its well-known lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from bootstub.sample_kernel import sample_bzimage
from guest.clock import VirtualClock
from guest.ranges import RangeSet
from guest.trace import Print, Trace
from guest.units import SZ_1G, SZ_2M
from tdx.events import PageAdd, TdCall
from tdx.status import TDX_SUCCESS
from tools.milestones import Acceptance, accepted_over_time, milestones
from tools.pipeline import Boot, BootConfig
from tools.report import ACCEPT, summarize
from tools.verdict import unaccepted_by_module

RAM = RangeSet([(0, SZ_1G)])
REFUSED = 0xC000_0B0B_0000_0000


def trace_of(*events: object, ns: int = 10) -> Trace:
    """A trace with ``ns`` between its events."""
    clock = VirtualClock()
    trace = Trace(clock)
    trace.stage = "kernel"
    for event in events:
        trace.add(event)  # type: ignore[arg-type]
        clock.advance(ns)
    return trace


def test_sums_at_each_line() -> None:
    """A milestone has the sums of what came before its line; the host's pages, refused calls and RAM count rightly."""
    trace = trace_of(
        PageAdd(0, SZ_2M, "firmware"),
        PageAdd(4 * SZ_1G, 4 * SZ_1G + SZ_2M, "no RAM"),
        Print("BIOS-e820: [mem 0x0-0x1] usable"),
        TdCall(ACCEPT, SZ_2M | 1, TDX_SUCCESS, 3),
        TdCall(ACCEPT, SZ_2M | 1, REFUSED, 1),
        TdCall("TDG.VP.INFO", 0, TDX_SUCCESS, 1),
        Print("[    0.000000] Zone ranges:"),
    )
    found = milestones(trace.records, RAM)
    assert [each.name for each in found] == ["BIOS-e820", "Zone ranges"]
    assert [each.accepted_bytes for each in found] == [0, 3 * SZ_2M]
    assert [each.unaccepted_bytes for each in found] == [SZ_1G - SZ_2M, SZ_1G - 4 * SZ_2M]
    assert [each.tdcalls for each in found] == [0, 5]
    assert [each.virtual_ns for each in found] == [20, 60]


def test_which_lines() -> None:
    """The first line of each kind, at the line's start, with or without a time stamp; each touch of /init."""
    lines = [
        "[    0.000000] BIOS-e820: one", "[    0.000000] BIOS-e820: two", "Memory: 1K/2K available", "MemoryFree",
        "[12345.000001] Run /init as init process", "said: Zone ranges:",
        "[    0.1] unaccepted-init: touched 256 MiB", "[    0.1] unaccepted-init: touched 512 MiB",
    ]  # fmt: skip
    found = milestones(trace_of(*map(Print, lines)).records, RAM)
    assert [each.name for each in found] == [
        "BIOS-e820", "Memory", "Run /init", "touched 256 MiB", "touched 512 MiB"
    ]  # fmt: skip


def test_curve_rises_while_an_accept_takes_its_time() -> None:
    """The curve is flat up to an accept's record, rises to the next record, and ends at the end of the boot."""
    trace = trace_of(Print("a"), Print("b"), TdCall(ACCEPT, 1, TDX_SUCCESS, 2), Print("c"))
    points = [(0, 0), (10, 0), (20, 0), (30, 2 * SZ_2M), (40, 2 * SZ_2M)]
    assert list(accepted_over_time(trace.records, 40)) == points


def test_the_default_boot() -> None:
    """The sums over a whole boot are those of the table of stages and of the TDX module."""
    boot = Boot(BootConfig(sample_bzimage()))
    boot.run()
    sums = Acceptance(boot.host.ram)
    for record in boot.trace.records:
        sums.take(record)
    stages = summarize(boot.trace.records)
    assert sums.accepted_bytes == sum(stage.accepted_bytes for stage in stages)
    assert sums.tdcalls == sum(sum(stage.tdcalls.values()) for stage in stages)
    assert sums.unaccepted == unaccepted_by_module(boot)


def test_json(command: Callable[..., object]) -> None:
    """--json has the milestones of every kind of boot."""
    answer = command("boot", "--json")
    found = json.loads(answer.out)["milestones"]  # type: ignore[attr-defined]
    assert [each["name"] for each in found] == ["BIOS-e820", "Zone ranges", "Memory"]
    assert found[0]["accepted_bytes"] == 2097048 << 10


def test_table_of_real_code(command: Callable[..., object], debian_kernel: Path) -> None:
    """After the table of stages of real code come the milestones that it reached, and nothing for those ahead."""
    words = ("--kernel", debian_kernel, "--run", "kernel", "--memory", "6G", "--until", "Zone ranges")
    lines = command("boot", *words).out.splitlines()  # type: ignore[attr-defined]
    at = next(number for number, line in enumerate(lines) if line.startswith("accepted by"))
    assert [line.split("  ")[0] for line in lines[at + 1 : at + 4]] == ["BIOS-e820", "Zone ranges", ""]
    words_of_row = lines[at + 1].split()
    assert words_of_row[1:5] == ["2097048", "KiB", "4194304", "KiB"]
