/* Orders to an image of the stub librbd: a line on its socket (stub_control), answered with a line.
 *
 *   fail WHAT ERRNO COUNT   ops (read, write, flush, discard, zeroes) or calls (lock, size, ...) fail; -1: for ever
 *   short BYTES             the next read is short by so many
 *   hang, go                ops stay in flight; they finish
 *   diff-hangs, diff-goes   listing what is stored takes for ever; it ends
 *   lock-hangs, lock-goes   the lock's owner is dead, as far as anybody knows; the cluster gives up waiting
 *   questions-hang, -go     whether the image has the lock, and which features, is not answered; it is
 *   fence                   everything fails with ESHUTDOWN
 *   owner ADDRESS           another client has the lock; `none`: nobody
 *   features NUMBER         and the update watch is called; without exclusive-lock nobody has the lock
 *   resize BYTES            and the update watch is called
 *   quiesce, unquiesce      the quiesce watch is called
 *   answers COUNT           waits for so many answers, all since the start; and what they were
 *   counts                  what was done, NAME=NUMBER each */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "librbd.h"

int stub_listen(struct image *image)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	strncpy(address.sun_path, stub_option(image, "stub_control"), sizeof address.sun_path - 1);
	image->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(image->listener, (struct sockaddr *)&address, sizeof address) < 0)
		return -1;
	return listen(image->listener, 8);
}

static void answers(struct image *image, int wanted, FILE *out)
{
	struct timespec until;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += 30;
	pthread_mutex_lock(&image->lock);
	while (image->answered < wanted)
		if (pthread_cond_timedwait(&image->changed, &image->lock, &until))
			break;
	for (int i = 0; i < image->answered; i++)
		fprintf(out, "%s%d", i ? " " : "", image->answers[i]);
	pthread_mutex_unlock(&image->lock);
}

static void counts(struct image *image, FILE *out)
{
	pthread_mutex_lock(&image->lock);
	fprintf(out, "reads=%ld writes=%ld flushes=%ld discards=%ld zeroes=%ld thick=%ld ", image->counts[READ],
		image->counts[WRITE], image->counts[FLUSH], image->counts[DISCARD], image->counts[ZEROES], image->thick);
	fprintf(out, "snaps=%ld removed=%ld invalidates=%ld locks=%ld unlocks=%ld breaks=%ld diffs=%ld in-flight=%d questions=%d", image->snaps,
		image->removed, image->invalidates, image->locks, image->unlocks, image->breaks, image->diffs, image->in_flight,
		image->questions_waiting);
	pthread_mutex_unlock(&image->lock);
}

static void set(struct image *image, int *what, int value)
{
	pthread_mutex_lock(&image->lock);
	*what = value;
	pthread_cond_broadcast(&image->changed);
	pthread_mutex_unlock(&image->lock);
}

static void obey(struct image *image, char *order, FILE *out)
{
	char what[64];
	int error, count;
	long number;

	if (sscanf(order, "fail %15s %d %d", what, &error, &count) == 3) {
		pthread_mutex_lock(&image->lock);
		for (int i = 0; i < 16; i++)
			if (!image->faults[i].left) {
				strcpy(image->faults[i].what, what);
				image->faults[i].error = error;
				image->faults[i].left = count;
				break;
			}
		pthread_mutex_unlock(&image->lock);
	} else if (sscanf(order, "short %ld", &number) == 1) {
		set(image, &image->short_by, number);
	} else if (!strcmp(order, "hang")) {
		set(image, &image->hanging, 1);
	} else if (!strcmp(order, "go")) {
		set(image, &image->hanging, 0);
	} else if (!strcmp(order, "diff-hangs")) {
		set(image, &image->diff_hangs, 1);
	} else if (!strcmp(order, "diff-goes")) {
		set(image, &image->diff_hangs, 0);
	} else if (!strcmp(order, "lock-hangs")) {
		set(image, &image->lock_hangs, 1);
	} else if (!strcmp(order, "lock-goes")) {
		set(image, &image->lock_hangs, 0);
	} else if (!strcmp(order, "questions-hang")) {
		set(image, &image->questions_hang, 1);
	} else if (!strcmp(order, "questions-go")) {
		set(image, &image->questions_hang, 0);
	} else if (!strcmp(order, "fence")) {
		set(image, &image->fenced, 1);
	} else if (sscanf(order, "owner %63s", what) == 1) {
		pthread_mutex_lock(&image->lock);
		strcpy(image->owner, strcmp(what, "none") ? what : "");
		image->locked = 0;
		pthread_mutex_unlock(&image->lock);
	} else if (sscanf(order, "features %ld", &number) == 1) {
		pthread_mutex_lock(&image->lock);
		image->features = number;
		if (!(number & EXCLUSIVE_LOCK)) {
			image->locked = 0;
			*image->owner = 0;
		}
		pthread_mutex_unlock(&image->lock);
		if (image->updated)
			image->updated(image->update_arg);
	} else if (sscanf(order, "resize %ld", &number) == 1) {
		image->size = number;
		if (image->updated)
			image->updated(image->update_arg);
	} else if (!strcmp(order, "quiesce")) {
		set(image, &image->asked, image->asked + 1);
		if (!image->quiesce)
			abort();
		image->quiesce(image->quiesce_arg);
	} else if (!strcmp(order, "unquiesce")) {
		image->unquiesce(image->quiesce_arg);
	} else if (sscanf(order, "answers %ld", &number) == 1) {
		return answers(image, number, out);
	} else if (!strcmp(order, "counts")) {
		return counts(image, out);
	} else {
		abort();
	}
	fputs("ok", out);
}

void *stub_control(void *handle)
{
	struct image *image = handle;

	for (;;) {
		char order[256];
		int fd, state;
		FILE *peer;

		fd = accept4(image->listener, NULL, NULL, SOCK_CLOEXEC);
		if (fd < 0)
			continue;
		pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
		peer = fdopen(fd, "r+");
		if (fgets(order, sizeof order, peer)) {
			order[strcspn(order, "\n")] = 0;
			obey(image, order, peer);
		}
		fclose(peer);
		pthread_setcancelstate(state, NULL);
	}
}
