"""``make bench``: how long a boot takes, as a whole process and by itself, how it grows with memory; accepts; pages.

Machines differ and are noisy, so runs of the compared set-ups alternate, and ratios are of medians. Accepts and
allocations are counted in processor time, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bootstub.protocol import PROTOCOLS, Protocol
from bootstub.sample_kernel import sample_bzimage
from guest.registers import Registers
from guest.units import PMD_SIZE, SZ_1G, SZ_4G
from kernel.page_alloc import PageAllocator
from tdx.leaves import Leaf
from tdx.sept import LEVEL_2M
from tdx.status import TDX_SUCCESS
from tools.output import print_table
from tools.pipeline import Boot, BootConfig

_WORST_CASE = Path(__file__).parent.parent / "tests" / "samples" / "maps" / "worst-case-4-pib.toml"
SZ_1T = SZ_1G << 10
_MANY = 400
_FRAGMENTS = "400 descriptors"
SETUPS = {
    "4 GiB": ["--memory", "4G"],
    "64 GiB": ["--memory", "64G"],
    "4 GiB, host with 4K pages": ["--memory", "4G", "--host-page-size", "4K"],
    "1 TiB": ["--memory", "1T"],
    "4 TiB": ["--memory", "4T"],
    "4 PiB, RAM at both ends": ["--efi-map", str(_WORST_CASE)],
    f"{_FRAGMENTS} over 4 PiB": ["--efi-map", _FRAGMENTS],
    "1 TiB, eager": ["--memory", "1T", "--cmdline", "nokaslr accept_memory=eager"],
    "1 TiB, backed ahead": ["--memory", "1T", "--host-backing", "ahead"],
}
"""What is measured; the first one is what the ratios compare with."""
WORST_CASES = ("4 PiB, RAM at both ends", f"{_FRAGMENTS} over 4 PiB")
"""The cover letter's worst case of the bitmap, and one of the map: each has to stay within these limits."""
MAX_SECONDS, MAX_MIB = 3, 500


