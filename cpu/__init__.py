"""A vCPU that runs real x86-64 machine code on the guest's memory, firmware and TDX module."""
