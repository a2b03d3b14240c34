"""/sys/kernel/tracing: the trace buffer and the one event of the page allocator that it can take.

Source: kernel/trace/trace.c, print_lat_help_header() and trace_print_context(); include/trace/events/kmem.h.
"""

from __future__ import annotations

from collections import deque

from guest.trace import Record, Trace
from kernel.cpus import Cpus
from kernel.events import MmPageAllocExtfrag

MOST_ENTRIES = 10_000
"""The buffer holds the last ones."""
_HEADER = """\
#                                _-----=> irqs-off/BH-disabled
#                               / _----=> need-resched
#                              | / _---=> hardirq/softirq
#                              || / _--=> preempt-depth
#                              ||| / _-=> migrate-disable
#                              |||| /     delay
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
"""


class Tracing:
    """Watches the trace for ``mm_page_alloc_extfrag``, once that is enabled."""

    def __init__(self, trace: Trace, cpus: Cpus) -> None:
        self._trace, self._cpus = trace, cpus
        self._entries: deque[tuple[int, int, str]] = deque(maxlen=MOST_ENTRIES)
        self._written = 0

    @property
    def enabled(self) -> bool:
        """Whether the event is taken down."""
        return self._watch in self._trace.watchers

    def enable(self, on: bool) -> None:
        """A write to the event's file ``enable``."""
        if on != self.enabled:
            (self._trace.watchers.append if on else self._trace.watchers.remove)(self._watch)

    def _watch(self, record: Record) -> None:
        if isinstance(record.event, MmPageAllocExtfrag):
            self._written += 1
            self._entries.append((record.ns, self._cpus.current.number, record.event.text))

    def text(self) -> str:
        """The file ``trace``. Everything runs in the script's shell, process 1; its flags are not known."""
        counts = f"{len(self._entries)}/{self._written}   #P:{len(self._cpus.online)}"
        lines = (
            f"{'sh':>16}-{1:<7} [{cpu:03}] ..... {ns // 1_000_000_000:5}.{ns // 1000 % 1_000_000:06}: "
            f"mm_page_alloc_extfrag: {text}\n"
            for ns, cpu, text in self._entries
        )
        return f"# tracer: nop\n#\n# entries-in-buffer/entries-written: {counts}\n#\n{_HEADER}" + "".join(lines)

    def clear(self) -> None:
        """A write to ``trace`` empties the buffer."""
        self._entries.clear()
        self._written = 0
