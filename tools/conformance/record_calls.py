"""Writing down firmware calls with what their pointers point to, while they happen."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from firmware.char16 import read_char16
from firmware.efi_types import EfiStatus
from firmware.tables import BOOT_SERVICES, RUNTIME_SERVICES
from guest.gates import CallGates
from guest.memory import GuestMemory
from guest.trace import Trace
from tools.conformance.efi_names import guid_name

Fields = dict[str, Any]
_PATH_SIZE = 24
_TABLES = {name: "bs" for name, _ in BOOT_SERVICES} | {name: "rt" for name, _ in RUNTIME_SERVICES}
_TABLES |= {"AllowUnacceptedMemory": "sev", "LoadFile": "lf2", "OpenVolume": "fs"}
_TABLES |= dict.fromkeys(("Open", "Close", "Read", "GetInfo"), "file")


class RecordingGates(CallGates):
    """Call gates that keep every call: ``calls`` has ``[name, arguments, status]``, ``console`` the text put out."""

    def __init__(self, trace: Trace, memory: GuestMemory) -> None:
        super().__init__(trace)
        self._memory = memory
        self.calls: list[list[Any]] = []
        self.console = ""

    def call(self, address: int, *args: int) -> int:
        """The call, written down around its execution."""
        gate = self.at(address)
        name = gate.name if gate else ""
        if name == "OutputString":
            self.console += read_char16(self._memory, args[1])
            return super().call(address, *args)
        fields = _BEFORE[name](self._memory, args) if name in _BEFORE else {}
        entry = [f"{_TABLES.get(name, 'rng')}.{_snake(name)}", fields, int(EfiStatus.EFI_SUCCESS)]
        self.calls.append(entry)
        status = entry[2] = super().call(address, *args)
        if name in _AFTER:
            fields |= _AFTER[name](self._memory, args, status)
        return status


def _before_allocate_pages(memory: GuestMemory, args: tuple[int, ...]) -> Fields:
    return {"kind": args[0], "type": args[1], "pages": args[2], "arg": memory.read_uint(args[3], 8)}


def _before_get_variable(memory: GuestMemory, args: tuple[int, ...]) -> Fields:
    return {"name": read_char16(memory, args[0]), "guid": guid_name(memory.read(args[1], 16))}


def _before_set_variable(memory: GuestMemory, args: tuple[int, ...]) -> Fields:
    name, guid, attributes, size, data = args
    value = memory.read(data, size).hex() if size else ""
    return _before_get_variable(memory, (name, guid)) | {"attr": attributes, "data": value}


def _before_locate_device_path(memory: GuestMemory, args: tuple[int, ...]) -> Fields:
    path = memory.read_uint(args[1], 8)
    return {"guid": guid_name(memory.read(args[0], 16)), "dp": memory.read(path, _PATH_SIZE).hex()}


def _before_get_rng(memory: GuestMemory, args: tuple[int, ...]) -> Fields:
    return {"n": args[2], "algo": guid_name(memory.read(args[1], 16)) if args[1] else 0}


def _after_get_memory_map(memory: GuestMemory, args: tuple[int, ...], status: int) -> Fields:
    size_at, buffer, key_at, stride_at, _ = args
    need = memory.read_uint(size_at, 8)
    fields = {"need": need, "n": need // memory.read_uint(stride_at, 8), "key": memory.read_uint(key_at, 8)}
    return fields | ({"buf": buffer} if status == EfiStatus.EFI_SUCCESS else {})


def _allocated(pointer: int) -> Callable[[GuestMemory, tuple[int, ...], int], Fields]:
    def after(memory: GuestMemory, args: tuple[int, ...], status: int) -> Fields:
        return {"addr": memory.read_uint(args[pointer], 8)} if status == EfiStatus.EFI_SUCCESS else {}

    return after


_BEFORE: dict[str, Callable[[GuestMemory, tuple[int, ...]], Fields]] = {
    "AllocatePages": _before_allocate_pages,
    "AllocatePool": lambda memory, args: {"type": args[0], "size": args[1]},
    "FreePool": lambda memory, args: {"addr": args[0]},
    "FreePages": lambda memory, args: {"addr": args[0], "pages": args[1]},
    "GetMemoryMap": lambda memory, args: {"have": memory.read_uint(args[0], 8)},
    "HandleProtocol": lambda memory, args: {"handle": args[0], "guid": guid_name(memory.read(args[1], 16))},
    "LocateProtocol": lambda memory, args: {"guid": guid_name(memory.read(args[0], 16))},
    "LocateHandle": lambda memory, args: {"kind": args[0], "guid": guid_name(memory.read(args[1], 16))},
    "LocateDevicePath": _before_locate_device_path,
    "InstallConfigurationTable": lambda memory, args: {"guid": guid_name(memory.read(args[0], 16)), "table": args[1]},
    "ExitBootServices": lambda memory, args: {"key": args[1]},
    "Exit": lambda memory, args: {"status": args[1]},
    "GetVariable": _before_get_variable,
    "Open": lambda memory, args: {"name": read_char16(memory, args[2]), "mode": args[3]},
    "Read": lambda memory, args: {"have": memory.read_uint(args[1], 8), "buf": args[2]},
    "GetRNG": _before_get_rng,
    "LoadFile": lambda memory, args: {"policy": args[2], "have": memory.read_uint(args[3], 8), "buf": args[4]},
    "SetVariable": _before_set_variable,
}
_AFTER: dict[str, Callable[[GuestMemory, tuple[int, ...], int], Fields]] = {
    "AllocatePages": _allocated(3),
    "AllocatePool": _allocated(2),
    "GetMemoryMap": _after_get_memory_map,
    "GetRNG": lambda memory, args, status: {"bytes": memory.read(args[3], args[2]).hex()},
    "Read": lambda memory, args, status: {"got": memory.read_uint(args[1], 8)},
    "LoadFile": lambda memory, args, status: {"need": memory.read_uint(args[3], 8)},
}


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
