"""IDE: ATA channels of a PC with hard disks and CD/DVD drives.

General layout, in the order a command walks it:

    registers        the ports' registers and bits, the commands' codes
    channel          IdeChannel: the ports, selection, the interrupt, resets
    drive            Drive: what every device on a channel has
    disk             IdeDisk: a hard disk's settings and commands; identify: what it says about itself
    activity         Activity: what a drive does between a command and its end. Those are
    pio              ... sectors through the data port
    dma              ... sectors between the image and the guest's memory; TRIM
    tasks            ... flushing and verifying
    bus_master       BusMaster: the PRD table, the start bit
    chain            requests to a backend, one after the other; the search for a bad sector
    packet_drive     PacketDrive: an ATAPI drive on its channel; packet_transfer: its activities
    atapi            AtapiDrive: what the packets mean; mmc, mode_pages: what it answers
"""
