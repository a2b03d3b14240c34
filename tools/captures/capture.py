"""A captured boot: a directory with what a real kernel was given, and what it said and showed.

Files, all but the first two optional: ``boot_params.bin``; ``dmesg.txt`` or ``dmesg.txt.gz``; ``zoneinfo.txt``;
``iomem.txt``; ``vm.json`` (``min_free_kbytes``, ``cmdline``, ``proc_version``, ``cpuinfo``); ``snapshot.json``
(``setup_data_chain``); ``setup_data/N/{type.txt,data.bin}`` as /sys/kernel/boot_params has it;
``efi-raw/efi-memmap.bin``, ``efi-raw/efi-memory-attributes-table.bin``, ``efi-memmap.json``; ``acpi/SIGNATURE.bin``.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bootstub.boot_params import BOOT_PARAMS, BOOT_PARAMS_SIZE
from firmware.efi_types import EfiMemoryType
from guest.errors import FormatError
from guest.ranges import Range
from guest.records import RecordCopy
from guest.units import SZ_16M
from kernel.version import KernelVersion, version_of_release

_MAX_FILE = SZ_16M
_SOURCE = "tools/captures/capture.py"
_BRK = re.compile(r"memblock_reserve: \[(0x\w+)-0x\w+\] setup_arch\+")
_UPDATE = re.compile(r"e820: update \[mem (0x\w+)-0x\w+\] usable ==> usable")
_KERNEL_RESOURCE = re.compile(r"^ *([0-9a-f]+)-([0-9a-f]+) : Kernel (code|bss)$", re.MULTILINE)
_TIME = re.compile(r"^(?:<\d+>)?\[ *\d+\.\d+\] ")


@dataclass(frozen=True, slots=True)
class Capture:
    """What was captured; ``log`` is dmesg without time stamps, ``files`` gives bytes of a file, None if not there."""

    directory: Path
    boot_params: bytes
    log: list[str]
    vm: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Capture:
        """Read a capture; one without boot_params or log is a ``FormatError``."""
        boot_params, dmesg = _read(directory / "boot_params.bin"), _read_text(directory, "dmesg.txt")
        for name, found in (("boot_params.bin", boot_params), ("dmesg.txt", dmesg)):
            if found is None:
                raise _error(directory / name, "no such file", "one in every capture")
        assert boot_params is not None and dmesg is not None
        if len(boot_params) != BOOT_PARAMS_SIZE:
            raise _error(directory / "boot_params.bin", f"{len(boot_params)} bytes", f"{BOOT_PARAMS_SIZE} bytes")
        log = [_untimed(line) for line in dmesg.splitlines()]
        first = next((number for number, line in enumerate(log) if line.startswith("Linux version ")), 0)
        return cls(directory, boot_params, log[first:], _json(directory / "vm.json"))

    @property
    def params(self) -> RecordCopy:
        """The fields of boot_params."""
        return RecordCopy(self.boot_params, BOOT_PARAMS)

    @property
    def complete(self) -> bool:
        """False if the start of the log was overwritten before it was read."""
        return bool(self.log) and self.log[0].startswith("Linux version ")

    @property
    def version(self) -> KernelVersion:
        """The kernel's version, from the log's first line or /proc/version."""
        text = self.log[0] if self.complete else str(self.vm.get("proc_version", ""))
        found = re.match(r"Linux version (\S+)", text)
        if found is None:
            raise _error(self.directory, "no line 'Linux version'", "the kernel's version in dmesg or vm.json")
        return version_of_release(found[1])

    @property
    def command_line(self) -> str:
        """The kernel's command line."""
        said = next((line for line in self.log if line.startswith("Command line: ")), None)
        return said.removeprefix("Command line: ") if said is not None else str(self.vm.get("cmdline", "")).rstrip("\n")

    @property
    def image(self) -> Range | None:
        """Where the kernel lay, from its code to the end of its bss, by /proc/iomem; None if that is not known.

        Without that file, by the brk area that it reserved behind its bss, and the EFI memory that it was loaded into.
        """
        text = _read_text(self.directory, "iomem.txt") or ""
        found = {name: (int(start, 16), int(end, 16)) for start, end, name in _KERNEL_RESOURCE.findall(text)}
        if not found.keys() >= {"code", "bss"}:
            return self._image_by_log()
        return Range(found["code"][0], found["bss"][1] + 1)

    def _image_by_log(self) -> Range | None:
        brk = next((found for line in self.log if (found := _BRK.match(line))), None)
        entries = self.json("efi-memmap.json").get("entries", [])
        for entry in entries if brk and isinstance(entries, list) else []:
            start, end = int(entry.get("start", 0)), int(entry.get("end", 0))
            if brk and entry.get("type") == EfiMemoryType.EfiLoaderCode and start < int(brk[1], 16) <= end:
                return Range(start, int(brk[1], 16))
        return None

    @property
    def cpu_flags(self) -> frozenset[str]:
        """Words of the first ``flags`` line of /proc/cpuinfo."""
        found = re.search(r"^flags\s*: (.*)$", str(self.vm.get("cpuinfo", "")), re.MULTILINE)
        return frozenset(found[1].split()) if found else frozenset()

    @property
    def setup_data(self) -> list[tuple[int, int, bytes]]:
        """Address, type and data of each node, in order; zeros where only the length of the data is known."""
        chain = _json(self.directory / "snapshot.json").get("setup_data_chain")
        if isinstance(chain, list) and chain and all(isinstance(node, dict) for node in chain):
            known = [[_number(str(node.get(key, "0"))) for key in ("addr", "type", "len")] for node in chain]
        else:
            updates = (_UPDATE.match(line) for line in self.log)
            known = [[at, 0, 0] for at in dict.fromkeys(int(found[1], 16) for found in updates if found)]
        nodes = []
        for number, (at, kind, size) in enumerate(known):
            node = _node(self.directory / f"setup_data/{number}") or (kind, bytes(min(size, _MAX_FILE)))
            nodes.append((at, *node))
        return nodes

    def file(self, name: str) -> bytes | None:
        """Bytes of a file of the capture, or of the same with ``.gz``; None if there is none."""
        return _read(self.directory / name)

    def text(self, name: str) -> str | None:
        """Text of such a file."""
        return _read_text(self.directory, name)

    def json(self, name: str) -> dict[str, Any]:
        """The object in such a file; empty if there is none."""
        return _json(self.directory / name)


