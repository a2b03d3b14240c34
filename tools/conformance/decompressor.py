"""Compare recorded runs of a real decompressor with runs of the same image on our TDX module.

A case is a dict: ``memmap``, the EFI memory map in boot_params; where the loader put image, command line, boot_params
and the table of unaccepted memory; ``max_level``, the largest page that can be accepted; and what came of it.
``output`` and ``virt`` are where KASLR put the kernel, at random: the recorded choice is given to our run, which has
to find its way there (``tools.conformance.kaslr_seed``). Without KASLR they are compared as they are.
"""

from __future__ import annotations

from typing import Any

from bootstub.bzimage import parse_bzimage
from tools.conformance.left_out import LeftOut
from tools.conformance.record_decompressor import run_decompressor
from tools.conformance.stub import first_difference


def run_case(case: dict[str, Any], image: bytes, ours: bool = False) -> list[str]:
    """The differences between our run and the recorded one, one line each; empty if they agree.

    With ``ours`` it is our decompressor that runs. It takes no page faults, reads CPUID and TD information less often,
    and puts out lines without blank ones around.
    """
    size = parse_bzimage(image).init_size
    if size != case["init_size"]:
        raise LeftOut(f"recorded with another image: this one needs {size} bytes to unpack itself")
    return differences(run_decompressor(case, image, ours), comparable(case), ours)


def comparable(case: dict[str, Any]) -> dict[str, Any]:
    """What came of a recorded case, by the names that a run gives it."""
    serial = case["serial"].split("\r\n")[:-1]
    return case | {"bits_after": case["table"] and case["table"]["bits_after"], "serial": serial}


def differences(run: dict[str, Any], recorded: dict[str, Any], ours: bool) -> list[str]:
    """The differences in what both have; with ``ours``, ``run`` is one of our decompressor."""
    if ours:
        run, recorded = (
            out | {"serial": [line for line in out["serial"] if line], "tdcalls": None} for out in (run, recorded)
        )
    return [
        f"{name}: {first_difference(found, recorded[name])}"
        for name, found in run.items()
        if name in recorded and found != recorded[name]
    ]
