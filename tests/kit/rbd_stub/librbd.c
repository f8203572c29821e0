/* A librbd without a cluster, for tests: images in memory, with the real one's habits as far as somebody may rely on
 * them. Reads use the caller's list of parts until they complete; ops finish in any order, a flush after the writes
 * before it; writes past the end are cut off; small discards do nothing; an answer too many aborts; removing a watch
 * waits for an answer that is due.
 *
 * Options of its own: stub_control (a socket for orders, see control.c), stub_size, stub_open (the error number of
 * rbd_open), stub_features, stub_passphrase, stub_override (image:NAME=VALUE or pool:NAME=VALUE). */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "librbd.h"

#define GRANULARITY 65536
#define HEADER 4096

/* What an image holds outlives its handles. */
static struct stored {
	struct stored *next;
	char path[400];
	uint64_t size;
	unsigned char *data;
} *all;
static pthread_mutex_t all_lock = PTHREAD_MUTEX_INITIALIZER;

const char *stub_option(struct image *image, const char *name)
{
	for (int i = 0; i < image->cluster->count; i++)
		if (!strcmp(image->cluster->options[i].name, name))
			return image->cluster->options[i].value;
	return NULL;
}

static long number(struct image *image, const char *name, long otherwise)
{
	const char *value = stub_option(image, name);
	return value ? atol(value) : otherwise;
}

/* The error that a call must fail with, as a positive number; with the image locked. */
int stub_fault(struct image *image, const char *what)
{
	for (int i = 0; i < 16; i++) {
		struct fault *fault = &image->faults[i];
		if (!fault->left || strcmp(fault->what, what))
			continue;
		if (fault->left > 0)
			fault->left--;
		return fault->error;
	}
	return image->fenced ? ESHUTDOWN : 0;
}

static int call(struct image *image, const char *what, long *count)
{
	int error;

	pthread_mutex_lock(&image->lock);
	error = stub_fault(image, what);
	if (!error && count)
		++*count;
	pthread_mutex_unlock(&image->lock);
	return -error;
}

/* A question that waits for the network. */
static int ask(struct image *image, const char *what)
{
	pthread_mutex_lock(&image->lock);
	image->questions_waiting++;
	while (image->questions_hang)
		pthread_cond_wait(&image->changed, &image->lock);
	image->questions_waiting--;
	pthread_mutex_unlock(&image->lock);
	return call(image, what, NULL);
}

static struct stored *stored(const char *path, uint64_t size)
{
	struct stored *found;

	pthread_mutex_lock(&all_lock);
	for (found = all; found && strcmp(found->path, path); found = found->next)
		;
	if (!found) {
		found = calloc(1, sizeof *found);
		strcpy(found->path, path);
		found->size = size;
		found->data = calloc(1, size + (16 << 20));
		found->next = all;
		all = found;
	}
	pthread_mutex_unlock(&all_lock);
	return found;
}

static int open_image(void *ioctx, const char *name, void **out, const char *snap, int read_only)
{
	struct ioctx *io = ioctx;
	struct image *image = calloc(1, sizeof *image);
	struct stored *kept;
	int error;

	image->cluster = io->cluster;
	image->read_only = read_only;
	image->features = number(image, "stub_features", 61);
	error = number(image, "stub_open", 0);
	if (error || (snap && !read_only)) {
		free(image);
		return -(error ? error : EINVAL);
	}
	snprintf(image->path, sizeof image->path, "%s/%s/%s", io->pool, io->nspace, name);
	kept = stored(image->path, number(image, "stub_size", 8 << 20));
	image->size = kept->size;
	image->data = kept->data;
	image->seed = 7;
	image->listener = -1;
	pthread_mutex_init(&image->lock, NULL);
	pthread_cond_init(&image->changed, NULL);
	if (stub_option(image, "stub_control") && stub_listen(image) < 0)
		abort();
	pthread_create(&image->worker, NULL, stub_worker, image);
	if (image->listener >= 0)
		pthread_create(&image->control, NULL, stub_control, image);
	*out = image;
	return 0;
}

void rbd_version(int *major, int *minor, int *extra)
{
	*major = 1;
	*minor = 99;
	*extra = 0;
}

int rbd_open(void *io, const char *name, void **image, const char *snap)
{
	return open_image(io, name, image, snap, 0);
}

int rbd_open_read_only(void *io, const char *name, void **image, const char *snap)
{
	return open_image(io, name, image, snap, 1);
}

