"""The default boot, whole: its log, structures and trace are golden files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from bootstub.sample_kernel import sample_bzimage
from tools.dump_boot_params import dmesg_lines, rows, text_lines
from tools.output import json_text
from tools.pipeline import STAGE_NAMES, Boot, BootConfig
from tools.render import log_lines, record_json, summary_json
from tools.report import summarize

if TYPE_CHECKING:
    from tests.conftest import Golden


@pytest.fixture(scope="module")
def boot() -> Iterator[Boot]:
    """The boot that ``unaccepted boot`` runs."""
    boot = Boot(BootConfig(sample_bzimage()))
    boot.run()
    yield boot


def test_log(boot: Boot, golden: Golden) -> None:
    """What the default boot prints does not change unnoticed."""
    golden.check("\n".join(log_lines(boot.trace.records)) + "\n")


def test_summary(boot: Boot, golden: Golden) -> None:
    """Nor does what each stage accepts, calls and costs."""
    golden.json(summary_json(summarize(boot.trace.records)))


def test_boot_params_dump(boot: Boot, golden: Golden) -> None:
    """Nor do the fields of boot_params, as the stub leaves them."""
    assert boot.boot_params is not None
    golden.check("\n".join(text_lines(rows(boot.boot_params))) + "\n")


def test_e820(boot: Boot, golden: Golden) -> None:
    """Nor does the e820 table, as the kernel prints it."""
    assert boot.boot_params is not None
    golden.check("\n".join(dmesg_lines(boot.boot_params)) + "\n")


def test_trace(boot: Boot, golden: Golden) -> None:
    """Nor does any event of the trace."""
    golden.check("".join(json_text(record_json(record), "short") + "\n" for record in boot.trace.records), "jsonl")


def test_two_boots_are_equal(boot: Boot) -> None:
    """A boot of the same configuration has the same trace, registers and writes."""
    again = Boot(BootConfig(sample_bzimage()))
    again.run()
    assert again.trace.records == boot.trace.records
    assert again.machine.regs == boot.machine.regs
    assert again.machine.memory.writes == boot.machine.memory.writes


def test_stages_run_in_order(boot: Boot) -> None:
    """Every stage ran once, in the order of the table."""
    assert tuple(boot.done) == STAGE_NAMES
    assert boot.next_stage is None
    with pytest.raises(ValueError, match="over"):
        boot.step()


def test_json_trace_is_json(boot: Boot) -> None:
    """Each record is one JSON object with number, stage, time and event."""
    for number, record in enumerate(boot.trace.records):
        value = json.loads(json_text(record_json(record), "short"))
        assert (value["number"], value["stage"], value["event"]) == (number, record.stage, record.event.name)
