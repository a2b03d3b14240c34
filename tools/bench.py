"""``make bench``: how long a boot takes, as a whole process and by itself, and how it grows with memory.

Machines differ and are noisy, so runs of the compared set-ups alternate, and ratios are of medians.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from statistics import median

from tools.render import print_table

SETUPS = {
    "4 GiB": ["--memory", "4G"],
    "64 GiB": ["--memory", "64G"],
    "4 GiB, host with 4K pages": ["--memory", "4G", "--host-page-size", "4K"],
    "1 TiB": ["--memory", "1T"],
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


def main() -> None:
    """Measure every set-up in turn, several times over, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each set-up, after one that is not")
    runs = parser.parse_args().runs
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
