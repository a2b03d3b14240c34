"""Why a sound guest does what it does under a fault: v9's own ways, and those of its firmware, with their sources.

Here is all that ``unaccepted explore`` takes for explained. A rule of the sanitizer that is broken under a fault and
does not stand here is a violation.
"""

from __future__ import annotations

from dataclasses import dataclass

from tdx.sanitizer import AcceptanceRule

_V9 = "v9 14/14, tdx_accept_memory()"
_HOB = "edk2 OvmfPkg/Library/PlatformInitLib/IntelTdx.c, ValidateHobList(); td-shim: the HOB list is untrusted"
_STOPPED = "stopped"
_ON_TRUST = "The firmware checks the layout of the HOB list and takes what it says of memory on trust. "


@dataclass(frozen=True, slots=True)
class Explanation:
    """``reason`` is a rule of the sanitizer or ``stopped``."""

    kind: str
    reason: str
    text: str
    source: str


def _taken(kind: str, text: str) -> Explanation:
    why = "Linux has SEPT_VE_DISABLE set and accepts nothing on a fault, so nothing is accepted twice."
    return Explanation(kind, _STOPPED, f"{text} {why}", "Documentation/arch/x86/tdx.rst; td_ept_violation.c")


EXPLAINED = (
    Explanation(
        "busy", _STOPPED,
        "Any status but success counts as refused: a smaller page is tried, nothing is tried again, and a refused "
        "4 KiB page stops the guest.", _V9,
    ),
    Explanation(
        "withhold", _STOPPED,
        "The accept exits to a host that does nothing: the TD hangs, which a host may always do to its guest.",
        "Intel TDX Module 1.5, TDG.MEM.PAGE.ACCEPT",
    ),
    _taken("replay", "A touch of the new page finds it PENDING and ends the TD."),
    _taken("remove", "A touch of the removed page exits; what the host backs then is PENDING and ends the TD."),
    _taken("block", "A touch of the blocked page exits to a host that does nothing."),
    Explanation("mapgpa-refuse", _STOPPED, "A status other than success is a failure of the whole accept.", _V9),
    Explanation(
        "mapgpa-retry", _STOPPED,
        "v9 asks once and does not know RETRY; Linux from 6.7 on goes on at R11.", f"{_V9}; 6.7 tdx_map_gpa()",
    ),
    Explanation(
        "mapgpa-stuck", _STOPPED,
        "v9 asks once and does not know RETRY; Linux from 6.7 on gives up when R11 stands still.",
        f"{_V9}; 6.7 tdx_map_gpa()",
    ),
    Explanation("status", _STOPPED, "A status other than success is a failure of the whole accept.", _V9),
    Explanation(
        "hob-stale", AcceptanceRule.ACCESS,
        f"{_ON_TRUST}The first touch of memory that was never accepted ends the TD; no data is lost.", _HOB,
    ),
    Explanation(
        "hob-stale", AcceptanceRule.BIT_CLEAR,
        f"{_ON_TRUST}So td-shim leaves bits clear whose memory was never accepted; the first touch ends the TD.", _HOB,
    ),
    Explanation(
        "hob-accepted", AcceptanceRule.AGAIN,
        f"{_ON_TRUST}The module refuses the accept, which keeps the contents, and the firmware stops.", _HOB,
    ),
    Explanation(
        "hob-overlap", AcceptanceRule.AGAIN,
        f"{_ON_TRUST}The module refuses the second accept, which keeps the contents, and the firmware stops. A host "
        "that also replaces the page in between would get it accepted.", _HOB,
    ),
    Explanation(
        "hob-more", AcceptanceRule.NO_RAM,
        f"{_ON_TRUST}The accept exits to a host that has nothing to map, and the TD ends.", _HOB,
    ),
)  # fmt: skip
_BY_REASON = {(e.kind, str(e.reason)): e for e in EXPLAINED}


def explain(kind: str, reason: str) -> Explanation | None:
    """Why a fault of ``kind`` has ``reason`` for a consequence, or None."""
    return _BY_REASON.get((kind, reason))
