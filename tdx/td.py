"""A TD as its leaves see it: everything that the TDX module keeps of it."""

from __future__ import annotations

from dataclasses import dataclass

from tdx.config import TdConfig
from tdx.measurement import Measurement
from tdx.metadata import Metadata
from tdx.operands import Operands
from tdx.sept import SecureEpt
from tdx.ve import VeInfo
from tdx.vmm import Host


@dataclass(slots=True)
class Td:
    """One TD and its one virtual processor. ``ve_info`` is there while the guest has not read it."""

    config: TdConfig
    sept: SecureEpt
    host: Host
    metadata: Metadata
    measurement: Measurement
    operands: Operands
    ve_info: VeInfo | None = None
