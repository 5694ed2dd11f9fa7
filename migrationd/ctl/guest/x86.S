# Boot guest for pc and q35: the last 1024 bytes of a 64 KiB ROM (-bios).
#
# Runs straight from the ROM in 32-bit protected mode without paging, with no
# firmware. It fills a range with pseudo-random words, prints '>' on COM1, and
# then for ever adds one to the 32-bit word at the start of each page of a
# second range, printing one letter (A to Z, again from A) after each pass.
# When paced it does so many pages per timer tick and halts in between.
#
# Parameters, little-endian u32, patched in by boot_guest.py:
#   0x300 count_start  first byte of the counted range
#   0x304 count_pages  4 KiB pages in it, at least 1
#   0x308 burst        pages counted per tick of 4 ms; 0: never wait
#   0x30c fill_start   first byte of the filled range
#   0x310 fill_pages   4 KiB pages to fill; 0: none
#   0x314 fill_step    bytes from one filled page to the next
#   0x318 count_step   bytes from one counted page to the next, 4096 or more
#   0x31c count_end    where the range begins again
#   0x320 count_back   bytes from there to its start
#
# Registers while counting: ebx letter, edi address, ebp pages left in the
# pass, ecx pages left in the tick. The stack (0x7000) serves the timer alone.

        .set    COM1, 0x3f8
        .set    TICK, 4773              # 1193182 Hz / 250

        .code16
        .globl  start
start:
        cli
        cld
        lgdtl   %cs:(gdt_pointer - start + 0xfc00)
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmpl   $8, $protected

        .code32
protected:
        movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $0x7000, %esp
        inb     $0x92, %al              # address line 20
        orb     $2, %al
        outb    %al, $0x92

        movl    fill_start, %edi
        movl    fill_pages, %ebp
        movl    $0x2545f491, %eax
fill_page:
        testl   %ebp, %ebp
        jz      filled
        movl    $1024, %ecx
fill_word:
        imull   $1664525, %eax, %eax
        addl    $1013904223, %eax
        movl    %eax, (%edi)
        addl    $4, %edi
        decl    %ecx
        jnz     fill_word
        addl    fill_step, %edi
        subl    $4096, %edi
        decl    %ebp
        jmp     fill_page
filled:
        movw    $COM1, %dx
        movb    $'>', %al
        outb    %al, %dx

        lidtl   idt_pointer
        movl    $0x700, 0xfee00350      # local APIC: LINT0 passes the PIC on
        movl    $0x1ff, 0xfee000f0      # and the APIC is enabled
        movb    $0x11, %al              # PIC: vectors from 0x20, timer alone unmasked
        outb    %al, $0x20
        movb    $0x20, %al
        outb    %al, $0x21
        movb    $0x04, %al
        outb    %al, $0x21
        movb    $0x01, %al
        outb    %al, $0x21
        movb    $0xfe, %al
        outb    %al, $0x21
        movb    $0x34, %al              # PIT channel 0: a tick every 4 ms
        outb    %al, $0x43
        movb    $(TICK & 255), %al
        outb    %al, $0x40
        movb    $(TICK >> 8), %al
        outb    %al, $0x40

        movb    $'A', %bl
        movl    burst, %ecx
        movl    count_start, %edi
        movl    count_pages, %ebp
count:
        incl    (%edi)
        addl    count_step, %edi
        cmpl    count_end, %edi
        jb      1f
        subl    count_back, %edi
1:      decl    %ebp
        jz      pass_done
counted:
        decl    %ecx
        jnz     count
        movl    burst, %ecx
        testl   %ecx, %ecx
        jz      count
        sti
        hlt
        cli
        jmp     count
pass_done:
        movw    $COM1, %dx
        movb    %bl, %al
        outb    %al, %dx
        movl    count_start, %edi
        movl    count_pages, %ebp
        incb    %bl
        cmpb    $'Z' + 1, %bl
        jne     counted
        movb    $'A', %bl
        jmp     counted

on_timer:
        pushl   %eax
        movb    $0x20, %al
        outb    %al, $0x20
        popl    %eax
        iret

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      # code, all of memory
        .quad   0x00cf93000000ffff      # data, all of memory
gdt_pointer:
        .word   23
        .long   gdt
        .balign 8
timer_gate:                             # entry 0x20, the only one used
        .word   on_timer - start + 0xfc00
        .word   8
        .word   0x8e00
        .word   0xffff
idt_pointer:
        .word   0x20 * 8 + 7
        .long   timer_gate - 0x20 * 8

        .org    0x300
count_start:    .long   0x100000
count_pages:    .long   1024
burst:          .long   0
fill_start:     .long   0
fill_pages:     .long   0
fill_step:      .long   4096
count_step:     .long   4096
count_end:      .long   0xffffffff
count_back:     .long   0

        .org    0x3f0                   # reset vector
        .code16
        .byte   0xe9                    # jmp start
        .word   start - (. + 2)
        .org    0x400
