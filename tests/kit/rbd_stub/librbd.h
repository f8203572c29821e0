/* The stub librbd's images, and what its two files call of each other. */
#ifndef STUB_LIBRBD_H
#define STUB_LIBRBD_H

#include <pthread.h>
#include <stdint.h>
#include <sys/uio.h>

#include "stub.h"

#define EXCLUSIVE_LOCK 4

enum op { READ, WRITE, FLUSH, DISCARD, ZEROES, OPS };

typedef void (*notice)(void *);

struct aio {
	struct aio *next;
	enum op op;
	const struct iovec *iov;
	int iovcnt;
	uint64_t offset, len;
	int flags;
	long result;
	void (*callback)(void *, void *);
	void *arg;
};

/* What a call or an op is told to fail with; left < 0: for ever. */
struct fault {
	char what[16];
	int error;
	int left;
};

struct image {
	struct cluster *cluster;
	char path[400];
	int read_only;
	int features;
	uint64_t size;
	unsigned char *data;

	pthread_mutex_t lock;
	pthread_cond_t changed;
	pthread_t worker, control;
	int listener;
	struct aio *queue;
	int in_flight, hanging, closing, fenced;
	unsigned seed;

	struct fault faults[16];
	int short_by;
	long counts[OPS], thick, snaps, removed, invalidates, locks, unlocks, breaks;

	int diff_hangs;
	long diffs;
	int locked, lock_hangs, questions_hang, questions_waiting;
	/* The lock was asked for once: it is not taken for a write any more (librbd's StandardPolicy). */
	int explicit_lock;
	char owner[64];

	notice updated, quiesce, unquiesce;
	void *update_arg, *quiesce_arg;
	int asked;
	int answers[64];
	int answered;
};

const char *stub_option(struct image *image, const char *name);
int stub_fault(struct image *image, const char *what);
void *stub_worker(void *image);
void *stub_control(void *image);
int stub_listen(struct image *image);

#endif
