"""What each CPU waited for, as a table and as JSON. Times are virtual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kernel.cpus import Cpu, CpuTimes

_SHOWN = 32
"""Rows of single CPUs; with more of them only the line of all."""
_HEADERS = ["cpu", "accepts", "waits", "waited", "longest wait", "interrupts off", "busy", "soft lockups"]


def cpu_rows(cpus: Sequence[Cpu]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: numbers and sums, and of the last three times the longest; ``all`` stands below."""
    rows = [_row(str(cpu.number), [cpu.times]) for cpu in cpus] if len(cpus) <= _SHOWN else []
    return _HEADERS, [*rows, _row(f"all {len(cpus)}", [cpu.times for cpu in cpus])]


def _row(name: str, times: Sequence[CpuTimes]) -> list[str]:
    return [
        name,
        str(sum(t.accepts for t in times)),
        str(sum(t.waits for t in times)),
        _ms(sum(t.waited_ns for t in times)),
        _ms(max(t.longest_wait_ns for t in times)),
        _ms(max(t.irqs_off_ns for t in times)),
        _ms(max(t.busy_ns for t in times)),
        str(sum(t.soft_lockups for t in times)),
    ]


def _ms(ns: int) -> str:
    return f"{ns / 1e6:.3f} ms"


def cpus_json(cpus: Sequence[Cpu]) -> list[dict[str, Any]]:
    """The same of each CPU, in nanoseconds."""
    return [{"cpu": cpu.number, "online": cpu.online} | asdict(cpu.times) for cpu in cpus]
