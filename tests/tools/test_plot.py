"""``boot --plot``: the picture of acceptance over virtual time."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tools.plot import spread


def texts(svg: Path) -> list[str]:
    """The text of an SVG."""
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text())]


def test_svg(command, tmp_path):
    """The final values, the stages, and the milestones with their values stand in the picture as text."""
    svg = tmp_path / "boot.svg"
    answer = command("boot", "--plot", svg)
    assert (answer.status, answer.err) == (0, "")
    found = texts(svg)
    assert "accepted by the guest: 2496408 KiB" in found
    assert "added by the host while it built the TD: 4200 KiB" in found
    assert "still unaccepted: 1697792 KiB" in found
    assert "Accepted memory of a TD with 4 GiB, accept_memory=lazy" in found
    assert {"BIOS-e820  2.00 GiB", "Zone ranges  2.06 GiB", "Memory  2.08 GiB"} <= set(found)
    assert {"host", "firmware", "efi-stub", "decompress", "setup-arch", "mm-init", "runtime"} <= set(found)
    assert {"1 GiB", "4 GiB", "virtual time, ms"} <= set(found)


def test_eager_and_lazy_compare(command, tmp_path):
    """Both pictures have the guest's memory as their scale; the eager one leaves nothing unaccepted."""
    lazy, eager = tmp_path / "lazy.svg", tmp_path / "eager.svg"
    command("boot", "--plot", lazy)
    command("boot", "--cmdline", "accept_memory=eager", "--plot", eager)
    assert "still unaccepted: 0 KiB" in texts(eager)
    scales = [[text for text in texts(svg) if re.fullmatch(r"[0-9]+ GiB", text)] for svg in (lazy, eager)]
    assert scales[0] == scales[1] == ["1 GiB", "2 GiB", "3 GiB", "4 GiB"]


def test_the_same_boot_gives_the_same_bytes(command, tmp_path):
    """No date, no random identifiers."""
    for name in ("a.svg", "b.svg"):
        command("boot", "--plot", tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_png(command, tmp_path):
    """The suffix chooses the format; a guest that died has its picture too."""
    png = tmp_path / "boot.png"
    assert command("boot", "--memory", "48M", "--plot", png).status == 1
    assert png.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("name", ["boot.pdf", "boot", ".svg.gz", ""])
def test_other_formats(refused, tmp_path, name):
    """Any other name is refused before the boot."""
    assert "expected a name that ends in .svg or .png" in refused("boot", "--plot", f"{tmp_path}/{name}")


def test_no_such_directory(refused, tmp_path):
    """A picture that could not be written is refused before the boot too."""
    assert refused("boot", "--plot", f"{tmp_path}/none/boot.svg").startswith(f"--plot: found no '{tmp_path}/none'")


def test_without_matplotlib(refused, monkeypatch):
    """The extra is named, before the boot."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    assert refused("boot", "--plot", "x.svg") == "--plot needs matplotlib: pip install 'unaccepted[plot]'"


def test_labels_do_not_overlap():
    """Labels are moved apart, to the right first and back from the edge, in their order."""
    assert spread([0.1, 0.5], 0.1) == [0.1, 0.5]
    assert spread([0.2, 0.2, 0.2], 0.1) == pytest.approx([0.2, 0.3, 0.4])
    assert spread([0.0, 1.0, 1.0], 0.1) == pytest.approx([0.0, 0.9, 1.0])
    assert spread([], 0.1) == []
