"""Known causes of differences between our log and a captured one."""

from __future__ import annotations

from tools.captures.capture import Capture


def cause_of(capture: Capture, subject: str, ours: str, captured: str) -> str | None:
    """Why these two lines differ, or None."""
    if capture.params["hdr.loadflags"] & 2 and "max_addr" not in ours and subject.startswith("memblock"):
        return "KASLR: the direct map lies at a random place, and so its page tables are others"
    if subject.startswith("memblock") and "start_kernel" in ours + captured:
        return "the kernel passes other parameters on to user space than those that are known here"
    return None
