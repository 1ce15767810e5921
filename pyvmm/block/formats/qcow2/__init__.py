"""The format qcow2, versions 2 and 3 (QEMU docs/interop/qcow2.txt), for reading and for writing.

    driver       Qcow2Driver: requests, cut at where the format has them
    image        Qcow2Image, which that stands on: opening, bringing tables into the file in order, the end
    header       the header and its extensions, checked
    entries      what a table's entry says
    tables       L1 and L2 tables: loading, copying, what of them has still to be written
    cluster_map  the L2 tables that are in memory, for compiled code; cluster_lane: transfers by them, without Python
    refcounts    which host clusters are free, and who takes one
    compressed   clusters of zlib or zstd
    snapshots    the table of internal snapshots
    create       a new image; check: an image's references, counted; resize
"""
