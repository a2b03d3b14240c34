"""The sanitizer's rules for stage borders: the record of unaccepted memory is true, what is handed over can be read.

The bitmap is compared with what the guest ever accepted, not with Secure EPT as it is now: a page that the host took
away is the host's doing. Memory that is no RAM in the kernel's e820 table is lost, and no bit has to say so; what the
guest made shared is not accepted either. Real code that was stopped within a stage may have accepted what its bit
still denies: it accepts first, and clears the bit then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guest.ranges import RangeSet
from tdx.sanitizer import AcceptanceRule
from tools.handover import check_handover
from tools.verdict import lost_memory, unaccepted_by_bitmap

if TYPE_CHECKING:
    from tools.pipeline import Boot


def check_border(boot: Boot) -> None:
    """Report where bitmap and accepted memory disagree now, and what is handed over and cannot be read.

    There is nothing to compare before the boot stub made the bitmap.
    """
    if boot.sanitizer is None:
        return
    boot.sanitizer.catch_up()
    if boot.boot_params is None:
        return
    unaccepted = _without(boot.host.ram, boot.sanitizer.accepted)
    by_bitmap = unaccepted_by_bitmap(boot) or RangeSet()
    silent = _without(_without(unaccepted, by_bitmap), boot.sanitizer.shared)
    for start, end in _without(silent, lost_memory(boot)) if silent else ():
        boot.sanitizer.report(AcceptanceRule.BIT_CLEAR, start, end, "bit clear, never accepted", "bit set")
    stopped_within = boot.config.until is not None or boot.config.timeout is not None
    for start, end in () if stopped_within else _without(by_bitmap, unaccepted):
        boot.sanitizer.report(AcceptanceRule.BIT_SET, start, end, "bit set, accepted", "bit clear")
    check_handover(boot)


def _without(ranges: RangeSet, others: RangeSet) -> RangeSet:
    left = ranges.copy()
    for start, end in others:
        left.remove(start, end)
    return left