def fragments(count: int) -> str:
    """A map, as JSON, of ``count`` descriptors: 2 GiB low, then unaccepted and reserved GiB by turns up to 4 PiB."""
    rows: list[dict[str, object]] = [
        {"type": "Conventional", "start": "0", "size": "640K", "attribute": "WB"},
        {"type": "Conventional", "start": "1M", "size": "2047M", "attribute": "WB"},
    ]
    step = ((1 << 52) - (1 << 33)) // (count // 2) >> 30
    for number in range((count - 2) // 2):
        rows.append({"type": "Unaccepted", "start": f"{4 + number * step}G", "size": "1G"})
        rows.append({"type": "Reserved", "start": f"{5 + number * step}G", "size": "1G"})
    return json.dumps(rows)


class Measured(NamedTuple):
    """Milliseconds of ``unaccepted boot`` as a whole process, and of the boot in it; MiB of memory at its peak.

    ``cpu_seconds`` is the processor time of the process, which other processes do not lengthen.
    """

    whole_ms: float
    boot_ms: float
    peak_mib: float
    cpu_seconds: float


def measure(options: list[str]) -> Measured:
    """Boot once with ``options``, in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "tools.boot", "--timing", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    whole = (time.perf_counter() - start) * 1000
    match = re.search(r"^boot: ([0-9.]+) ms", output, re.MULTILINE)
    assert process.returncode == 0 and match is not None, "boot --timing comes through and prints its time"
    return Measured(whole, float(match[1]), usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime)


def accepts_per_second(ahead: bool, count: int = 1 << 17) -> tuple[float, float]:
    """``count`` accepts of 2 MiB by single TDCALLs: per second, and per second with the events of the trace made."""
    boot = Boot(BootConfig(b"", memory=count * PMD_SIZE, host_ahead=ahead))
    boot.host.finalize()
    regs, tdcall = Registers(), boot.machine.platform.tdcall
    start = time.process_time()
    for part in boot.host.ram:
        for gpa in range(part.start, part.end, PMD_SIZE):
            regs.rax, regs.rcx = Leaf.TDG_MEM_PAGE_ACCEPT, gpa | LEVEL_2M
            tdcall(regs)
            assert regs.rax == TDX_SUCCESS
    done = time.process_time() - start
    assert boot.trace.records
    return count / done, count / (time.process_time() - start)


def bench_accepts(runs: int) -> None:
    """Print the best of a few runs: what is slower is the machine's noise."""
    rows = []
    for name, ahead in (("backed ahead", True), ("on demand, an exit for each", False)):
        calls, events = zip(*(accepts_per_second(ahead) for _ in range(runs)), strict=True)
        rows.append([name, f"{max(calls):,.0f}", f"{max(events):,.0f}"])
    print_table(["TDG.MEM.PAGE.ACCEPT of 2 MiB", "per second", "with the trace's events"], rows)


def print_limits(results: dict[str, list[Measured]]) -> None:
    """Print how far the worst cases stay below their limits."""
    rows = []
    for name in WORST_CASES:
        seconds, peak = min(m.cpu_seconds for m in results[name]), max(m.peak_mib for m in results[name])
        verdict = "kept" if seconds <= MAX_SECONDS and peak <= MAX_MIB else "EXCEEDED"
        rows.append([name, f"{seconds:.2f} s", f"{peak:.0f} MiB", verdict])
    print_table(["worst case", "processor time", "peak memory", f"limits of {MAX_SECONDS} s and {MAX_MIB} MiB"], rows)


def booted(protocol: Protocol, memory: int) -> PageAllocator:
    """The page allocator of a guest that came up."""
    boot = Boot(BootConfig(sample_bzimage(), memory=memory, protocol=protocol, script=()))
    boot.run()
    assert boot.kernel is not None and boot.kernel.allocator is not None
    return boot.kernel.allocator


def pairs_per_second(allocator: PageAllocator, count: int = 10_000) -> float:
    """Allocations of a single page, each freed at once: all through the list of CPU 0."""
    allocate, free = allocator.alloc_pages, allocator.free_pages
    start = time.process_time()
    for _ in range(count):
        pfn = allocate()
        assert pfn is not None
        free(pfn, 0)
    return count / (time.process_time() - start)


def bench_pages(runs: int) -> None:
    """Print the best of a few runs for a small and a large guest; what is slower is the machine's noise."""
    rows = []
    for name, protocol in PROTOCOLS.items():
        small, large = booted(protocol, SZ_4G), booted(protocol, SZ_1T)
        rates = [(pairs_per_second(small), pairs_per_second(large)) for _ in range(10 * runs)]
        best = [max(column) for column in zip(*rates, strict=True)]
        rows.append([name, *(f"{rate:,.0f}" for rate in best), f"{best[0] / best[1]:.2f}"])
    print_table(["pages allocated and freed, protocol", "per second, 4 GiB", "1 TiB", "cost at 1 TiB / 4 GiB"], rows)


def main() -> None:
    """Measure every set-up in turn, several times over, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each set-up, after one that is not")
    runs = parser.parse_args().runs
    results = measure_all(runs)
    print_boots(results)
    print()
    print_limits(results)
    print()
    bench_accepts(runs)  # last: a process that it made large would begin its children large
    print()
    bench_pages(runs)


def measure_all(runs: int) -> dict[str, list[Measured]]:
    """Every set-up ``runs`` times, in turn; a first run of each is not counted."""
    results: dict[str, list[Measured]] = {name: [] for name in SETUPS}
    with tempfile.TemporaryDirectory() as directory:
        many = Path(directory) / "map.json"
        many.write_text(fragments(_MANY))
        for number in range(runs + 1):
            for name, options in SETUPS.items():
                result = measure([str(many) if option == _FRAGMENTS else option for option in options])
                if number:
                    results[name].append(result)
    return results


def print_boots(results: dict[str, list[Measured]]) -> None:
    """Times and memory of each set-up, and its ratio to the first."""
    first = next(iter(SETUPS))
    base = median(m.boot_ms for m in results[first])
    rows = []
    for name, measured in results.items():
        wholes, boots, peaks, _ = zip(*measured, strict=True)
        times = [f"{min(wholes):.0f} ms", f"{median(wholes):.0f} ms", f"{min(boots):.1f} ms", f"{median(boots):.1f} ms"]
        rows.append([name, *times, f"{median(boots) / base:.2f}", f"{max(peaks):.0f} MiB"])
    headers = ["boot of", "process, min", "median", "boot alone, min", "median", f"ratio to {first}", "peak memory"]
    print_table(headers, rows)


if __name__ == "__main__":
    main()
