/* What the two stub libraries share: the handles of librados are plain structures that librbd looks into. */
#ifndef STUB_H
#define STUB_H

#include <stdint.h>

#define OPTIONS 64

struct option {
	char name[64];
	char value[256];
};

struct cluster {
	struct option options[OPTIONS];
	int count;
	int connected;
};

struct ioctx {
	struct cluster *cluster;
	char pool[128];
	char nspace[128];
};

#endif
