"""Files that the command line names, ``initrd=NAME``, read from the device that the kernel came from.

Source: drivers/firmware/efi/libstub/file.c, handle_cmdline_files() (6.12).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from bootstub.efi_call import EfiCalls, EfiError
from firmware.char16 import char16_bytes
from firmware.efi_types import (
    EFI_DEVICE_PATH_FROM_TEXT_PROTOCOL_GUID,
    EFI_FILE_INFO_ID,
    EFI_SIMPLE_FILE_SYSTEM_PROTOCOL_GUID,
    EfiStatus,
    guid_bytes,
)
from firmware.file_system import EFI_FILE_INFO, EFI_FILE_MODE_READ, EFI_FILE_PROTOCOL, EFI_SIMPLE_FILE_SYSTEM_PROTOCOL
from guest.records import GuestRecord
from guest.units import PAGE_SIZE, SZ_1M, round_up

_MAX_FILENAME_SIZE = 256
_NAME_END = "\0\n "
_FINFO_SIZE = EFI_FILE_INFO.sizeof() + 2 * _MAX_FILENAME_SIZE


@dataclass(slots=True)
class CmdlineFiles:
    """Files by ``option`` in ``load_options``, one behind the other in memory from ``at`` on, ``size`` bytes so far.

    ``device`` is the handle of the kernel's device. Memory ends below ``soft_limit`` if it can. A file is read in
    pieces of ``chunk`` bytes.
    """

    efi: EfiCalls
    device: int
    soft_limit: int
    chunk: int = SZ_1M
    at: int = 0
    size: int = 0

    def load(self, load_options: bytes, option: str) -> bool:
        """Load all of them; False if there is none, or no file system. Raises ``EfiError``; then nothing is kept."""
        try:
            for name in file_names(load_options, option):
                self._load(name)
        except EfiError as error:
            self.efi.free_pages(self.at, self.size)
            if error.status in (EfiStatus.EFI_UNSUPPORTED, EfiStatus.EFI_NOT_READY):
                return False
            raise
        return self.size > 0

    def _load(self, name: str) -> None:
        self.efi.locate_protocol(EFI_DEVICE_PATH_FROM_TEXT_PROTOCOL_GUID)  # the name may be a path, if somebody has it
        volume = self._open_volume()
        try:
            file = self._open(volume, name)
            try:
                size = self._file_size(file)
                self._room_for(size)
                self._read(file, size)
            finally:
                self._call(file, "Close")
        finally:
            self._call(volume, "Close")

    def _open_volume(self) -> GuestRecord:
        """efi_open_volume(): the root directory of the kernel's device."""
        memory, guid = self.efi.memory, self.efi.bytes_at_scratch(guid_bytes(EFI_SIMPLE_FILE_SYSTEM_PROTOCOL_GUID))
        self._check(self.efi.boot("HandleProtocol", self.device, guid, self.efi.slot(1)), "Failed to handle fs_proto")
        io = GuestRecord(memory, self.efi.load(1), EFI_SIMPLE_FILE_SYSTEM_PROTOCOL)
        self._check(self.efi.call(io["OpenVolume"], io.gpa, self.efi.slot(1)), "Failed to open volume")
        return GuestRecord(memory, self.efi.load(1), EFI_FILE_PROTOCOL)

    def _open(self, volume: GuestRecord, name: str) -> GuestRecord:
        """efi_open_file(): with the separators of EFI."""
        name = name.replace("/", "\\")
        name_at = self.efi.buffer_below_scratch(char16_bytes(name))
        status = self._call(volume, "Open", self.efi.slot(1), name_at, EFI_FILE_MODE_READ, 0)
        self._check(status, f"Failed to open file: {name}")
        return GuestRecord(self.efi.memory, self.efi.load(1), EFI_FILE_PROTOCOL)

    def _file_size(self, file: GuestRecord) -> int:
        guid, info = self.efi.bytes_at_scratch(guid_bytes(EFI_FILE_INFO_ID)), self.efi.buffer_below_scratch(b"")
        status = self._call(file, "GetInfo", guid, self.efi.slot(1, _FINFO_SIZE), info)
        self._check(status, "Failed to get file info")
        return GuestRecord(self.efi.memory, info, EFI_FILE_INFO)["FileSize"]

    def _room_for(self, size: int) -> None:
        """More memory if a file of ``size`` bytes needs it; what was read before moves along."""
        total = self.size + size
        if round_up(total, PAGE_SIZE) <= round_up(self.size, PAGE_SIZE):
            return
        old = self.at
        try:
            self.at = self._allocate(total)
        except EfiError:
            self.efi.error("Failed to allocate memory for files")
            raise
        if old:
            self.efi.memory.write(self.at, self.efi.memory.read(old, self.size))
            self.efi.free_pages(old, self.size)

    def _allocate(self, size: int) -> int:
        try:
            return self.efi.allocate_pages(size, self.soft_limit)
        except EfiError as error:
            if error.status != EfiStatus.EFI_OUT_OF_RESOURCES:
                raise
            return self.efi.allocate_pages(size)

    def _read(self, file: GuestRecord, size: int) -> None:
        at = self.at + self.size
        self.size += size
        while size:
            status = self._call(file, "Read", self.efi.slot(1, min(size, self.chunk)), at)
            self._check(status, "Failed to read file")
            got = self.efi.load(1)
            if not 0 < got <= size:
                raise EfiError(EfiStatus.EFI_LOAD_ERROR)  # the real stub would go on for ever
            at, size = at + got, size - got

    def _call(self, file: GuestRecord, function: str, *args: int) -> int:
        return self.efi.call(file[function], file.gpa, *args)

    def _check(self, status: int, message: str) -> None:
        if status != EfiStatus.EFI_SUCCESS:
            self.efi.error(message)
            raise EfiError(status)


def file_names(load_options: bytes, option: str) -> Iterator[str]:
    """find_file_option(): what follows each ``option``, wherever it stands, up to a blank or an end.

    Leading slashes are dropped. A name has 255 characters at most; what is left of it is looked through again.
    """
    units, at = "".join(map(chr, struct.unpack_from(f"<{len(load_options) // 2}H", load_options))), 0
    while (found := units.find(option, at)) >= 0 and found + len(option) < len(units):
        at = found + len(option)
        while at < len(units) and units[at] in "/\\":
            at += 1
        name = ""
        while len(name) < _MAX_FILENAME_SIZE - 1 and at < len(units):
            at += 1
            if units[at - 1] in _NAME_END:
                break
            name += units[at - 1]
        yield name
