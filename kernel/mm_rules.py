"""What differs between v9's page allocator (6.3) and mainline's (6.12): one table of facts."""

from __future__ import annotations

from dataclasses import dataclass

from bootstub.protocol import MAINLINE, V9


@dataclass(frozen=True, slots=True)
class MmRules:
    """Facts of one version of mm/page_alloc.c.

    Acceptance: ``unaccepted_is_usable``: watermark checks see unaccepted memory as free memory (since "mm: fix endless
    reclaim on machines with unaccepted memory"). ``accepts_first``: a zone is topped up before its watermarks are
    looked at (cond_accept_memory()), also for bulk requests; otherwise only when a check fails. ``accepts_to``: up to
    this watermark. ``accepts_before_watermarks``: while watermarks are zero each look at a zone accepts one block
    (since "mm/page_alloc: fix memory accept before watermarks gets initialized").

    The rest: ``claims``: a fallback claims a whole pageblock or steals one page; otherwise it may move part of one.
    ``tunes_pcp``: the size of per-CPU lists follows their use. ``keeps_reserve``: all of the highatomic reserve is
    unusable to others, not only its free pages. ``prints_memory_late``: the ``Memory:`` line counts deferred pages.
    ``is_6_12``: files in /proc have the lines of 6.12.
    """

    name: str
    unaccepted_is_usable: bool
    accepts_first: bool
    accepts_to: str
    accepts_before_watermarks: bool
    claims: bool
    tunes_pcp: bool
    keeps_reserve: bool
    prints_memory_late: bool
    is_6_12: bool


V9_MM = MmRules(
    V9.name,
    unaccepted_is_usable=False,
    accepts_first=False,
    accepts_to="high",
    accepts_before_watermarks=False,
    claims=False,
    tunes_pcp=False,
    keeps_reserve=True,
    prints_memory_late=False,
    is_6_12=False,
)
MAINLINE_MM = MmRules(
    MAINLINE.name,
    unaccepted_is_usable=True,
    accepts_first=True,
    accepts_to="promo",
    accepts_before_watermarks=True,
    claims=True,
    tunes_pcp=True,
    keeps_reserve=False,
    prints_memory_late=True,
    is_6_12=True,
)