int rbd_close(void *handle)
{
	struct image *image = handle;

	/* A watch that is left behind would call into freed memory. */
	if (image->quiesce || image->updated || image->in_flight)
		abort();
	pthread_mutex_lock(&image->lock);
	while (stub_option(image, "stub_close"))
		pthread_cond_wait(&image->changed, &image->lock);
	image->closing = 1;
	pthread_cond_broadcast(&image->changed);
	pthread_mutex_unlock(&image->lock);
	pthread_join(image->worker, NULL);
	if (image->listener >= 0) {
		unlink(stub_option(image, "stub_control"));
		pthread_cancel(image->control);
		pthread_join(image->control, NULL);
		close(image->listener);
	}
	free(image);
	return 0;
}

int rbd_get_size(void *handle, uint64_t *size)
{
	struct image *image = handle;
	int error = call(image, "size", NULL);

	*size = image->size;
	return error;
}

int rbd_get_features(void *handle, uint64_t *features)
{
	struct image *image = handle;

	*features = image->features;
	return ask(image, "features");
}

int rbd_get_stripe_unit(void *image, uint64_t *unit)
{
	(void)image;
	*unit = 4 << 20;
	return 0;
}

struct config {
	char *name, *value;
	unsigned source;
};

int rbd_config_image_list(void *handle, struct config *list, int *room)
{
	struct image *image = handle;
	const char *override = stub_option(image, "stub_override");
	int count = 0;

	/* More than fits at first: the caller must ask again. */
	if (*room < 600) {
		*room = 600;
		return -ERANGE;
	}
	for (int i = 0; i < image->cluster->count; i++) {
		struct option *option = &image->cluster->options[i];
		if (strncmp(option->name, "rbd_", 4))
			continue;
		list[count].name = strdup(option->name);
		list[count].value = strdup(option->value);
		list[count].source = 0;
		if (override) {
			const char *name = strchr(override, ':') + 1;
			size_t len = strcspn(name, "=");
			if (strlen(option->name) == len && !strncmp(option->name, name, len)) {
				free(list[count].value);
				list[count].value = strdup(name + len + 1);
				list[count].source = *override == 'p' ? 1 : 2;
			}
		}
		count++;
	}
	*room = count;
	return 0;
}

void rbd_config_image_list_cleanup(struct config *list, int count)
{
	for (int i = 0; i < count; i++) {
		free(list[i].name);
		free(list[i].value);
	}
}

struct luks1 {
	unsigned alg;
	const char *passphrase;
	size_t len;
};

int rbd_encryption_load(void *handle, unsigned format, void *options, size_t size)
{
	struct image *image = handle;
	const char *passphrase = stub_option(image, "stub_passphrase");
	struct luks1 *luks = options;

	/* As Ceph 16: one must know the version. */
	if (format > 1)
		return -ENOTSUP;
	if (size != sizeof *luks)
		return -EINVAL;
	if (!passphrase || format != 1)
		return -EINVAL;
	if (luks->len != strlen(passphrase) || memcmp(luks->passphrase, passphrase, luks->len))
		return -EPERM;
	image->size -= HEADER;
	return 0;
}

/* What is stored: every 64 KiB that are not all zeroes, the last one first, as nobody promises an order. */
int rbd_diff_iterate2(void *handle, const char *from, uint64_t offset, uint64_t len, uint8_t parent, uint8_t whole,
		      int (*found)(uint64_t, size_t, int, void *), void *arg)
{
	struct image *image = handle;
	uint64_t piece = 64 << 10;
	int error;

	pthread_mutex_lock(&image->lock);
	image->diffs++;
	while (image->diff_hangs)
		pthread_cond_wait(&image->changed, &image->lock);
	error = stub_fault(image, "diff");
	pthread_mutex_unlock(&image->lock);
	/* Without the parent, and by the object map, data would be missed. */
	if (!error && (from || !parent || whole || offset + len > image->size))
		error = EINVAL;
	for (uint64_t at = (offset + len - 1) / piece * piece; !error; at -= piece) {
		uint64_t size = at + piece < image->size ? piece : image->size - at;

		if (image->data[at] || memcmp(image->data + at, image->data + at + 1, size - 1))
			error = -found(at, size, 1, arg);
		if (at <= offset)
			break;
	}
	return -error;
}

/* Ops. */

int rbd_aio_create_completion(void *arg, void (*callback)(void *, void *), void **out)
{
	struct aio *aio = calloc(1, sizeof *aio);

	aio->arg = arg;
	aio->callback = callback;
	*out = aio;
	return 0;
}

long rbd_aio_get_return_value(void *aio)
{
	return ((struct aio *)aio)->result;
}

void rbd_aio_release(void *aio)
{
	free(aio);
}

