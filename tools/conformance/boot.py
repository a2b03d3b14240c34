"""Compare recorded boots of a real kernel to user space with boots of the same image on our firmware and TDX module.

A case is a dict: its set-up (``record_boot.SET_UP``), and what came of it. These differ without a meaning, and
are not compared:

* how the run ended (``stop``), and system calls and exceptions: ``/init`` is another program;
* ``MemFree`` and ``MemAvailable``, for the same reason; ``MemTotal`` and ``Unaccepted`` are compared;
* who called accept_memory() (``by``): that is guessed from what lies on the stack;
* the log as such: it names the firmware, the clock's date and the initrd, and has times in it.

What is accepted is compared to the end of the run, also where ``/init`` is the cause: both programs touch as much
memory, as often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bootstub.bzimage import parse_bzimage
from tools.conformance.left_out import LeftOut
from tools.conformance.stub import first_difference

_NOT_COMPARED = ("MemFree", "MemAvailable")


def _whole(value: Any) -> Any:
    return value


def _line(line: str | None) -> str | None:
    return line and line.rstrip("\r")


def _lines(lines: list[str]) -> list[str]:
    return [line.rstrip("\r") for line in lines]


COMPARED: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        ("kernel_pa", "kernel_va", "map_at_exit", "table", "accept_stub", "accept_kernel", "tdx_accept_memory_ranges",
         "still_pending", "tdcalls", "mapgpa_shared"), _whole,
    ),
    **dict.fromkeys(("e820", "zones", "early_nodes"), _lines),
    "memory_line": _line,
    "accept_memory_calls": lambda calls: [[call[key] for key in ("start", "size", "tdcalls_before")] for call in calls],
    "meminfo": lambda rows: [[name, kib] for name, kib in rows if name not in _NOT_COMPARED],
}  # fmt: skip
"""What is compared, and of it what."""


def run_case(case: dict[str, Any], image: bytes = b"", ours: bool = False) -> list[str]:
    """The differences between our run and the recorded one, one line each; empty if they agree.

    With ``ours`` our kernel stages run on what the recorded stub left, and no ``image`` is needed.
    """
    if ours:
        from tools.conformance.our_boot import compare

        return compare(case)
    from tools.conformance.record_boot import run_boot

    release, _, build = (parse_bzimage(image).kernel_version or "").partition(" ")
    build = build.partition(") ")[2]
    if f"Linux version {release} " not in case["dmesg"] or build not in case["dmesg"]:
        raise LeftOut(f"recorded with another image: this one is {release} {build}")
    return differences(run_boot(case, image), case)


def differences(ours: dict[str, Any], recorded: dict[str, Any], names: Iterable[str] = tuple(COMPARED)) -> list[str]:
    """A line for each of ``names`` that is not the same in both."""
    pairs = ((name, COMPARED[name](ours[name]), COMPARED[name](recorded[name])) for name in names)
    return [f"{name}: {first_difference(found, expected)}" for name, found, expected in pairs if found != expected]
