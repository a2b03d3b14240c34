"""From the EFI entry point to the kernel's entry: boot_params, the EFI stub, the decompressor."""
