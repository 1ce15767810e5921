# setup.S, linked at 0. The real-mode part of a bzImage, two sectors: from there to the guest, which the boot loader has put
# at 0x100000 as the kernel. Linux Documentation/arch/x86/boot.rst.

        .set    LOAD,           0x100000

        .code16
        .org    0x1f1
        .byte   1                               # setup_sects: one after the first
        .word   0                               # root_flags
        .long   0                               # syssize: whoever makes the file fills it in, in units of 16 bytes
        .word   0, 0, 0                         # ram_size, vid_mode, root_dev
        .word   0xaa55                          # boot_flag
        .byte   0xeb, start - header            # jump, two bytes
header: .ascii  "HdrS"
        .word   0x020a                          # version of the boot protocol
        .long   0                               # realmode_swtch
        .word   0, 0                            # start_sys_seg, kernel_version
        .byte   0                               # type_of_loader
        .byte   1                               # loadflags: LOADED_HIGH
        .word   0                               # setup_move_size
        .long   LOAD                            # code32_start
        .long   0, 0                            # ramdisk_image, ramdisk_size
        .long   0                               # bootsect_kludge
        .word   0                               # heap_end_ptr
        .byte   0, 0                            # ext_loader_ver, ext_loader_type
        .long   0                               # cmd_line_ptr
        .long   0x37ffffff                      # initrd_addr_max
        .long   0x200000                        # kernel_alignment
        .byte   0, 0                            # relocatable_kernel, min_alignment
        .word   0                               # xloadflags
        .long   255                             # cmdline_size

start:  cli                                     # CS:IP is the segment of this part + 0x20, and 0
        cld
        xor     %ebx, %ebx
        mov     %ds, %bx                        # DS the segment itself
        shl     $4, %ebx
        lea     gdt(%ebx), %eax
        mov     %eax, gdt_pointer + 2
        lgdtl   gdt_pointer
        mov     %cr0, %eax
        or      $1, %eax                        # PE
        mov     %eax, %cr0
        lea     protected(%ebx), %eax
        pushl   $0x08
        pushl   %eax
        lretl

        .code32
protected:
        mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $LOAD + 16, %eax
        jmp     *%eax

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff              # 08: code
        .quad   0x00cf93000000ffff              # 10: data
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   0
        .org    0x400