static int push(struct image *image, struct aio *aio, enum op op, uint64_t offset, uint64_t len)
{
	struct aio **end;
	int error;

	aio->op = op;
	aio->offset = offset;
	aio->len = len;
	pthread_mutex_lock(&image->lock);
	error = stub_fault(image, "submit");
	if (!error) {
		for (end = &image->queue; *end; end = &(*end)->next)
			;
		*end = aio;
		image->in_flight++;
		pthread_cond_broadcast(&image->changed);
	}
	pthread_mutex_unlock(&image->lock);
	return -error;
}

static int pushv(void *image, const struct iovec *iov, int count, uint64_t offset, struct aio *aio, enum op op)
{
	uint64_t len = 0;

	if (count <= 0)
		return -EINVAL;
	for (int i = 0; i < count; i++)
		len += iov[i].iov_len;
	aio->iov = iov;
	aio->iovcnt = count;
	return push(image, aio, op, offset, len);
}

int rbd_aio_readv(void *image, const struct iovec *iov, int count, uint64_t offset, void *aio)
{
	return pushv(image, iov, count, offset, aio, READ);
}

int rbd_aio_writev(void *image, const struct iovec *iov, int count, uint64_t offset, void *aio)
{
	return pushv(image, iov, count, offset, aio, WRITE);
}

int rbd_aio_discard(void *image, uint64_t offset, uint64_t len, void *aio)
{
	return push(image, aio, DISCARD, offset, len);
}

int rbd_aio_write_zeroes(void *image, uint64_t offset, size_t len, void *aio, int zero_flags, int op_flags)
{
	if (zero_flags & ~1 || op_flags)
		return -EINVAL;
	((struct aio *)aio)->flags = zero_flags;
	return push(image, aio, ZEROES, offset, len);
}

int rbd_aio_flush(void *image, void *aio)
{
	return push(image, aio, FLUSH, 0, 0);
}

int rbd_flush(void *handle)
{
	struct image *image = handle;

	return call(image, "flush", &image->counts[FLUSH]);
}

int rbd_invalidate_cache(void *handle)
{
	struct image *image = handle;

	return call(image, "invalidate", &image->invalidates);
}

static int must_be_locked(struct image *image)
{
	return image->explicit_lock && image->features & EXCLUSIVE_LOCK;
}

