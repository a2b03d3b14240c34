"""Names of the lines of /proc/meminfo, vmstat and zoneinfo, in order, as Debian's 6.12 kernel prints them.

For v9 there are those of Debian's 6.1, the nearest kernel at hand, with what v9 adds.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MEMINFO = _words(
    """
    MemTotal MemFree MemAvailable Buffers Cached SwapCached Active Inactive Active(anon) Inactive(anon) Active(file)
    Inactive(file) Unevictable Mlocked SwapTotal SwapFree Dirty Writeback AnonPages Mapped Shmem KReclaimable Slab
    SReclaimable SUnreclaim KernelStack PageTables SecPageTables NFS_Unstable Bounce WritebackTmp CommitLimit
    Committed_AS VmallocTotal VmallocUsed VmallocChunk Percpu HardwareCorrupted AnonHugePages ShmemHugePages
    ShmemPmdMapped FileHugePages FilePmdMapped Unaccepted HugePages_Total HugePages_Free HugePages_Rsvd
    HugePages_Surp Hugepagesize Hugetlb DirectMap4k DirectMap2M
    """
)
"""/proc/meminfo (fs/proc/meminfo.c)."""

NODE_MEMINFO = _words(
    """
    MemTotal MemFree MemUsed SwapCached Active Inactive Active(anon) Inactive(anon) Active(file) Inactive(file)
    Unevictable Mlocked Dirty Writeback FilePages Mapped AnonPages Shmem KernelStack PageTables SecPageTables
    NFS_Unstable Bounce WritebackTmp KReclaimable Slab SReclaimable SUnreclaim AnonHugePages ShmemHugePages
    ShmemPmdMapped FileHugePages FilePmdMapped Unaccepted HugePages_Total HugePages_Free HugePages_Surp
    """
)
"""A node's meminfo (drivers/base/node.c)."""

ZONE_STATS = _words(
    """
    nr_free_pages nr_zone_inactive_anon nr_zone_active_anon nr_zone_inactive_file nr_zone_active_file
    nr_zone_unevictable nr_zone_write_pending nr_mlock nr_bounce nr_zspages nr_free_cma nr_unaccepted
    """
)
"""``enum zone_stat_item``."""

ZONE_NUMA_STATS = _words(
    """
    numa_hit numa_miss numa_foreign numa_interleave numa_local numa_other
    """
)
"""``enum numa_stat_item``."""

NODE_STATS = _words(
    """
    nr_inactive_anon nr_active_anon nr_inactive_file nr_active_file nr_unevictable nr_slab_reclaimable
    nr_slab_unreclaimable nr_isolated_anon nr_isolated_file workingset_nodes workingset_refault_anon
    workingset_refault_file workingset_activate_anon workingset_activate_file workingset_restore_anon
    workingset_restore_file workingset_nodereclaim nr_anon_pages nr_mapped nr_file_pages nr_dirty nr_writeback
    nr_writeback_temp nr_shmem nr_shmem_hugepages nr_shmem_pmdmapped nr_file_hugepages nr_file_pmdmapped
    nr_anon_transparent_hugepages nr_vmscan_write nr_vmscan_immediate_reclaim nr_dirtied nr_written
    nr_throttled_written nr_kernel_misc_reclaimable nr_foll_pin_acquired nr_foll_pin_released nr_kernel_stack
    nr_page_table_pages nr_sec_page_table_pages nr_iommu_pages nr_swapcached pgpromote_success pgpromote_candidate
    pgdemote_kswapd pgdemote_direct pgdemote_khugepaged
    """
)
"""``enum node_stat_item``."""

VMSTAT_ONLY = _words(
    """
    nr_dirty_threshold nr_dirty_background_threshold nr_memmap_pages nr_memmap_boot_pages
    """
)
"""What stands in /proc/vmstat between the counters of nodes and of events."""

VM_EVENTS = _words(
    """
    pgpgin pgpgout pswpin pswpout pgalloc_dma pgalloc_dma32 pgalloc_normal pgalloc_movable pgalloc_device
    allocstall_dma allocstall_dma32 allocstall_normal allocstall_movable allocstall_device pgskip_dma pgskip_dma32
    pgskip_normal pgskip_movable pgskip_device pgfree pgactivate pgdeactivate pglazyfree pgfault pgmajfault
    pglazyfreed pgrefill pgreuse pgsteal_kswapd pgsteal_direct pgsteal_khugepaged pgscan_kswapd pgscan_direct
    pgscan_khugepaged pgscan_direct_throttle pgscan_anon pgscan_file pgsteal_anon pgsteal_file zone_reclaim_success
    zone_reclaim_failed pginodesteal slabs_scanned kswapd_inodesteal kswapd_low_wmark_hit_quickly
    kswapd_high_wmark_hit_quickly pageoutrun pgrotated drop_pagecache drop_slab oom_kill numa_pte_updates
    numa_huge_pte_updates numa_hint_faults numa_hint_faults_local numa_pages_migrated pgmigrate_success
    pgmigrate_fail thp_migration_success thp_migration_fail thp_migration_split compact_migrate_scanned
    compact_free_scanned compact_isolated compact_stall compact_fail compact_success compact_daemon_wake
    compact_daemon_migrate_scanned compact_daemon_free_scanned htlb_buddy_alloc_success htlb_buddy_alloc_fail
    unevictable_pgs_culled unevictable_pgs_scanned unevictable_pgs_rescued unevictable_pgs_mlocked
    unevictable_pgs_munlocked unevictable_pgs_cleared unevictable_pgs_stranded thp_fault_alloc thp_fault_fallback
    thp_fault_fallback_charge thp_collapse_alloc thp_collapse_alloc_failed thp_file_alloc thp_file_fallback
    thp_file_fallback_charge thp_file_mapped thp_split_page thp_split_page_failed thp_deferred_split_page
    thp_underused_split_page thp_split_pmd thp_scan_exceed_none_pte thp_scan_exceed_swap_pte
    thp_scan_exceed_share_pte thp_split_pud thp_zero_page_alloc thp_zero_page_alloc_failed thp_swpout
    thp_swpout_fallback balloon_inflate balloon_deflate balloon_migrate swap_ra swap_ra_hit swpin_zero swpout_zero
    ksm_swpin_copy cow_ksm direct_map_level2_splits direct_map_level3_splits nr_unstable
    """
)
"""``enum vm_event_item``, and a counter that is kept for the sake of its readers."""

SINCE_6_12 = _words(
    """
    HardwareCorrupted nr_iommu_pages pgdemote_khugepaged nr_memmap_pages nr_memmap_boot_pages pgsteal_khugepaged
    pgscan_khugepaged zone_reclaim_success thp_underused_split_page swpin_zero swpout_zero
    """
)
"""What 6.1 does not print."""


def of_6_1(names: tuple[str, ...]) -> tuple[str, ...]:
    """What 6.1 prints of a list; there demotions are events, not counters of nodes."""
    names = tuple(name for name in names if name not in SINCE_6_12)
    if names[0] == NODE_STATS[0]:
        return tuple(name for name in names if not name.startswith("pgdemote"))
    if names[0] != VM_EVENTS[0]:
        return names
    at = names.index("pgsteal_direct") + 1
    return (*names[:at], "pgdemote_kswapd", "pgdemote_direct", *names[at:])
