"""Real code whose processor has random numbers runs the same way each time."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cpu import rdrand
from cpu.binding import RAX, RDX, Engine, self_test
from cpu.build import EngineError
from guest.units import SZ_1G, SZ_64M
from tools.output import json_text
from tools.pipeline import REAL_KERNEL_CMDLINE, Boot, BootConfig
from tools.render import record_json

CODE = b"\x48\x0f\xc7\xf0\x48\x0f\xc7\xfa\xcc"  # rdrand rax; rdseed rdx; int3
UNTIL = "Inode-cache hash table entries"
"""A line that comes after the kernel has seeded its own generator from RDRAND."""
KERNEL, KERNEL_SIZE = 0x100_0000, SZ_64M


class NoFunctions:
    """A C library that has none of the functions that it is asked for."""

    def __getitem__(self, name: str) -> object:
        raise AttributeError(name)


def engine(seed: int) -> Engine:
    """An engine that draws two numbers each time it runs from 0."""
    made = Engine(seed)
    made.uc.mem_map(0, 4096)
    made.uc.mem_write(0, CODE)
    made.uc.hook_add(made.unicorn.UC_HOOK_INTR, lambda *_: made.stop())
    return made


def draw(made: Engine) -> list[int]:
    """The next two numbers."""
    made.run(0)
    return [made.state.regs[RAX], made.state.regs[RDX]]


def real_boot(kernel: Path, **options: object) -> Boot:
    """A boot of the kernel's own code up to ``UNTIL``."""
    config: dict[str, object] = {"memory": 6 * SZ_1G, "cmdline": REAL_KERNEL_CMDLINE, "until": UNTIL} | options
    boot = Boot(BootConfig(kernel.read_bytes(), run="kernel", **config))  # type: ignore[arg-type]
    boot.run()
    return boot


def trace_of(boot: Boot) -> list[str]:
    """The trace as ``boot --save`` writes it."""
    return [json_text(record_json(record), "short") for record in boot.trace.records]


def left_by(boot: Boot) -> list[object]:
    """All that a boot leaves: its trace, its time, its count, its registers and the kernel's own memory."""
    assert boot.real_code is not None
    memory = hashlib.sha256(boot.physical.read(KERNEL, KERNEL_SIZE)).hexdigest()
    return [trace_of(boot), boot.clock.ns, boot.real_code.counter.count, boot.machine.regs, memory]


def test_the_same_seed_gives_the_same_numbers() -> None:
    """RDRAND and RDSEED draw from one generator that depends on the seed alone, whatever else runs meanwhile."""
    first, second, third = engine(7), engine(7), engine(8)
    numbers = [draw(first) for _ in range(400)]
    assert len({number for pair in numbers for number in pair}) == 800
    assert numbers[0][0] == rdrand.first_number(7)
    for expected in numbers:
        assert draw(second) == expected != draw(third)


def test_numbers_in_another_thread() -> None:
    """The generator belongs to the engine: a run in another thread goes on where the last one ended."""
    numbers = [draw(each) for each in [engine(7)] for _ in range(4)]
    made = engine(7)
    with ThreadPoolExecutor(1) as pool:
        assert [draw(made), pool.submit(draw, made).result(), draw(made), pool.submit(draw, made).result()] == numbers


def test_another_source_of_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where RDRAND does not draw from the generator that was put in place, the engine is not used."""
    self_test()
    monkeypatch.setattr(rdrand.RandomNumbers, "__enter__", lambda numbers: None)
    monkeypatch.setattr(rdrand.RandomNumbers, "__exit__", lambda numbers, *_: None)
    with pytest.raises(EngineError, match=r"RDRAND does not draw its numbers as in 2\.1\.4"):
        self_test()


@pytest.mark.parametrize(("name", "error"), [("dl_iterate_phdr", "needs Linux"), ("uclib", "not the one thread-local")])
def test_a_library_that_is_not_known_is_refused(
    name: str, error: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Without a C library that lists its modules, or without Unicorn among these, there is one line and no crash."""
    caches = (rdrand._tls_module, rdrand._c_function)
    for cache in caches:
        cache.cache_clear()
        request.addfinalizer(cache.cache_clear)
    if name == "uclib":
        monkeypatch.setattr("unicorn.unicorn_py3.unicorn.uclib", type("Library", (), {"_name": "/no/library"}))
    else:
        monkeypatch.setattr(rdrand.ctypes, "CDLL", lambda _: NoFunctions())
    with pytest.raises(EngineError, match=error):
        rdrand.RandomNumbers(0).__enter__()


def test_two_boots_of_the_real_kernel_are_the_same(debian_kernel: Path, tmp_path: Path) -> None:
    """Trace, time, count, registers and memory are equal in one process, and the trace in another process too."""
    first, second = real_boot(debian_kernel, seed=3), real_boot(debian_kernel, seed=3)
    assert left_by(first) == left_by(second)
    words = ["boot", "--kernel", debian_kernel, "--run", "kernel", "--memory", "6G", "--seed", "3", "--until", UNTIL]
    words += ["--cmdline", REAL_KERNEL_CMDLINE, "--initrd", "/dev/null", "--save", tmp_path]
    subprocess.run([sys.executable, "-m", "tools.cli", *map(str, words)], check=True, capture_output=True)
    assert (tmp_path / "trace.jsonl").read_text().splitlines() == trace_of(first)


def test_another_seed_gives_the_kernel_other_numbers(debian_kernel: Path) -> None:
    """With another seed the kernel has other random numbers in its memory."""
    first, second = (left_by(real_boot(debian_kernel, seed=seed)) for seed in (0, 1))
    assert first[-1] != second[-1]