static long transfer(struct image *image, struct aio *aio)
{
	static const char *names[] = { "read", "write", "flush", "discard", "zeroes" };
	uint64_t end = aio->offset + aio->len, at = aio->offset;
	int error = stub_fault(image, names[aio->op]);

	image->counts[aio->op]++;
	if (error)
		return -error;
	if (aio->op != READ && aio->op != FLUSH &&
	    (image->read_only || (!image->locked && (*image->owner || must_be_locked(image)))))
		return -EROFS;
	if (aio->op != FLUSH && aio->offset >= image->size)
		return -EINVAL;
	if (end > image->size)
		end = image->size;
	switch (aio->op) {
	case READ:
		if (image->short_by) {
			end -= image->short_by;
			image->short_by = 0;
		}
		/* fall through */
	case WRITE:
		for (int i = 0; i < aio->iovcnt && at < end; i++) {
			size_t part = aio->iov[i].iov_len < end - at ? aio->iov[i].iov_len : end - at;
			if (aio->op == READ)
				memcpy(aio->iov[i].iov_base, image->data + at, part);
			else
				memcpy(image->data + at, aio->iov[i].iov_base, part);
			at += part;
		}
		return aio->op == READ ? (long)(at - aio->offset) : 0;
	case DISCARD:
		at = (aio->offset + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
		end = end / GRANULARITY * GRANULARITY;
		if (at < end)
			memset(image->data + at, 0, end - at);
		return 0;
	case ZEROES:
		image->thick += aio->flags;
		memset(image->data + at, 0, end - at);
		return 0;
	default:
		return 0;
	}
}

/* Finishes ops in any order, but a flush after what came before it and before what comes after. */
void *stub_worker(void *handle)
{
	struct image *image = handle;

	pthread_mutex_lock(&image->lock);
	for (;;) {
		struct aio **at, *aio;
		int some = 0;

		while (image->hanging || !image->queue) {
			if (image->closing) {
				pthread_mutex_unlock(&image->lock);
				return NULL;
			}
			pthread_cond_wait(&image->changed, &image->lock);
		}
		for (aio = image->queue; aio && aio->op != FLUSH; aio = aio->next)
			some++;
		at = &image->queue;
		for (int skip = some ? rand_r(&image->seed) % some : 0; skip; skip--)
			at = &(*at)->next;
		aio = *at;
		*at = aio->next;
		aio->result = transfer(image, aio);
		image->in_flight--;
		pthread_mutex_unlock(&image->lock);
		aio->callback(aio, aio->arg);
		pthread_mutex_lock(&image->lock);
	}
}

/* The lock. */

int rbd_lock_acquire(void *handle, unsigned mode)
{
	struct image *image = handle;
	int error;

	pthread_mutex_lock(&image->lock);
	while (image->lock_hangs)
		pthread_cond_wait(&image->changed, &image->lock);
	error = stub_fault(image, "lock");
	if (!error && (mode || !(image->features & EXCLUSIVE_LOCK)))
		error = EINVAL;
	if (!error)
		image->explicit_lock = 1;
	if (!error && *image->owner && !image->locked)
		error = EROFS;
	if (!error) {
		image->locks++;
		image->locked = 1;
		strcpy(image->owner, "127.0.0.1:0/4711");
	}
	pthread_mutex_unlock(&image->lock);
	return -error;
}

int rbd_lock_release(void *handle)
{
	struct image *image = handle;
	int error = call(image, "unlock", &image->unlocks);

	pthread_mutex_lock(&image->lock);
	if (!error && image->locked) {
		image->locked = 0;
		*image->owner = 0;
	}
	pthread_mutex_unlock(&image->lock);
	return error;
}

int rbd_is_exclusive_lock_owner(void *handle, int *is_owner)
{
	struct image *image = handle;
	int error = ask(image, "is-owner");

	*is_owner = image->locked;
	return error;
}

int rbd_lock_get_owners(void *handle, unsigned *mode, char **owners, size_t *count)
{
	struct image *image = handle;

	*mode = 0;
	pthread_mutex_lock(&image->lock);
	*count = *image->owner != 0;
	owners[0] = strdup(image->owner);
	pthread_mutex_unlock(&image->lock);
	if (*count)
		return 0;
	free(owners[0]);
	return -ENOENT;
}

void rbd_lock_get_owners_cleanup(char **owners, size_t count)
{
	for (size_t i = 0; i < count; i++)
		free(owners[i]);
}

int rbd_lock_break(void *handle, unsigned mode, const char *owner)
{
	struct image *image = handle;
	int another;

	pthread_mutex_lock(&image->lock);
	another = mode || strcmp(owner, image->owner);
	if (!another)
		*image->owner = 0;
	pthread_mutex_unlock(&image->lock);
	if (another)
		return -ENOENT;
	return call(image, "break", &image->breaks);
}

/* Watches and snapshots. */

int rbd_update_watch(void *handle, uint64_t *id, notice updated, void *arg)
{
	struct image *image = handle;
	int error = call(image, "update-watch", NULL);

	if (error)
		return error;
	image->update_arg = arg;
	image->updated = updated;
	*id = 17;
	return 0;
}

int rbd_update_unwatch(void *handle, uint64_t id)
{
	((struct image *)handle)->updated = NULL;
	return id == 17 ? 0 : -EINVAL;
}

#ifndef OLD
int rbd_quiesce_watch(void *handle, notice quiesce, notice unquiesce, void *arg, uint64_t *id)
{
	struct image *image = handle;
	int error = call(image, "quiesce-watch", NULL);

	if (error)
		return error;
	image->quiesce_arg = arg;
	image->unquiesce = unquiesce;
	image->quiesce = quiesce;
	*id = 18;
	return 0;
}

void rbd_quiesce_complete(void *handle, uint64_t id, int result)
{
	struct image *image = handle;

	pthread_mutex_lock(&image->lock);
	if (id != 18 || !image->asked || image->answered == 64)
		abort();
	image->asked--;
	image->answers[image->answered++] = result;
	pthread_cond_broadcast(&image->changed);
	pthread_mutex_unlock(&image->lock);
}

int rbd_quiesce_unwatch(void *handle, uint64_t id)
{
	struct image *image = handle;

	pthread_mutex_lock(&image->lock);
	while (image->asked)
		pthread_cond_wait(&image->changed, &image->lock);
	image->quiesce = NULL;
	pthread_mutex_unlock(&image->lock);
	return id == 18 ? 0 : -EINVAL;
}

int rbd_snap_create2(void *handle, const char *name, uint32_t flags, void *progress, void *arg)
{
	struct image *image = handle;

	if (flags != 1 || progress || arg)
		return -EINVAL;
	return !strcmp(name, "taken") ? -EEXIST : call(image, "snap", &image->snaps);
}
#endif

int rbd_snap_create(void *handle, const char *name)
{
	struct image *image = handle;

	(void)name;
	return call(image, "snap", &image->snaps);
}

int rbd_snap_remove(void *handle, const char *name)
{
	struct image *image = handle;

	return !strcmp(name, "missing") ? -ENOENT : call(image, "remove", &image->removed);
}
