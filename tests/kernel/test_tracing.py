"""The trace buffer of a script: what the page allocator's event looks like there."""

from __future__ import annotations

import re

import pytest

from bootstub.protocol import MAINLINE, V9
from kernel.events import FileRead, FileWrite, MmPageAllocExtfrag
from kernel.runtime import parse_script

ENABLE = "/sys/kernel/tracing/events/kmem/mm_page_alloc_extfrag/enable"
TRACE = "/sys/kernel/tracing/trace"
LINE = re.compile(
    r" +sh-1       \[00[01]\] \.{5} +\d+\.\d{6}: mm_page_alloc_extfrag: page=[0-9a-f]{16} pfn=0x[0-9a-f]+ "
    r"alloc_order=\d+ fallback_order=\d+ pageblock_order=9 alloc_migratetype=\d fallback_migratetype=\d "
    r"fragmenting=[01] change_ownership=[01]"
)


@pytest.fixture
def ran(new_boot):
    """``ran(script)``: the boot, what was read and what writes came to."""

    def run(script: str, **config: object):
        boot = new_boot(None, script=tuple(parse_script(script)), cpus=2, **config)
        events = [r.event for r in boot.trace.records]
        reads = [event.text for event in events if isinstance(event, FileRead)]
        return boot, reads, [event.result for event in events if isinstance(event, FileWrite)]

    return run


@pytest.mark.parametrize("protocol", [V9, MAINLINE], ids=lambda protocol: protocol.name)
def test_fallbacks_are_in_the_buffer(ran, protocol):
    """From the moment that the event is enabled, until somebody empties the buffer or disables it."""
    script = (
        f"alloc order 5 gfp GFP_KERNEL\ncat {ENABLE}\ncat {TRACE}\necho 1 > {ENABLE}\ncat {ENABLE}\n"
        f"on cpus 0-1 alloc order 3 x 300 gfp GFP_KERNEL\ncat {TRACE}\necho > {TRACE}\ncat {TRACE}\n"
        f"echo 0 > {ENABLE}\nalloc order 3 x 300 gfp GFP_KERNEL\ncat {TRACE}\necho 2 > {ENABLE}\n"
    )
    boot, (off, empty, on, full, *after), results = ran(script, protocol=protocol)
    assert (off, on, results) == ("0\n", "1\n", [2, 1, 2, -22])
    assert after == [empty, empty]
    lines = full.removeprefix(empty.replace("0/0", f"{full.count('extfrag')}/{full.count('extfrag')}")).splitlines()
    events = [r.event for r in boot.trace.records if isinstance(r.event, MmPageAllocExtfrag)]
    assert 0 < len(lines) < len(events)
    assert all(map(LINE.fullmatch, lines))
    assert not boot.trace.watchers
