"""What reads bytes from outside, each as a function of bytes: it returns, or raises ``BootError``."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass

from bootstub.protocol import MAINLINE
from bootstub.relocations import read_relocations, relocate
from bootstub.vmlinux import kernel_total_size, load_segments
from firmware.hob import EFI_HOB_TYPE_RESOURCE_DESCRIPTOR, resource_of, walk_hobs
from firmware.tdvf import parse_tdvf
from guest.errors import BootError
from tests.fuzz import seeds
from tests.refusals import check_refusal
from tools import dump_boot_params, dump_hob, dump_kernel, dump_tdvf
from tools.kernel_image import KernelImage
from tools.maps import write
from tools.maps.binary import Image, parse_image
from tools.maps.notes import notes
from tools.maps.platform_map import PlatformMap
from tools.maps.source import boot_descriptors, parse_bytes
from tools.pipeline import Boot, BootConfig

MEMORY = 1 << 28
"""Of the guests that boot."""


@dataclass(frozen=True)
class Target:
    """Readers of one kind of input, each run on it apart; sound inputs to start from; its share of all inputs."""

    name: str
    seeds: list[bytes]
    readers: tuple[Callable[[bytes], None], ...]
    share: float

    def run(self, data: bytes) -> bool:
        """Give ``data`` to every reader; True if none refused it.

        Anything but a ``BootError`` with words, and not too many, gets out.
        """
        sound = True
        for reader in self.readers:
            try:
                reader(data)
            except BootError as error:
                check_refusal(error)
                sound = False
        return sound


def _dump_kernel(data: bytes) -> None:
    dump = dump_kernel.Dump(KernelImage(data))
    for _ in (*dump_kernel.text(dump), *dump_kernel.hex_lines(dump)):
        pass
    dump_kernel.to_json(dump)


def _bootable(data: bytes) -> None:
    image = KernelImage(data)
    image.bootable()
    assert image.support.reason


def _relocate(data: bytes) -> None:
    kernel = load_segments(data)
    kernel_total_size(data, kernel)
    end = max(segment.p_paddr + segment.p_filesz for segment in kernel.segments)
    image = bytearray(min(max(end - seeds.LOAD, 0), 1 << 24))
    relocate(image, seeds.LOAD, read_relocations(data, kernel), 1 << 21)


def _boot_v9(data: bytes) -> None:
    Boot(BootConfig(data, memory=MEMORY)).run("decompress")


def _boot_mainline(data: bytes) -> None:
    Boot(BootConfig(data, memory=MEMORY, protocol=MAINLINE, cmdline="")).run("efi-stub")


def _boot_params(data: bytes) -> None:
    dump_boot_params.text_lines(dump_boot_params.rows(data))
    dump_boot_params.to_json(data)


def _boot_params_map(data: bytes) -> None:
    _show(parse_bytes(data, "fuzz"))


def _setup_data(data: bytes) -> None:
    page = bytearray(seeds.boot_params())
    page[0x250:0x258] = data[:8].ljust(8, b"\0")

    def read(gpa: int, size: int) -> bytes:
        return data[gpa : gpa + size]

    dump_boot_params.text_lines(dump_boot_params.rows(bytes(page), read))
    dump_boot_params.to_json(bytes(page), read)


def _setup_data_map(data: bytes) -> None:
    page = bytearray(seeds.boot_params())
    page[0x250:0x258] = data[:8].ljust(8, b"\0")
    _show(parse_image(Image(io.BytesIO(data)), bytes(page), "fuzz"))


def _image_map(data: bytes) -> None:
    _show(parse_image(Image(io.BytesIO(data)), data[:4096], "fuzz"))


def _raw_map(data: bytes) -> None:
    (stride,) = struct.unpack("<H", data[:2].ljust(2, b"\0"))
    _show(parse_bytes(data[2:], "fuzz", stride))


def _guessed_map(data: bytes) -> None:
    _show(parse_bytes(data[2:], "fuzz"))


def _show(platform: PlatformMap) -> None:
    for lines in (write.efi_lines, write.e820_lines, write.dmesg_lines, write.table_lines):
        lines(platform)
    notes(platform)
    boot_descriptors(platform)


def _hob_list(data: bytes) -> None:
    for hob in walk_hobs(lambda at, size: data[at : at + size], 0):
        if hob.type == EFI_HOB_TYPE_RESOURCE_DESCRIPTOR:
            resource_of(hob)


def _dump_hob(data: bytes) -> None:
    found = dump_hob.hob_list(lambda at, size: data[at : at + size], 0)
    list(dump_hob.text(found))
    dump_hob.to_json(found)


def _host_hob_list() -> bytes:
    """The list that the host writes for the guest that boots."""
    boot = Boot(BootConfig(b"", memory=MEMORY))
    boot.run("host")
    return dump_hob.hob_list(boot.physical.read, boot.machine.regs.rcx).data


def _boot_hob(data: bytes) -> None:
    boot = Boot(BootConfig(seeds.bzimages()[0], memory=MEMORY))
    boot.run("host")
    boot.physical.write(boot.machine.regs.rcx, data[:0x1000])
    boot.run("firmware")


def _dump_tdvf(data: bytes) -> None:
    found = dump_tdvf.read(data)
    for _ in (*dump_tdvf.text(found), *dump_tdvf.hex_lines(found)):
        pass
    dump_tdvf.to_json(found)


def _launch(data: bytes) -> None:
    firmware = parse_tdvf(data)
    Boot(BootConfig(b"", memory=MEMORY, firmware=firmware)).run("host")


def all_targets() -> list[Target]:
    """Every kind of input. Boots are few: one takes as long as ten or a hundred of the others."""
    maps = [struct.pack("<H", stride) + seeds.raw_map(stride) for stride in (40, 48)]
    images = seeds.bzimages()
    return [
        Target("bzImage", images, (_bootable, _dump_kernel), 0.24),
        Target("vmlinux", [seeds.vmlinux()], (_bootable, _dump_kernel, _relocate), 0.14),
        Target("boot_params", [seeds.boot_params()], (_boot_params, _boot_params_map), 0.13),
        Target("setup_data", [seeds.setup_data()], (_setup_data, _setup_data_map), 0.14),
        Target("EFI map", maps, (_raw_map, _guessed_map), 0.128),
        Target("EFI map by boot_params", [seeds.memory_image()], (_image_map,), 0.06),
        Target("HOB list", [seeds.hob_list()], (_hob_list, _dump_hob), 0.1),
        Target("TDVF image", seeds.tdvf_images(), (_dump_tdvf, _launch), 0.05),
        Target("boot of a bzImage", images[:1] + images[-2:], (_boot_v9, _boot_mainline), 0.01),
        Target("boot with a HOB list", [_host_hob_list()], (_boot_hob,), 0.002),
    ]
