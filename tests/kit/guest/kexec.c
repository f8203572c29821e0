/* kexec KERNEL INITRD OPTIONS: starts another kernel from this one, without asking the firmware. kexec -p ...: the kernel
 * does that when it crashes (crashkernel=). What it needs is in the kernel; kexec-tools would only add the systems that
 * have no kexec_file_load(2). */
#include <fcntl.h>
#include <linux/kexec.h>
#include <linux/reboot.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int arguments, char **argument)
{
	int kernel, initrd;
	int on_crash = arguments > 1 && strcmp(argument[1], "-p") == 0;

	arguments -= on_crash;
	argument += on_crash;
	if (arguments != 4) {
		fprintf(stderr, "kexec [-p] KERNEL INITRD OPTIONS\n");
		return 2;
	}
	kernel = open(argument[1], O_RDONLY);
	initrd = open(argument[2], O_RDONLY);
	if (kernel < 0 || initrd < 0) {
		perror("kexec: open");
		return 1;
	}
	if (syscall(SYS_kexec_file_load, kernel, initrd, strlen(argument[3]) + 1, argument[3],
		    on_crash ? (long)KEXEC_FILE_ON_CRASH : 0L) != 0) {
		perror("kexec: kexec_file_load");
		return 1;
	}
	if (on_crash)
		return 0;
	reboot(LINUX_REBOOT_CMD_KEXEC);
	perror("kexec: reboot");
	return 1;
}
