"""One boot under one fault: what the guest did, and whether it used memory that it must not.

A guest is judged by what the sanitizer found, and, if it came through, by its memory: what the plain boot left there
must be there still.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256

from guest.errors import BootError
from guest.ranges import RangeSet
from guest.units import PAGE_SIZE, SZ_1M, round_down, round_up
from tdx.events import Finding
from tdx.faults import Place, parse_rule
from tools.explained import explain
from tools.pipeline import Boot, BootConfig
from tools.verdict import finding_lines

OUTCOMES = ("went on", "stopped", "explained", "violation")
"""Through all stages; ended by its own words or by the TDX module; broke a rule, as we know it does; broke a rule."""
DATA_CHANGED = "memory differs from the plain boot's"
STOPPED = "stopped"
PLAIN = "none"
_ZEROS = bytes(SZ_1M)

Stages = Mapping[str, Callable[[Boot], None]]
Contents = tuple[tuple[int, int, bytes], ...]
"""Start, size and SHA-256 of pieces of memory."""


@dataclass(frozen=True, slots=True)
class Trial:
    """``rule`` is the fault, empty for the plain boot, and ``kind`` its kind.

    ``text`` says how the boot ended, and in which ``stage`` (empty: after all); ``findings`` what the sanitizer said.
    ``reasons`` are the rules that were broken, or that the guest stopped.
    """

    rule: str
    kind: str
    outcome: str
    stage: str
    text: str
    reasons: tuple[str, ...]
    findings: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """The fields as JSON values."""
        return asdict(self)


def try_fault(
    config: BootConfig, stages: Stages | None, rule: str | None, expected: Contents | None
) -> tuple[Boot, Trial]:
    """Boot under ``rule``, or without a fault, with ``stages`` in place of the boot's own.

    If ``expected`` is given, a guest that comes through must have those contents in memory. A host that lies about
    memory from the start is left out of that: where things lie is different then.
    """
    rules = () if rule is None else (parse_rule(rule),)
    boot = Boot(replace(config, faults=rules, sanitize="warn"))
    boot.stages = {**boot.stages, **(stages or {})}
    death: BootError | None = None
    try:
        boot.run()
    except BootError as error:
        death = error
    records = boot.sanitizer.findings if boot.sanitizer is not None else []
    broken = list(dict.fromkeys(r.event.rule for r in records if isinstance(r.event, Finding)))
    comparable = expected is not None and all(r.place is not Place.HOB for r in rules)
    if death is None and comparable and expected is not None and not _holds(boot, expected):
        broken.append(DATA_CHANGED)
    kind = rules[0].kind if rules else PLAIN
    outcome = "stopped" if death is not None else "went on"
    if broken:
        outcome = "explained" if all(explain(kind, reason) for reason in broken) else "violation"
    elif death is not None and rule is None:
        outcome = "violation"
    reasons = tuple(broken) or ((STOPPED,) if death is not None else ())
    stage = boot.trace.stage if death is not None else ""
    text = str(death) if death is not None else "all stages done"
    return boot, Trial(rule or "", kind, outcome, stage, text, reasons, tuple(finding_lines(boot)))


def contents(boot: Boot) -> Contents:
    """What the guest wrote and what is not zero, as pieces of whole pages."""
    written = RangeSet()
    for _, start, end in boot.machine.memory.writes:
        written.add(round_down(start, PAGE_SIZE), round_up(end, PAGE_SIZE))
    found = RangeSet()
    for start, end in written:
        for low in range(start, end, SZ_1M):
            _add_pages_in_use(boot, found, low, min(end, low + SZ_1M))
    pieces = ((start, end - start) for start, end in found)
    return tuple((start, size, sha256(boot.physical.read(start, size)).digest()) for start, size in pieces)


def _add_pages_in_use(boot: Boot, found: RangeSet, start: int, end: int) -> None:
    data = boot.physical.read(start, end - start)
    if data == _ZEROS[: len(data)]:
        return
    zero_page = _ZEROS[:PAGE_SIZE]
    for offset in range(0, len(data), PAGE_SIZE):
        if data[offset : offset + PAGE_SIZE] != zero_page:
            found.add(start + offset, start + offset + PAGE_SIZE)


def _holds(boot: Boot, expected: Contents) -> bool:
    return all(sha256(boot.physical.read(start, size)).digest() == digest for start, size, digest in expected)