def _node(directory: Path) -> tuple[int, bytes] | None:
    """Type and data of a setup_data node as sysfs has it."""
    data = _read(directory / "data.bin")
    kind = (_read(directory / "type.txt") or b"").decode("ascii", "replace").strip()
    return None if data is None else (_number(kind), data)


def _untimed(line: str) -> str:
    return _TIME.sub("", line.rstrip("\r"))


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        return 0


def _error(path: Path, found: str, expected: str) -> FormatError:
    return FormatError(str(path), found=found, expected=expected, source=_SOURCE)


def _read(path: Path) -> bytes | None:
    """The file, or what its ``.gz`` unpacks to; one of more than 16 MiB is refused."""
    packed = path.with_name(path.name + ".gz")
    plain = path.is_file()
    if not plain and not packed.is_file():
        return None
    with path.open("rb") if plain else gzip.open(packed) as file:
        try:
            data = file.read(_MAX_FILE + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _error(packed, str(error), "a whole gzip file") from error
    if len(data) > _MAX_FILE:
        raise _error(path, "more than 16 MiB", "a file of a capture")
    return data


def _read_text(directory: Path, name: str) -> str | None:
    data = _read(directory / name)
    return None if data is None else data.decode("utf-8", errors="replace")


def _json(path: Path) -> dict[str, Any]:
    data = _read(path)
    if data is None:
        return {}
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _error(path, str(error), "a JSON object") from error
    if not isinstance(found, dict):
        raise _error(path, type(found).__name__, "a JSON object")
    return found
