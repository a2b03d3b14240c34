"""Our own firmware's map: what a TD of some size and machine has when its kernel is entered."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from firmware.tdvf import Tdvf
from tools.maps.platform_map import PlatformMap, efi_map
from tools.options import parse_machine, parse_memory

if TYPE_CHECKING:
    from tools.pipeline import Boot

PREFIX = "td:"
FORM = "the firmware's map of a TD"


def td_boot(spec: str, firmware: Tdvf | None = None) -> Boot:
    """The boot of ``td:MEMORY[,MACHINE]``, not begun, with the image ``firmware`` or none. Raises ``FormatError``."""
    from bootstub.sample_kernel import sample_bzimage
    from tools.pipeline import Boot, BootConfig  # all stages: not for a map that comes from a file

    memory, _, machine = spec.removeprefix(PREFIX).partition(",")
    config = BootConfig(sample_bzimage(), parse_memory(memory), parse_machine(machine or "q35"))
    return Boot(config if firmware is None else replace(config, firmware=firmware))


def td_map(spec: str, firmware: Tdvf | None = None) -> PlatformMap:
    """The map of ``td:MEMORY[,MACHINE]``, after the stages host and firmware, with the image ``firmware`` or none."""
    boot = td_boot(spec, firmware)
    boot.run("firmware")
    assert boot.firmware_map is not None
    return efi_map(boot.firmware_map.descriptors(), spec, FORM)
