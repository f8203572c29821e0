# The smallest guest there is: a boot sector that writes to the disk it was booted from, reads back and compares,
# through the BIOS (SeaBIOS' virtio-blk driver, which negotiates neither FLUSH nor CONFIG_WCE).
#
# Eight writes of one sector each go to sectors 1 to 8; sector N is filled with the byte 0xA0 + N. The verdict is a
# line of one letter on QEMU's isa-debugcon device (port 0xe9): G good, W write failed, R read failed, D differs. Then
# isa-debug-exit (port 0xf4), if QEMU was given one, makes QEMU exit with 2 * letter + 1; else the guest stays there,
# so that the host can look at the image while the front-end is still connected.
#
#   as --32 -o bootsector.o bootsector.S
#   ld -m elf_i386 -Ttext 0x7c00 -e start --oformat binary -o bootsector bootsector.o

	.code16
	.set	CONSOLE, 0xe9
	.set	EXIT, 0xf4
	.set	OUT, 0x8000
	.set	IN, 0x9000
	.set	SECTORS, 8

	.globl	start
start:
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movw	$0x7c00, %sp
	sti
	cld
	movb	%dl, drive

next:
	# Fill the buffer with this sector's byte, write it.
	movb	lba, %al
	addb	$0xa0, %al
	movw	$OUT, %di
	movw	$512, %cx
	rep stosb
	movw	$OUT, buffer
	movb	$0x43, %ah
	movb	$'W', %bl
	call	disk

	# Read it back elsewhere, compare.
	movw	$IN, buffer
	movb	$0x42, %ah
	movb	$'R', %bl
	call	disk
	movw	$OUT, %si
	movw	$IN, %di
	movw	$512, %cx
	repe cmpsb
	movb	$'D', %bl
	jne	verdict

	incb	lba
	cmpb	$SECTORS, lba
	jbe	next

	movb	$'G', %bl
verdict:
	movb	%bl, %al
	outb	%al, $CONSOLE
	movb	$'\n', %al
	outb	%al, $CONSOLE
	movb	%bl, %al
	outb	%al, $EXIT
stay:
	hlt
	jmp	stay

# One extended read (ah 0x42) or write (ah 0x43) of the packet below; on error the verdict is bl.
disk:
	xorb	%al, %al
	movb	drive, %dl
	movw	$packet, %si
	int	$0x13
	jc	verdict
	ret

drive:	.byte	0
	.balign	4
packet:	.byte	16, 0
	.word	1			# sectors
buffer:	.word	0, 0			# offset, segment
lba:	.quad	1

	.org	510
	.word	0xaa55
