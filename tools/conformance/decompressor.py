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


def run_case(case: dict[str, Any], image: bytes) -> list[str]:
    """The differences between our run and the recorded one, one line each; empty if they agree."""
    size = parse_bzimage(image).init_size
    if size != case["init_size"]:
        raise LeftOut(f"recorded with another image: this one needs {size} bytes to unpack itself")
    recorded = case | {
        "bits_after": case["table"] and case["table"]["bits_after"],
        "serial": case["serial"].split("\r\n")[:-1],
    }
    ours = run_decompressor(case, image)
    return [
        f"{name}: found {found!r}, expected {recorded[name]!r}"
        for name, found in ours.items()
        if found != recorded[name]
    ]
