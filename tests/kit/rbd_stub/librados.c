/* A librados without a cluster, for tests: it keeps options and fails on request.
 *
 * Options of its own, set like any other: stub_connect (the error number of rados_connect), stub_pool (the same of
 * rados_ioctx_create), stub_unknown (a name that is no option). */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "stub.h"

static const char *get(struct cluster *cluster, const char *name)
{
	for (int i = 0; i < cluster->count; i++)
		if (!strcmp(cluster->options[i].name, name))
			return cluster->options[i].value;
	return NULL;
}

static int number(struct cluster *cluster, const char *name)
{
	const char *value = get(cluster, name);
	return value ? atoi(value) : 0;
}

int rados_create2(void **out, const char *clustername, const char *name, uint64_t flags)
{
	if (strcmp(clustername, "ceph") || strncmp(name, "client.", 7) || flags)
		return -EINVAL;
	*out = calloc(1, sizeof(struct cluster));
	return *out ? 0 : -ENOMEM;
}

int rados_conf_read_file(void *cluster, const char *path)
{
	(void)cluster;
	return path && strstr(path, "missing") ? -ENOENT : 0;
}

int rados_conf_set(void *handle, const char *name, const char *value)
{
	struct cluster *cluster = handle;
	const char *unknown = get(cluster, "stub_unknown");
	int i;

	if (unknown && !strcmp(unknown, name))
		return -ENOENT;
	for (i = 0; i < cluster->count && strcmp(cluster->options[i].name, name); i++)
		;
	if (i == OPTIONS || strlen(name) >= sizeof cluster->options[i].name ||
	    strlen(value) >= sizeof cluster->options[i].value)
		return -EINVAL;
	strcpy(cluster->options[i].name, name);
	strcpy(cluster->options[i].value, value);
	if (i == cluster->count)
		cluster->count++;
	return 0;
}

int rados_conf_get(void *cluster, const char *name, char *buf, size_t len)
{
	const char *value = get(cluster, name);

	/* Defaults that somebody asks for. */
	if (!value && !strcmp(name, "rbd_cache_policy"))
		value = "writearound";
	if (!value && !strcmp(name, "rbd_cache_writethrough_until_flush"))
		value = "true";
	if (!value)
		return -ENOENT;
	if (strlen(value) >= len)
		return -ENAMETOOLONG;
	strcpy(buf, value);
	return 0;
}

int rados_connect(void *handle)
{
	struct cluster *cluster = handle;

	if (cluster->connected)
		abort();
	cluster->connected = 1;
	return -number(cluster, "stub_connect");
}

void rados_shutdown(void *cluster)
{
	free(cluster);
}

int rados_ioctx_create(void *handle, const char *pool, void **out)
{
	struct cluster *cluster = handle;
	struct ioctx *io;

	if (number(cluster, "stub_pool"))
		return -number(cluster, "stub_pool");
	io = calloc(1, sizeof *io);
	io->cluster = cluster;
	strncpy(io->pool, pool, sizeof io->pool - 1);
	*out = io;
	return 0;
}

void rados_ioctx_set_namespace(void *handle, const char *nspace)
{
	struct ioctx *io = handle;

	strncpy(io->nspace, nspace, sizeof io->nspace - 1);
}

void rados_ioctx_destroy(void *io)
{
	free(io);
}
