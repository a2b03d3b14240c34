"""A read-only file system on a device: EFI_SIMPLE_FILE_SYSTEM_PROTOCOL and EFI_FILE_PROTOCOL.

Source: UEFI 2.10, sections 13.4 and 13.5; edk2 OvmfPkg/QemuKernelLoaderFsDxe, which has kernel and initrd in such one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import construct as c

from firmware.boot_services import EfiServices
from firmware.char16 import char16_bytes, find_char16
from firmware.efi_types import (
    EFI_FILE_INFO_ID,
    EFI_SIMPLE_FILE_SYSTEM_PROTOCOL_GUID,
    EfiMemoryType,
    EfiStatus,
    guid_bytes,
)

_FUNCTIONS = (
    ("Open", 5),
    ("Close", 1),
    ("Delete", 1),
    ("Read", 3),
    ("Write", 3),
    ("GetPosition", 2),
    ("SetPosition", 2),
    ("GetInfo", 4),
    ("SetInfo", 4),
    ("Flush", 1),
)
EFI_SIMPLE_FILE_SYSTEM_PROTOCOL = c.Struct("Revision" / c.Int64ul, "OpenVolume" / c.Int64ul)
EFI_FILE_PROTOCOL = c.Struct("Revision" / c.Int64ul, *(name / c.Int64ul for name, _ in _FUNCTIONS))
EFI_FILE_INFO = c.Struct(
    "Size" / c.Int64ul,
    "FileSize" / c.Int64ul,
    "PhysicalSize" / c.Int64ul,
    "CreateTime" / c.Default(c.Bytes(16), bytes(16)),
    "LastAccessTime" / c.Default(c.Bytes(16), bytes(16)),
    "ModificationTime" / c.Default(c.Bytes(16), bytes(16)),
    "Attribute" / c.Int64ul,
)
"""The fields before FileName."""
EFI_FILE_MODE_READ = 1
_READ_ONLY, _DIRECTORY = 0x01, 0x10
_REVISION = 0x10000
_END = (1 << 64) - 1


@dataclass(slots=True)
class _File:
    """An open file, or the root directory, which has no ``data``; the position is where the next Read() begins."""

    name: str
    data: bytes | None
    position: int = 0


class FileSystem:
    """The files of one device by name; none of them can be changed."""

    def __init__(self, services: EfiServices, files: Mapping[str, bytes]) -> None:
        self._services, self._memory, self._files = services, services.machine.memory, dict(files)
        self._open: dict[int, _File] = {}
        answers: dict[str, Callable[..., int]] = {
            "Open": self._open_file, "Close": self._close, "Read": self._read, "GetPosition": self._get_position,
            "SetPosition": self._set_position, "GetInfo": self._get_info,
        }  # fmt: skip
        code = EfiMemoryType.EfiBootServicesCode
        self._gates = {
            name: services.install_gates(((name, count),), code, answers.get(name, _refuse))[0]
            for name, count in _FUNCTIONS
        }

    def install(self, device: int) -> None:
        """Let the handle ``device`` carry it."""
        code, data = EfiMemoryType.EfiBootServicesCode, EfiMemoryType.EfiBootServicesData
        (gate,) = self._services.install_gates((("OpenVolume", 2),), code, self._open_volume)
        volume = EFI_SIMPLE_FILE_SYSTEM_PROTOCOL.build({"Revision": _REVISION, "OpenVolume": gate})
        self._services.install_protocol(
            device, EFI_SIMPLE_FILE_SYSTEM_PROTOCOL_GUID, self._services.arena.put(data, volume)
        )

    def _open_volume(self, this: int, root_at: int) -> int:
        return self._hand_out(_File("", None), root_at)

    def _open_file(self, this: int, handle_at: int, name_at: int, mode: int, attributes: int) -> int:
        """Open(): of the root directory, by a name with or without a backslash before it."""
        directory = self._open.get(this)
        if directory is None or 0 in (handle_at, name_at):
            return EfiStatus.EFI_INVALID_PARAMETER
        if mode != EFI_FILE_MODE_READ:
            return EfiStatus.EFI_WRITE_PROTECTED
        name = find_char16(self._memory, name_at)
        if directory.data is not None or name is None:
            return EfiStatus.EFI_UNSUPPORTED
        name = name.removeprefix("\\")
        if name in ("", "."):
            return self._hand_out(_File("", None), handle_at)
        if name not in self._files:
            return EfiStatus.EFI_NOT_FOUND
        return self._hand_out(_File(name, self._files[name]), handle_at)

    def _hand_out(self, file: _File, handle_at: int) -> int:
        protocol = EFI_FILE_PROTOCOL.build({"Revision": _REVISION, **self._gates})
        at = self._services.arena.put(EfiMemoryType.EfiBootServicesData, protocol)
        self._open[at] = file
        self._memory.write_uint(handle_at, at, 8)
        return EfiStatus.EFI_SUCCESS

    def _close(self, this: int) -> int:
        return EfiStatus.EFI_INVALID_PARAMETER if self._open.pop(this, None) is None else EfiStatus.EFI_SUCCESS

    def _read(self, this: int, size_at: int, buffer: int) -> int:
        """Read(): no more than there is; nothing at the end, EFI_DEVICE_ERROR behind it."""
        file = self._open.get(this)
        if file is None or size_at == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        if file.data is None:
            return EfiStatus.EFI_UNSUPPORTED
        if file.position > len(file.data):
            return EfiStatus.EFI_DEVICE_ERROR
        piece = file.data[file.position : file.position + self._memory.read_uint(size_at, 8)]
        self._memory.write_uint(size_at, len(piece), 8)
        if piece:
            self._memory.write(buffer, piece)
        file.position += len(piece)
        return EfiStatus.EFI_SUCCESS

    def _get_position(self, this: int, position_at: int) -> int:
        file = self._open.get(this)
        if file is None or position_at == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        self._memory.write_uint(position_at, file.position, 8)
        return EfiStatus.EFI_SUCCESS

    def _set_position(self, this: int, position: int) -> int:
        file = self._open.get(this)
        if file is None:
            return EfiStatus.EFI_INVALID_PARAMETER
        if file.data is None and position:
            return EfiStatus.EFI_UNSUPPORTED
        file.position = len(file.data or b"") if position == _END else position
        return EfiStatus.EFI_SUCCESS

    def _get_info(self, this: int, type_at: int, size_at: int, buffer: int) -> int:
        """GetInfo(): EFI_FILE_INFO alone."""
        file = self._open.get(this)
        if file is None or 0 in (type_at, size_at):
            return EfiStatus.EFI_INVALID_PARAMETER
        if self._memory.read(type_at, 16) != guid_bytes(EFI_FILE_INFO_ID):
            return EfiStatus.EFI_UNSUPPORTED
        name, size = char16_bytes(file.name), len(file.data or b"")
        fields = {"Size": EFI_FILE_INFO.sizeof() + len(name), "FileSize": size, "PhysicalSize": size}
        info = EFI_FILE_INFO.build(fields | {"Attribute": _READ_ONLY | (_DIRECTORY if file.data is None else 0)}) + name
        room = self._memory.read_uint(size_at, 8)
        self._memory.write_uint(size_at, len(info), 8)
        if room < len(info):
            return EfiStatus.EFI_BUFFER_TOO_SMALL
        self._memory.write(buffer, info)
        return EfiStatus.EFI_SUCCESS


def _refuse(*_: int) -> int:
    """What would change a file."""
    return EfiStatus.EFI_UNSUPPORTED
