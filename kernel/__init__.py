"""start_kernel's view of memory: e820, memblock, zones, page allocator, lazy acceptance."""
