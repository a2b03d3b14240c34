"""``make bench``: how long a boot takes, as a whole process and by itself, how it grows with memory, and accepts.

Machines differ and are noisy, so runs of the compared set-ups alternate, and ratios are of medians. Accepts are
counted in processor time, one TDCALL after the other through the registers.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from statistics import median

from guest.registers import Registers
from guest.units import PMD_SIZE
from tdx.leaves import Leaf
from tdx.sept import LEVEL_2M
from tdx.status import TDX_SUCCESS
from tools.pipeline import Boot, BootConfig
from tools.render import print_table

SETUPS = {
    "4 GiB": ["--memory", "4G"],
    "64 GiB": ["--memory", "64G"],
    "4 GiB, host with 4K pages": ["--memory", "4G", "--host-page-size", "4K"],
    "1 TiB": ["--memory", "1T"],
    "1 TiB, eager": ["--memory", "1T", "--cmdline", "nokaslr accept_memory=eager"],
    "1 TiB, backed ahead": ["--memory", "1T", "--host-backing", "ahead"],
}
"""What is measured; the first one is what the ratios compare with."""


def measure(options: list[str]) -> tuple[float, float]:
    """Milliseconds of ``unaccepted boot`` as a whole process, and of the boot in it."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "tools.boot", "--timing", *options]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    whole = (time.perf_counter() - start) * 1000
    match = re.search(r"^boot: ([0-9.]+) ms", output, re.MULTILINE)
    assert match is not None, "boot --timing prints its time"
    return whole, float(match[1])


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


def main() -> None:
    """Measure every set-up in turn, several times over, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each set-up, after one that is not")
    runs = parser.parse_args().runs
    bench_accepts(runs)
    print()
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in SETUPS}
    for number in range(runs + 1):
        for name, options in SETUPS.items():
            result = measure(options)
            if number:
                results[name].append(result)
    first = next(iter(SETUPS))
    base = median(boot for _, boot in results[first])
    rows = []
    for name, pairs in results.items():
        wholes, boots = zip(*pairs, strict=True)
        row = [name, *(f"{value:.0f} ms" for value in (min(wholes), median(wholes)))]
        row += [f"{min(boots):.1f} ms", f"{median(boots):.1f} ms", f"{median(boots) / base:.2f}"]
        rows.append(row)
    headers = ["boot of", "process, min", "median", "boot alone, min", "median", f"ratio to {first}"]
    print_table(headers, rows)


if __name__ == "__main__":
    main()
