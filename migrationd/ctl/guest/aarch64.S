// Boot guest for the aarch64 virt machine (GICv2): a flat image for -bios.
//
// Runs straight from flash at address 0 with the MMU off, in EL1. Does what
// x86.S does: fills a range with pseudo-random words, prints '>' on the PL011,
// then for ever adds one to the 32-bit word at the start of each page of a
// second range and prints one letter (A to Z, again from A) after each pass.
//
// Parameters, little-endian u32, patched in by boot_guest.py:
//   0x300 count_start  first byte of the counted range
//   0x304 count_pages  4 KiB pages in it, at least 1
//   0x308 burst        pages counted per tick of 4 ms; 0: never wait
//   0x30c fill_start   first byte of the filled range
//   0x310 fill_pages   4 KiB pages to fill; 0: none
//   0x314 fill_step    bytes from one filled page to the next
//
// Registers while counting: w19 letter, x20 address, w21 pages left in the
// pass, w22 pages left in the tick, w23 burst, x24 UART, x25 timer ticks in 4 ms.

        .set    UART, 0x09000000
        .set    GICD, 0x08000000
        .set    GICC, 0x08010000

        .globl  start
start:
        msr     daifset, #15
        mov     x24, #UART
        mov     w0, #0x70               // eight bits, FIFO on
        str     w0, [x24, #0x2c]
        mov     w0, #0x301              // UART and both directions on
        str     w0, [x24, #0x30]

        ldr     w0, fill_start
        ldr     w1, fill_pages
        ldr     w2, fill_step
        ldr     w3, seed
        ldr     w4, multiplier
        ldr     w5, increment
fill_page:
        cbz     w1, filled
        mov     w6, #1024
        mov     x7, x0
fill_word:
        madd    w3, w3, w4, w5
        str     w3, [x7], #4
        subs    w6, w6, #1
        b.ne    fill_word
        add     x0, x0, x2
        sub     w1, w1, #1
        b       fill_page
filled:
        mov     w0, #'>'
        str     w0, [x24]

        // The timer's interrupt is never taken: WFI wakes when it is pending.
        mov     x0, #GICD
        mov     w1, #1
        str     w1, [x0]
        mov     w1, #1 << 27            // PPI 27, the virtual timer
        str     w1, [x0, #0x100]
        mov     x0, #GICC
        mov     w1, #0xff
        str     w1, [x0, #4]
        mov     w1, #1
        str     w1, [x0]
        mrs     x0, cntfrq_el0
        mov     x1, #250
        udiv    x25, x0, x1
        msr     cntv_tval_el0, x25
        mov     x0, #1
        msr     cntv_ctl_el0, x0
        isb

        mov     w19, #'A'
        ldr     w23, burst
        mov     w22, w23
        ldr     w20, count_start
        ldr     w21, count_pages
count:
        ldr     w0, [x20]
        add     w0, w0, #1
        str     w0, [x20]
        add     x20, x20, #4096
        subs    w21, w21, #1
        b.eq    pass_done
counted:
        subs    w22, w22, #1
        b.ne    count
        mov     w22, w23
        cbz     w23, count
wait:
        wfi
        mrs     x0, cntv_ctl_el0
        tbz     x0, #2, wait            // not this timer's time yet
        msr     cntv_tval_el0, x25
        isb
        b       count
pass_done:
        str     w19, [x24]
        ldr     w20, count_start
        ldr     w21, count_pages
        add     w19, w19, #1
        cmp     w19, #'Z' + 1
        b.ne    counted
        mov     w19, #'A'
        b       counted

        .balign 4
seed:           .word   0x2545f491
multiplier:     .word   1664525
increment:      .word   1013904223

        .org    0x300
count_start:    .word   0x40100000
count_pages:    .word   1024
burst:          .word   0
fill_start:     .word   0
fill_pages:     .word   0
fill_step:      .word   4096
        .org    0x400
