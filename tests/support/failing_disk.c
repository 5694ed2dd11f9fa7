/* A disk that fails, to be preloaded: writes to files under $FAILING_DISK end with EIO once
 * $FAILING_AFTER bytes went there; with $FAILING_SYNC only fsync does. It works again when
 * $FAILING_DISK/works exists. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long written;

static int fails(int fd, size_t size, int is_sync)
{
    const char *directory = getenv("FAILING_DISK"), *after = getenv("FAILING_AFTER");
    char link[64], path[4096];
    if (!directory || (is_sync != (getenv("FAILING_SYNC") != NULL)))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    if (strncmp(path, directory, strlen(directory)))
        return 0;
    snprintf(path, sizeof path, "%s/works", directory);
    if (!access(path, F_OK))
        return 0;
    if (!is_sync && atomic_fetch_add(&written, (long)size) + (long)size <= atol(after ? after : "0"))
        return 0;
    errno = EIO;
    return 1;
}

static size_t total(const struct iovec *parts, int count)
{
    size_t sum = 0;
    for (int i = 0; i < count; i++)
        sum += parts[i].iov_len;
    return sum;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size)
{
    return fails(fd, size, 0) ? -1 : NEXT(write)(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at)
{
    return fails(fd, size, 0) ? -1 : NEXT(pwrite)(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    return fails(fd, size, 0) ? -1 : NEXT(pwrite64)(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    return fails(fd, total(parts, count), 0) ? -1 : NEXT(writev)(fd, parts, count);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at)
{
    return fails(fd, total(parts, count), 0) ? -1 : NEXT(pwritev)(fd, parts, count, at);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t at)
{
    return fails(fd, total(parts, count), 0) ? -1 : NEXT(pwritev64)(fd, parts, count, at);
}

int fsync(int fd)
{
    return fails(fd, 0, 1) ? -1 : NEXT(fsync)(fd);
}

int fdatasync(int fd)
{
    return fails(fd, 0, 1) ? -1 : NEXT(fdatasync)(fd);
}
