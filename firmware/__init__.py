"""UEFI as a boot loader sees it: TDVF, TD HOB, memory map, tables, services, OVMF's policies."""
