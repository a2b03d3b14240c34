"""MRTD of a TD that was built from an image, against a script that knows only the rule and the bytes."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest

from firmware.launch import launch_td
from firmware.ovmf_layout import BUILT_IN
from firmware.tdvf import parse_tdvf

MRTD_OF_DEBIAN_OVMF = "4c7206f0f483c524f12c366c711e9049030a8d47c471ee5aa9c4999a08de4057fb887fed0744d5631a212967fb231c47"


def mrtd_of_image(image: bytes) -> str:
    """MRTD by the rule of the design guide, straight from the bytes of an image."""
    footer = image.rindex(bytes.fromhex("de82b596b21ff745baeaa366c55a082d"))
    end = footer - 2
    while True:
        length, guid = struct.unpack_from("<H16s", image, end - 18)
        if guid == bytes.fromhex("35657ae44a989847865e4685a7bf8ec2"):
            break
        end -= length
    at = len(image) - struct.unpack_from("<I", image, end - length)[0]
    digest = hashlib.sha384()
    for number in range(struct.unpack_from("<I", image, at + 12)[0]):
        offset, raw, gpa, size, _, attributes = struct.unpack_from("<IIQQII", image, at + 16 + 32 * number)
        data = image[offset : offset + raw].ljust(size, b"\0")
        for page in range(0, size, 4096):
            if not attributes & 2:
                digest.update(b"MEM.PAGE.ADD".ljust(16, b"\0") + struct.pack("<Q", gpa + page) + bytes(104))
            if attributes & 1:
                for chunk in range(page, page + 4096, 256):
                    digest.update(b"MR.EXTEND".ljust(16, b"\0") + struct.pack("<Q", gpa + chunk) + bytes(104))
                    digest.update(data[chunk : chunk + 256])
    return digest.hexdigest()


def test_mrtd_of_debian_ovmf(make_lab, exact_debian_ovmf: Path) -> None:
    """A TD built from Debian's OVMF has the MRTD that the rule gives for the image's bytes."""
    image = exact_debian_ovmf.read_bytes()
    lab = make_lab(4 << 30)
    launch_td(lab.host, parse_tdvf(image), [], lab.machine.regs)
    mrtd = lab.host.seam.measurement.mrtd.hex()
    assert mrtd == mrtd_of_image(image) == MRTD_OF_DEBIAN_OVMF


def test_mrtd_does_not_depend_on_memory(make_lab) -> None:
    """TD_HOB is added but its contents are not measured: two sizes of memory have one MRTD."""
    small, large = make_lab(1 << 30), make_lab(64 << 30)
    for lab in (small, large):
        launch_td(lab.host, BUILT_IN, [], lab.machine.regs)
    assert small.host.seam.measurement.mrtd == large.host.seam.measurement.mrtd


@pytest.mark.parametrize("attributes", [0, 1])
def test_only_sections_with_mr_extend_measure_their_contents(make_lab, tdvf_image, attributes) -> None:
    """Without the attribute a section's pages count by address alone, so that its bytes do not change MRTD."""
    digests = set()
    for fill in (0x11, 0x22):
        image = tdvf_image([(0x1000, 0x800, 0xFFFF_9000, 0x1000, 0, attributes), (0, 0, 0x9000, 0x2000, 2, 0)])
        image[0x1400] = fill
        lab = make_lab(1 << 28)
        launch_td(lab.host, parse_tdvf(bytes(image)), [], lab.machine.regs)
        digests.add(lab.host.seam.measurement.mrtd)
        assert lab.host.seam.measurement.mrtd.hex() == mrtd_of_image(bytes(image))
    assert len(digests) == 1 + attributes
