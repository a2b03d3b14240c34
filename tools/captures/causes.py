"""Known causes of differences between our log and a captured one."""

from __future__ import annotations

_UNKNOWN_PARAMETERS = "the kernel passes other parameters on to user space than those that are known here"


def cause_of(subject: str, ours: str, captured: str) -> str | None:
    """Why these two lines differ, or None."""
    texts = [line for line in (ours, captured) if line]
    if subject.startswith("memblock") and all(line.endswith(" start_kernel") for line in texts):
        return _UNKNOWN_PARAMETERS
    if subject == "zonelists" and not ours:
        return "zonelists are built anew when memory is plugged in"
    return None
