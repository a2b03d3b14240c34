"""Counting the instructions that real code runs."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from cpu import counter
from cpu.binding import Engine
from cpu.build import EngineError
from cpu.counter import InstructionCounter
from guest.units import SZ_1G
from tools import pipeline
from tools.pipeline import REAL_KERNEL_CMDLINE, Boot, BootConfig

LOOP = b"\xb9%s\xff\xc9\x75\xfc\xcc"  # mov ecx, n; again: dec ecx; jnz again; int3


def engine(rounds: int, at: int) -> Engine:
    """An engine with a loop of ``rounds`` rounds at ``at``."""
    made = Engine()
    made.uc.mem_map(at & ~0xFFF, 0x1000)
    made.uc.mem_write(at, LOOP.replace(b"%s", rounds.to_bytes(4, "little")))
    made.uc.hook_add(made.unicorn.UC_HOOK_INTR, lambda *_: made.stop())
    return made


@pytest.mark.parametrize("at", [0, 0x40, 0x123, 0x7FFF_F000, 0x12_3456_7000])
@pytest.mark.parametrize("rounds", [1, 2, 1000])
def test_each_instruction_counts(at: int, rounds: int) -> None:
    """A loop counts as its instructions times its rounds, wherever it lies, and again when it runs again."""
    made = engine(rounds, at)
    counted = InstructionCounter(made, 1 << 40, lambda: None)
    made.run(at)
    assert counted.count == 2 * rounds + 2
    made.run(at)
    assert counted.count == 2 * (2 * rounds + 2)


def test_a_counter_lives_as_long_as_its_engine() -> None:
    """The engine calls a counter that nobody else holds any more."""
    ticks: list[int] = []
    made = engine(1000, 0)
    InstructionCounter(made, 100, lambda: ticks.append(1))
    gc.collect()
    made.run(0)
    assert len(ticks) == 20


def test_ticks() -> None:
    """The tick comes every so many instructions, and what it raises ends the run at once."""
    counts: list[int] = []

    def tick() -> None:
        counts.append(counted.count)
        if len(counts) == 3:
            raise EngineError("enough")

    made = engine(1000, 0)
    counted = InstructionCounter(made, 100, tick)
    with pytest.raises(EngineError, match="enough"):
        made.run(0)
    assert counts == [101, 201, 301]


def test_blocks_without_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a block's record is not found, the first block ends the run with the version that is known."""
    lost = counter._CODE.replace(bytes.fromhex("483930"), bytes.fromhex("483938"))  # compares RDI
    monkeypatch.setattr(counter, "_CODE", lost)
    made = engine(1, 0)
    InstructionCounter(made, 100, lambda: None)
    with pytest.raises(EngineError, match=r"no record in front of them as in 2\.1\.4"):
        made.run(0)


def test_a_count_that_is_off_is_refused(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """An engine that records its blocks in another way is not used."""
    request.addfinalizer(counter.self_test.cache_clear)
    counter.self_test.cache_clear()
    counter.self_test()
    counter.self_test.cache_clear()
    size_instead = counter._CODE.replace(bytes.fromhex("0fb74016"), bytes.fromhex("0fb74014"))
    monkeypatch.setattr(counter, "_CODE", size_instead)
    with pytest.raises(EngineError, match="instructions counted, not 8"):
        counter.self_test()


def test_the_count_is_that_of_a_hook_for_each_instruction(debian_kernel: Path) -> None:
    """Through the real stub, a hook on each instruction counts as many, but for what ends inside a block."""
    config = BootConfig(debian_kernel.read_bytes(), memory=6 * SZ_1G, cmdline=REAL_KERNEL_CMDLINE, run="stub")
    boot = Boot(config)
    boot.run("efi-stub")
    assert boot.real_code is not None
    slow = Boot(config)
    slow.run("firmware")
    instructions = 0

    def count(*_: object) -> None:
        nonlocal instructions
        instructions += 1

    code = pipeline._real_code(slow)
    code.vcpu.engine.uc.hook_add(code.vcpu.engine.unicorn.UC_HOOK_CODE, count)
    slow.run("efi-stub")
    assert 30_000 < instructions <= boot.real_code.counter.count < instructions + 30
