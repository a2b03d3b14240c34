"""Compare recorded runs of a real EFI stub with runs of the same image on our firmware and TDX module.

A case is a dict: its set-up (``record_stub.SET_UP``), ``input_map``, the memory map at the image's entry, and
``out``, what came of it. These differ without a meaning, and are not compared:

* the system table's address in boot_params (``efi_systab``): where a firmware keeps it is its own choice;
* handles, for the same reason;
* map keys as such; their distances from the first one are compared;
* the detail in the status of a page that was accepted before (the level it has).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bootstub.boot_params import BOOT_PARAMS, BOOT_PARAMS_SIZE
from guest.errors import MemoryFault
from guest.records import field_extents
from tdx.status import TDX_PAGE_ALREADY_ACCEPTED
from tools.conformance.left_out import LeftOut
from tools.conformance.record_stub import image_size, run_stub

_DETAIL = 0xFFFF_FFFF
_COMPARED = (
    "stop", "stub_exit_status", "kernel_pa", "kernel_va", "kernel_entry", "boot_params_pa", "e820", "setup_data",
    "table", "accept_calls", "still_pending", "config_tables", "map_at_bitmap", "map_at_exit", "console", "cpuid",
    "rdtsc", "died",
)  # fmt: skip
_COMPARED_IF_RECORDED = ("command_line", "initrd", "variables", "seed_table")
"""What the first recordings do not have."""


def run_case(case: dict[str, Any], image: bytes, ours: bool = False) -> list[str]:
    """The differences between our run and the recorded one, one line each; empty if they agree.

    With ``ours`` it is our stub that runs. It reads CPUID less often than the real one, and where that one halts it
    stops with words.
    """
    size = image_size(image)
    if size != case["firmware"]["image_size"]:
        raise LeftOut(f"recorded with another image: this one has {size} bytes in memory")
    try:
        run = run_stub(case, image, ours)
    except MemoryFault as error:
        if error.kind == "accept":
            raise LeftOut("the stub accepts what is no RAM; a real host has nothing to map there") from error
        raise
    if run["input_map"] != case["input_map"]:
        raise LeftOut("the memory map at the image's entry is not the recorded one")
    return differences(run, case["out"], ours)


def differences(run: dict[str, Any], recorded: dict[str, Any], ours: bool) -> list[str]:
    """The differences between two runs, one line each; with ``ours``, ``run`` is one of our stub."""
    if ours:
        run, recorded = (_without_processor(out) for out in (run, recorded))
    return list(_differences(run, recorded))


def _without_processor(out: dict[str, Any]) -> dict[str, Any]:
    return out | {"cpuid": None, "stop": out["stop"].partition("halted")[:2]}


def _differences(ours: dict[str, Any], recorded: dict[str, Any]) -> Iterator[str]:
    if recorded["map_at_bitmap"] == "map_at_exit":
        recorded = recorded | {"map_at_bitmap": recorded["map_at_exit"]}
    comparable = _comparable(ours), _comparable(recorded)
    in_both = tuple(name for name in _COMPARED_IF_RECORDED if name in ours and name in recorded)
    for name in (*_COMPARED, *in_both, *_COMPARED_IN_PART):
        found, expected = (out.get(name) for out in comparable)
        if found != expected:
            yield f"{name}: {first_difference(found, expected)}"


def _comparable(out: dict[str, Any]) -> dict[str, Any]:
    """``out`` without what differs without a meaning."""
    return out | {name: strip(out[name]) for name, strip in _COMPARED_IN_PART.items() if name in out}


def _without_detail(accepts: list[list[int]]) -> list[list[int]]:
    return [
        [gpa, level, status & ~_DETAIL if status & ~_DETAIL == TDX_PAGE_ALREADY_ACCEPTED else status, count]
        for gpa, level, status, count in accepts
    ]


def _comparable_calls(calls: list[list[Any]]) -> list[list[Any]]:
    first_key = next((fields["key"] for _, fields, _ in calls if "key" in fields), 0)
    out = []
    for name, arguments, status in calls:
        fields = {key: value for key, value in arguments.items() if key != "handle"}
        if "key" in fields:
            fields["key"] -= first_key
        out.append([name, fields, status])
    return out


def _comparable_page(sparse: list[list[Any]]) -> bytes:
    """The page that a list of ``[offset, hexadecimal]`` stands for, without what is the firmware's own."""
    page = bytearray(BOOT_PARAMS_SIZE)
    for offset, text in sparse:
        data = bytes.fromhex(text)
        page[offset : offset + len(data)] = data
    for name in ("efi_info.efi_systab", "efi_info.efi_systab_hi"):
        at, size = field_extents(BOOT_PARAMS)[name]
        page[at : at + size] = bytes(size)
    return bytes(page)


_COMPARED_IN_PART: dict[str, Callable[[Any], Any]] = {
    "accept": _without_detail,
    "calls": _comparable_calls,
    "boot_params": _comparable_page,
}


def first_difference(found: Any, expected: Any) -> str:
    """The first place where two lists or pages differ, or the values themselves."""
    if not isinstance(found, list | bytes) or type(found) is not type(expected):
        return f"found {found!r}, expected {expected!r}"
    at = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return f"found {len(found)} entries, expected {len(expected)}"
    return f"[{at}] found {found[at]!r}, expected {expected[at]!r}"
