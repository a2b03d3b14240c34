"""The kernel that our decompressor leaves, against the real one's, and against another reading of its lists."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bootstub.bzimage import parse_bzimage
from bootstub.events import KernelPlaced
from tests.relocation_model import BASE, moved_segments
from tools.conformance.record_decompressor import run_decompressor
from tools.judge_decompressor_maps import set_up
from tools.parallel import in_parallel
from tools.pipeline import Boot, BootConfig

KERNELS = ["debian_kernel", "debian_kernel_6_1"]
GIB = 1 << 30


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Path:
    """The kernel with the name of the parameter; 6.12 is packed with zstd, 6.1 with lz4."""
    path: Path = request.getfixturevalue(request.param)
    return path


@cache
def image_of(path: Path) -> bytes:
    return path.read_bytes()


@dataclass(frozen=True)
class Both:
    """What both decompressors leave on a set-up, ours first: with ``nokaslr``, or where this TSC leads."""

    path: Path

    def __call__(self, tsc: int | None) -> list[dict[str, Any]]:
        image = image_of(self.path)
        case = set_up(0, 1, parse_bzimage(image).init_size) | {"chosen_by_tsc": True}
        case |= {"cmdline": "nokaslr"} if tsc is None else {"cmdline": "", "tsc0": tsc}
        return [run_decompressor(case, image, ours, full=True) for ours in (True, False)]


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_the_real_decompressor_leaves_the_same(kernel: Path) -> None:
    """Without KASLR and with three seeds, all that was unpacked is the same to the byte, and so is boot_params."""
    results = list(in_parallel(Both(kernel), iter([None, 1, 22, 333]), os.cpu_count() or 1, 1))
    for ours, real in results:
        for field in ("died", "output", "virt", "image", "boot_params"):
            assert ours[field] == real[field]
    virtual = [ours["virt"] for ours, _ in results]
    assert virtual[0] == BASE
    assert len(set(virtual)) == len({ours["image"] for ours, _ in results}) == 4


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_another_reading_of_the_lists(kernel: Path, seed: int | None) -> None:
    """The segments in memory are those that the other reading moves as far, without KASLR and with three seeds."""
    cmdline, seed_of_boot = ("nokaslr", 0) if seed is None else ("", seed)
    boot = Boot(BootConfig(image_of(kernel), memory=8 * GIB, cmdline=cmdline, seed=seed_of_boot))
    boot.run("decompress")
    placed = next(r.event for r in boot.trace.records if isinstance(r.event, KernelPlaced))
    assert (placed.virtual == placed.physical == BASE) == (seed is None)
    expected = moved_segments(kernel, placed.virtual - BASE)
    assert {at: boot.physical.read(placed.physical + at, len(data)) for at, data in expected.items()} == expected
