"""Our own firmware's map: what a TD of some size and machine has when its kernel is entered.

``td:4G``, ``td:4G,pc,max-ram-below-4g=3G``, ``td:64G,accept-policy=size=512M,numa=2``: memory, perhaps a machine, and
any options of a boot, as ``boot`` has them. What does not begin with the name of an option belongs to the one before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bootstub.boot_params import e820_table_of
from bootstub.efi_e820 import efi_descriptors
from firmware.efi_types import EfiMemoryType
from firmware.memory_descriptor import MemoryDescriptor
from guest.ranges import RangeSet
from tools.maps.platform_map import PlatformMap, efi_map
from tools.options import MAP_OPTIONS, OPTIONS

if TYPE_CHECKING:
    from tools.pipeline import Boot

PREFIX = "td:"
FORM = "the firmware's map of a TD"
TD_SHIM_FORM = "e820 and bitmap of a TD, as td-shim hands them over"
_NOT_HERE = frozenset({"memory", "machine", "efi-map", *(option.name for option in MAP_OPTIONS)})
_OPTIONS = {option.name: option for option in OPTIONS if option.name not in _NOT_HERE}


def td_texts(spec: str) -> dict[str, Any]:
    """The options of ``td:MEMORY[,MACHINE][,OPTION=VALUE]...``, by name."""
    memory, *pieces = spec.removeprefix(PREFIX).split(",")
    texts: dict[str, Any] = {"memory": memory}
    name, values = "machine", list[str]()
    for piece in [*pieces, None]:
        word = piece.partition("=")[0] if piece is not None else ""
        if piece is not None and word not in _OPTIONS:
            values.append(piece)
            continue
        _keep(texts, name, ",".join(values))
        name, values = word, [piece.partition("=")[2]] if piece is not None else []
    return texts


def _keep(texts: dict[str, Any], name: str, text: str) -> None:
    """Add an option's text; of one that can be repeated all are kept, of another one the last."""
    if name in _OPTIONS and _OPTIONS[name].many:
        texts.setdefault(name, []).append(text)
    elif name in _OPTIONS or text:
        texts[name] = text


def td_boot(spec: str, more: Iterable[tuple[str, str]] = ()) -> Boot:
    """The boot of ``spec`` and ``more`` options, not begun. Raises ``FormatError`` and ``OSError``."""
    from tools.config import config_of_texts
    from tools.pipeline import Boot

    return Boot(config_of_texts(td_texts(spec) | dict(more)))


def td_map(spec: str, more: Iterable[tuple[str, str]] = ()) -> PlatformMap:
    """The map of ``spec`` and ``more`` options, after the stages host and firmware."""
    boot = td_boot(spec, more)
    boot.run("firmware")
    nodes = boot.config.nodes
    if boot.firmware_map is not None:
        return efi_map(boot.firmware_map.descriptors(), spec, FORM, nodes)
    return efi_map(_td_shim_map(boot), spec, TD_SHIM_FORM, nodes)


def _td_shim_map(boot: Boot) -> list[MemoryDescriptor]:
    """The e820 table in EFI's words, and in it what the bitmap says is unaccepted."""
    from tools.verdict import unaccepted_by_bitmap

    assert boot.boot_params is not None
    unaccepted = unaccepted_by_bitmap(boot) or RangeSet()
    out = []
    for d in efi_descriptors(e820_table_of(boot.boot_params)):
        pieces = [(*gap, d.type, d.attribute) for gap in unaccepted.gaps(d.start, d.end)]
        kind = EfiMemoryType.EfiUnacceptedMemoryType
        pieces += [(*part, kind, 0) for part in unaccepted.within(d.start, d.end)]
        out += [MemoryDescriptor.of_range(type, start, end, attr) for start, end, type, attr in sorted(pieces)]
    return out
