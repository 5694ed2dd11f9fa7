/*
 * A C program as a guest of migrationd: one header, no library.
 *
 *     struct mw_workload *w = mw_create("counter");
 *     uint8_t *heap = mw_add_block(w, "heap", 64 << 20);
 *     mw_add_device(w, "counter", 1, fields, 2, &state);
 *     if (mw_attach(w, "/run/counter.guest") < 0) perror("attach");
 *     for (;;) {
 *         mw_enter(w);            // waits while the guest is stopped
 *         heap[state.at] += 1;    // memory and state change only in here
 *         mw_leave(w);
 *     }
 *
 * A program that can begin anew, or wants to hear that it should end, sets on_reset and
 * on_powerdown before it attaches. Fields are unsigned integers of 1, 2, 4 or 8 bytes; names are
 * printable ASCII without spaces, quotes and backslashes. When its daemon is gone (is_gone), the
 * program goes on alone, or attaches to the next one by mw_attach(). The messages are those of
 * the guest socket, see migrationd/guest/protocol.py. Link with -lpthread. Linux 6.7 or later.
 */
#ifndef MIGRATIOND_WORKLOAD_H
#define MIGRATIOND_WORKLOAD_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MW_MAX_BLOCKS 16
#define MW_MAX_DEVICES 16
#define MW_MAX_FIELDS 32
#define MW_NOTE_BYTES 8192
#define MW_PACKET_BYTES (256 << 10)
#define MW_SLICE_NS 10000000LL

/* An unsigned integer in a structure; its size is that of the member. */
struct mw_field {
    const char *name;
    size_t offset;
    size_t size;
};
#define MW_FIELD(type, member) {#member, offsetof(type, member), sizeof(((type *)0)->member)}

struct mw_device {
    const char *name;
    int version_id;
    const struct mw_field *fields;
    int field_count;
    void *state;
};

struct mw_block {
    const char *name;
    size_t size;
    int fd;
    void *memory;
    int lock_fd;  /* -1 while the workload stands still */
    bool is_lent; /* another process's memory, whose state has not come yet */
};

struct mw_workload {
    const char *name;
    struct mw_block blocks[MW_MAX_BLOCKS];
    int block_count;
    struct mw_device devices[MW_MAX_DEVICES];
    int device_count;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int inside;
    bool is_open;
    bool has_begun; /* the daemon has said what it wants the workload for */
    bool has_guest; /* its memory is a guest's, which the next daemon must not empty */
    char note[MW_NOTE_BYTES]; /* what the daemon wants to be told again, as it stood in JSON */
    bool is_gone;
    bool is_lazy;    /* from the next start on memory may be missing */
    bool ran_lazily; /* it may be missing, and nobody else runs this guest */
    int throttle_percentage;
    int socket;
    int userfaultfd;
    void (*on_loaded)(void *); /* called after a state was loaded */
    void *on_loaded_argument;
    void (*on_reset)(void *); /* begin anew; nobody is inside then. NULL: it cannot be reset */
    void *on_reset_argument;
    void (*on_powerdown)(void *); /* somebody wants it to end, in its own time */
    void *on_powerdown_argument;
};

/* Whether it can stand in a message as it is. */
static inline bool mw_is_name(const char *name)
{
    size_t length = strlen(name);
    for (size_t i = 0; i < length; i++)
        if (name[i] <= ' ' || name[i] > '~' || name[i] == '"' || name[i] == '\\')
            return false;
    return length > 0 && length < 256;
}

/* NULL and errno on failure. */
static inline struct mw_workload *mw_create(const char *name)
{
    if (!mw_is_name(name)) {
        errno = EINVAL;
        return NULL;
    }
    struct mw_workload *w = calloc(1, sizeof(*w));
    if (!w)
        return NULL;
    w->name = name;
    w->is_open = true;
    w->socket = w->userfaultfd = -1;
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->changed, NULL);
    return w;
}

/* Memory goes from process to process by its memfd: who runs on it holds a lock on it. */
static inline void mw_unlock(struct mw_block *block)
{
    if (block->lock_fd >= 0) {
        flock(block->lock_fd, LOCK_UN);
        close(block->lock_fd);
    }
    block->lock_fd = -1;
}

static inline bool mw_lock(struct mw_block *block)
{
    char path[64];
    if (block->lock_fd >= 0)
        return true;
    snprintf(path, sizeof(path), "/proc/self/fd/%d", block->fd);
    block->lock_fd = open(path, O_RDWR | O_CLOEXEC);
    if (block->lock_fd < 0 || flock(block->lock_fd, LOCK_EX | LOCK_NB) == 0)
        return true;
    mw_unlock(block);
    return false;
}

static inline int mw_empty_memfd(size_t size)
{
    int fd = memfd_create("migrationd-block", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -1;
    /* The daemon maps it too: it must not shrink under its reads. */
    if (ftruncate(fd, size) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Memory that is shared with the daemon, zero at first; NULL and errno on failure. */
static inline void *mw_add_block(struct mw_workload *w, const char *name, size_t size)
{
    long page = sysconf(_SC_PAGESIZE);
    size = (size + page - 1) / page * page;
    if (!mw_is_name(name) || w->block_count == MW_MAX_BLOCKS) {
        errno = w->block_count == MW_MAX_BLOCKS ? ENOSPC : EINVAL;
        return NULL;
    }
    int fd = mw_empty_memfd(size);
    if (fd < 0)
        return NULL;
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) {
        close(fd);
        return NULL;
    }
    w->blocks[w->block_count] = (struct mw_block){name, size, fd, memory, -1, false};
    mw_lock(&w->blocks[w->block_count++]);
    return memory;
}

/* Declare a device; fields and state must live as long as the workload. -1 and errno on failure. */
static inline int mw_add_device(struct mw_workload *w, const char *name, int version_id,
                                const struct mw_field *fields, int field_count, void *state)
{
    if (w->device_count == MW_MAX_DEVICES || field_count > MW_MAX_FIELDS) {
        errno = ENOSPC;
        return -1;
    }
    bool is_known = mw_is_name(name) && version_id >= 0;
    for (int i = 0; i < w->device_count; i++)
        is_known = is_known && strcmp(w->devices[i].name, name) != 0;
    for (int i = 0; i < field_count; i++) {
        size_t size = fields[i].size;
        is_known = is_known && (size == 1 || size == 2 || size == 4 || size == 8);
    }
    if (!is_known) {
        errno = EINVAL;
        return -1;
    }
    w->devices[w->device_count++] =
        (struct mw_device){name, version_id, fields, field_count, state};
    return 0;
}

/* Wait until the guest may run; it is not stopped before mw_leave(). */
static inline void mw_enter(struct mw_workload *w)
{
    int percentage = w->throttle_percentage;
    if (percentage > 0) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        long long cycle = MW_SLICE_NS * 100 / (100 - percentage);
        long long at = (now.tv_sec * 1000000000LL + now.tv_nsec) % cycle;
        if (at > MW_SLICE_NS) {
            struct timespec rest = {(cycle - at) / 1000000000LL, (cycle - at) % 1000000000LL};
            nanosleep(&rest, NULL);
        }
    }
    pthread_mutex_lock(&w->lock);
    while (!w->is_open)
        pthread_cond_wait(&w->changed, &w->lock);
    w->inside++;
    pthread_mutex_unlock(&w->lock);
}

static inline void mw_leave(struct mw_workload *w)
{
    pthread_mutex_lock(&w->lock);
    w->inside--;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
}

static inline void mw_set_open(struct mw_workload *w, bool is_open)
{
    pthread_mutex_lock(&w->lock);
    w->is_open = is_open;
    while (!is_open && w->inside)
        pthread_cond_wait(&w->changed, &w->lock);
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
}

/* Room for the descriptors of one message. */
union mw_control {
    char bytes[CMSG_SPACE(4 * sizeof(int))];
    struct cmsghdr head;
};

static inline int mw_send(struct mw_workload *w, const char *text, const int *fds, int count)
{
    union mw_control control = {0};
    struct iovec iov = {(void *)text, strlen(text)};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    if (count) {
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *head = CMSG_FIRSTHDR(&message);
        head->cmsg_level = SOL_SOCKET;
        head->cmsg_type = SCM_RIGHTS;
        head->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(head), fds, count * sizeof(int));
    }
    return sendmsg(w->socket, &message, MSG_NOSIGNAL) < 0 ? -1 : 0;
}

static inline uint64_t mw_load(const void *at, size_t size)
{
    uint64_t value = 0;
    memcpy(&value, at, size); /* little-endian hosts */
    return value;
}

static inline void mw_describe_fields(FILE *out, const struct mw_device *d, const char *format)
{
    for (int i = 0; i < d->field_count; i++)
        fprintf(out, format, i ? ", " : "", d->fields[i].name, (int)d->fields[i].size * 8,
                (int)d->fields[i].size);
}

/* Watch all blocks for writes; without it the guest can only migrate while it is stopped. */
static inline int mw_watch(struct mw_workload *w)
{
    if (w->userfaultfd >= 0)
        close(w->userfaultfd); /* what it watched is free again */
    w->userfaultfd = -1;
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -1;
    struct uffdio_api api = {.api = UFFD_API, .features = (1 << 15) | (1 << 13) | (1 << 12) |
                                                             (1 << 10) | (1 << 8) | (1 << 5)};
    int result = ioctl(fd, UFFDIO_API, &api);
    for (int i = 0; i < w->block_count && result == 0; i++) {
        struct uffdio_register range = {
            .range = {(uintptr_t)w->blocks[i].memory, w->blocks[i].size},
            .mode = UFFDIO_REGISTER_MODE_WP,
        };
        result = ioctl(fd, UFFDIO_REGISTER, &range);
    }
    if (result < 0) {
        close(fd);
        return -1;
    }
    return w->userfaultfd = fd;
}

/* Another userfaultfd, which writes wait for; the daemon alone keeps it. -1 if there is none. */
static inline int mw_open_faults(void)
{
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -1;
    struct uffdio_api api = {.api = UFFD_API, .features = (1 << 0) | (1 << 12)};
    if (ioctl(fd, UFFDIO_API, &api) == 0)
        return fd;
    close(fd);
    return -1;
}

static inline int mw_introduce(struct mw_workload *w)
{
    char *text = NULL;
    size_t length = 0;
    int fds[3], count = 0;
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    int faults = mw_open_faults();
    const char *names = "";
    if (pagemap >= 0 && mw_watch(w) >= 0) {
        fds[count++] = pagemap;
        fds[count++] = w->userfaultfd;
        names = faults < 0 ? "\"pagemap\", \"userfaultfd\""
                           : "\"pagemap\", \"userfaultfd\", \"faults\"";
    } else if (faults >= 0)
        names = "\"faults\"";
    if (faults >= 0)
        fds[count++] = faults;
    FILE *out = open_memstream(&text, &length);
    fprintf(out,
            "{\"hello\": {\"version\": 1, \"name\": \"%s\", \"page_size\": %ld, "
            "\"running\": %s, \"has_guest\": %s, \"note\": \"%s\", \"descriptors\": [%s], "
            "\"devices\": [",
            w->name, sysconf(_SC_PAGESIZE), w->is_open ? "true" : "false",
            w->has_guest ? "true" : "false", w->note, names);
    for (int i = 0; i < w->device_count; i++) {
        const struct mw_device *d = &w->devices[i];
        fprintf(out,
                "%s{\"name\": \"%s\", \"instance_id\": 0, \"version_id\": %d, "
                "\"minimum_version_id\": %d, \"fields\": [",
                i ? ", " : "", d->name, d->version_id, d->version_id);
        mw_describe_fields(out, d, "%s{\"name\": \"%s\", \"type\": \"uint%d\"}");
        fprintf(out, "]}");
    }
    fprintf(out, "]}}");
    fclose(out);
    int result = mw_send(w, text, fds, count);
    free(text);
    if (pagemap >= 0)
        close(pagemap);
    if (faults >= 0)
        close(faults);
    for (int i = 0; i < w->block_count && result == 0; i++) {
        char block[512];
        snprintf(block, sizeof(block),
                 "{\"block\": {\"name\": \"%s\", \"size\": %zu, \"address\": %llu}}",
                 w->blocks[i].name, w->blocks[i].size,
                 (unsigned long long)(uintptr_t)w->blocks[i].memory);
        result = mw_send(w, block, &w->blocks[i].fd, 1);
    }
    return result < 0 ? result : mw_send(w, "{\"ready\": {}}", NULL, 0);
}

static inline void mw_save(struct mw_workload *w, long id)
{
    char *text = NULL;
    size_t length = 0;
    int fd = memfd_create("devices", MFD_CLOEXEC);
    FILE *out = open_memstream(&text, &length);
    fprintf(out, "{\"id\": %ld, \"return\": {\"devices\": [", id);
    for (int i = 0; i < w->device_count; i++) {
        const struct mw_device *d = &w->devices[i];
        size_t total = 0;
        for (int f = 0; f < d->field_count; f++) {
            size_t size = d->fields[f].size;
            uint64_t value = mw_load((char *)d->state + d->fields[f].offset, size);
            for (size_t byte = size; byte-- > 0;) {
                uint8_t out_byte = value >> (8 * byte);
                if (write(fd, &out_byte, 1) != 1)
                    break;
            }
            total += size;
        }
        fprintf(out,
                "%s{\"name\": \"%s\", \"instance_id\": 0, \"version_id\": %d, \"length\": %zu}",
                i ? ", " : "", d->name, d->version_id, total);
    }
    fprintf(out, "], \"description\": [");
    for (int i = 0; i < w->device_count; i++) {
        const struct mw_device *d = &w->devices[i];
        fprintf(out,
                "%s{\"name\": \"%s\", \"instance_id\": 0, \"vmsd_name\": \"%s\", "
                "\"version\": %d, \"fields\": [",
                i ? ", " : "", d->name, d->name, d->version_id);
        mw_describe_fields(out, d, "%s{\"name\": \"%s\", \"type\": \"uint%d\", \"size\": %d}");
        fprintf(out, "]}");
    }
    fprintf(out, "]}}");
    fclose(out);
    mw_send(w, text, &fd, 1);
    free(text);
    close(fd);
}

/* Devices come in the order in which they were declared: the daemon checked that before. */
static inline bool mw_load_devices(struct mw_workload *w, int fd)
{
    off_t at = 0;
    for (int i = 0; i < w->device_count; i++)
        for (int f = 0; f < w->devices[i].field_count; f++) {
            const struct mw_field *field = &w->devices[i].fields[f];
            uint8_t bytes[8];
            uint64_t value = 0;
            if (pread(fd, bytes, field->size, at) != (ssize_t)field->size)
                return false;
            at += field->size;
            for (size_t byte = 0; byte < field->size; byte++)
                value = value << 8 | bytes[byte];
            memcpy((char *)w->devices[i].state + field->offset, &value, field->size);
        }
    if (w->on_loaded)
        w->on_loaded(w->on_loaded_argument);
    return true;
}

static inline long mw_number(const char *text, const char *name)
{
    const char *found = strstr(text, name);
    return found ? strtol(found + strlen(name), NULL, 10) : 0;
}

static inline bool mw_names(const char *text, const char *request)
{
    char wanted[64];
    snprintf(wanted, sizeof(wanted), "\"execute\": \"%s\"", request);
    return strstr(text, wanted) != NULL;
}

static inline int mw_count(const char *text, const char *wanted)
{
    int count = 0;
    for (; (text = strstr(text, wanted)); text += strlen(wanted))
        count++;
    return count;
}

/* Whether the source's devices are exactly these: names, versions and fields in order. */
static inline bool mw_same_devices(struct mw_workload *w, const char *text)
{
    int field_count = 0;
    for (int i = 0; i < w->device_count; i++)
        field_count += w->devices[i].field_count;
    /* What is not found below is more than these have. */
    if (mw_count(text, "\"version_id\": ") != w->device_count ||
        mw_count(text, "\"type\": ") != field_count)
        return false;
    for (int i = 0; i < w->device_count; i++) {
        char wanted[320];
        const struct mw_device *d = &w->devices[i];
        snprintf(wanted, sizeof(wanted), "\"name\": \"%s\"", d->name);
        if (!(text = strstr(text, wanted)) || mw_number(text, "\"version_id\": ") != d->version_id)
            return false;
        for (int f = 0; f < d->field_count; f++) {
            snprintf(wanted, sizeof(wanted), "{\"name\": \"%s\", \"type\": \"uint%d\"}",
                     d->fields[f].name, (int)d->fields[f].size * 8);
            if (!(text = strstr(text, wanted)))
                return false;
        }
    }
    return true;
}

/* Put another memfd in a block's place, at the same address. */
static inline bool mw_remap(struct mw_workload *w, const char *text, int fd)
{
    for (int i = 0; i < w->block_count; i++) {
        struct mw_block *block = &w->blocks[i];
        struct stat status;
        char wanted[320];
        snprintf(wanted, sizeof(wanted), "\"block\": \"%s\"", block->name);
        if (!strstr(text, wanted))
            continue;
        if (w->is_open || fstat(fd, &status) < 0 || status.st_size < (off_t)block->size)
            return false;
        int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
        if (own < 0 || mmap(block->memory, block->size, PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_FIXED, own, 0) == MAP_FAILED) {
            close(own);
            return false;
        }
        mw_unlock(block);
        close(block->fd);
        block->fd = own;
        block->is_lent = strstr(text, "\"is_lent\": true") != NULL;
        struct uffdio_register range = {
            .range = {(uintptr_t)block->memory, block->size},
            .mode = UFFDIO_REGISTER_MODE_WP,
        };
        return w->userfaultfd < 0 || ioctl(w->userfaultfd, UFFDIO_REGISTER, &range) == 0;
    }
    return false;
}

static inline bool mw_run(struct mw_workload *w, bool is_open)
{
    bool has_all = true;
    for (int i = 0; is_open && i < w->block_count; i++)
        has_all = has_all && mw_lock(&w->blocks[i]);
    if (has_all)
        mw_set_open(w, is_open);
    for (int i = 0; (!is_open || !has_all) && i < w->block_count; i++)
        mw_unlock(&w->blocks[i]);
    return has_all;
}

/* Keep a note as it stands in the packet, with JSON's escapes. */
static inline bool mw_keep(struct mw_workload *w, const char *text)
{
    const char *begin = strstr(text, "\"note\": \"");
    if (!begin)
        return false;
    begin += strlen("\"note\": \"");
    size_t length = 0;
    while (begin[length] && begin[length] != '"')
        length += begin[length] == '\\' && begin[length + 1] ? 2 : 1;
    if (length >= sizeof(w->note))
        return false;
    memcpy(w->note, begin, length);
    w->note[length] = 0;
    return true;
}

/* Begin anew while nobody is inside; a guest that runs goes on from there. */
static inline bool mw_reset(struct mw_workload *w)
{
    bool was_open = w->is_open;
    if (!w->on_reset)
        return false;
    mw_set_open(w, false);
    w->on_reset(w->on_reset_argument);
    mw_set_open(w, was_open);
    return true;
}

static inline bool mw_knows(const char *text)
{
    static const char *const requests[] = {
        "begin", "stop",  "start", "throttle", "check",     "load", "remap",
        "lazy",  "whole", "keep",  "reset",    "powerdown", "quit",
    };
    for (size_t i = 0; i < sizeof(requests) / sizeof(*requests); i++)
        if (mw_names(text, requests[i]))
            return true;
    return false;
}

/* Put empty memory in the place of what is another process's; without it nothing can be done. */
static inline void mw_renew(struct mw_block *block)
{
    int fd = mw_empty_memfd(block->size);
    if (fd < 0 || mmap(block->memory, block->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                       fd, 0) == MAP_FAILED)
        abort();
    close(block->fd);
    block->fd = fd;
    block->is_lent = false;
}

static inline void mw_tell(struct mw_workload *w, bool *flag)
{
    pthread_mutex_lock(&w->lock);
    *flag = true;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
}

static inline void *mw_serve(void *argument)
{
    struct mw_workload *w = argument;
    char *text = malloc(MW_PACKET_BYTES + 1);
    for (;;) {
        union mw_control control;
        struct iovec iov = {text, MW_PACKET_BYTES};
        struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control,
                                 .msg_controllen = sizeof(control)};
        ssize_t length = recvmsg(w->socket, &message, MSG_CMSG_CLOEXEC);
        if (length < 0 && errno == EINTR)
            continue;
        if (length <= 0)
            break; /* the daemon is gone: a guest that runs goes on alone */
        text[length] = 0;
        int fds[4], fd_count = 0;
        struct cmsghdr *head = CMSG_FIRSTHDR(&message);
        if (head && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS) {
            fd_count = (head->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(fds, CMSG_DATA(head), fd_count * sizeof(int));
        }
        int fd = fd_count ? fds[0] : -1;
        long id = mw_number(text, "\"id\": ");
        const char *error = NULL;
        if (mw_names(text, "save")) {
            mw_save(w, id);
            while (fd_count)
                close(fds[--fd_count]);
            continue;
        }
        if (!mw_knows(text))
            error = "the request is not known";
        else if (mw_names(text, "stop"))
            mw_run(w, false);
        else if (mw_names(text, "begin") && strstr(text, "destination")) {
            mw_run(w, false);
            w->is_lazy = w->ran_lazily = w->has_guest = false;
            w->note[0] = 0;
        } else if (mw_names(text, "begin"))
            w->has_guest = true;
        else if (mw_names(text, "keep") && !mw_keep(w, text))
            error = "the note is too long";
        else if (mw_names(text, "start")) {
            w->ran_lazily = w->is_lazy;
            w->has_guest = true;
            if (!mw_run(w, true))
                error = "another process runs on this memory";
        } else if (mw_names(text, "lazy"))
            w->is_lazy = true;
        else if (mw_names(text, "whole"))
            w->is_lazy = w->ran_lazily = false;
        else if (mw_names(text, "throttle")) {
            long percentage = mw_number(text, "\"percentage\": ");
            w->throttle_percentage = percentage < 0 ? 0 : percentage > 99 ? 99 : percentage;
        }
        else if (mw_names(text, "check") && !mw_same_devices(w, text))
            error = "the source's devices are not those of this program";
        else if (mw_names(text, "load") && !mw_load_devices(w, fd))
            error = "the state of the devices is cut short";
        else if (mw_names(text, "remap") && !mw_remap(w, text, fd))
            error = "the memory cannot be put in the block's place";
        else if (mw_names(text, "reset") && !mw_reset(w))
            error = "this program cannot be reset";
        else if (mw_names(text, "powerdown") && w->on_powerdown)
            w->on_powerdown(w->on_powerdown_argument);
        if (!error && mw_names(text, "load"))
            w->has_guest = true;
        for (int i = 0; !error && mw_names(text, "load") && i < w->block_count; i++)
            w->blocks[i].is_lent = false;
        while (fd_count)
            close(fds[--fd_count]);
        char reply[256];
        snprintf(reply, sizeof(reply), error ? "{\"id\": %ld, \"error\": \"%s\"}"
                                             : "{\"id\": %ld, \"return\": {}}", id, error);
        mw_send(w, reply, NULL, 0);
        if (mw_names(text, "quit"))
            exit(0);
        if (mw_names(text, "begin"))
            mw_tell(w, &w->has_begun);
    }
    free(text);
    if (w->ran_lazily)
        _exit(75); /* what is missing would read as zero: better no guest than a wrong one */
    for (int i = 0; i < w->block_count; i++)
        if (w->blocks[i].is_lent)
            mw_renew(&w->blocks[i]);
    w->throttle_percentage = 0;
    close(w->socket);
    w->socket = -1;
    mw_tell(w, &w->is_gone);
    return NULL;
}

/* Connect to the daemon and answer it on a thread from now on; -1 and errno on failure.
 * Returns when the daemon has begun: a destination does not run for a moment first. */
static inline int mw_attach(struct mw_workload *w, const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    pthread_t thread;
    if (w->socket >= 0) {
        errno = EISCONN;
        return -1;
    }
    if (strlen(path) >= sizeof(address.sun_path)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(address.sun_path, path);
    for (int attempt = 0;; attempt++) {
        w->socket = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
        if (w->socket < 0)
            return -1;
        /* The kernel's default is less than the longest message. */
        int longest = MW_PACKET_BYTES;
        setsockopt(w->socket, SOL_SOCKET, SO_SNDBUF, &longest, sizeof(longest));
        if (connect(w->socket, (struct sockaddr *)&address, sizeof(address)) == 0)
            break;
        int reason = errno;
        close(w->socket);
        w->socket = -1;
        errno = reason;
        if ((reason != ENOENT && reason != ECONNREFUSED) || attempt == 1000)
            return -1;
        usleep(10000);
    }
    w->has_begun = w->is_gone = false;
    int reason = mw_introduce(w) < 0 ? errno : pthread_create(&thread, NULL, mw_serve, w);
    if (reason) {
        close(w->socket);
        w->socket = -1;
        errno = reason;
        return -1;
    }
    pthread_detach(thread);
    pthread_mutex_lock(&w->lock);
    while (!w->has_begun && !w->is_gone)
        pthread_cond_wait(&w->changed, &w->lock);
    bool has_begun = w->has_begun;
    pthread_mutex_unlock(&w->lock);
    errno = ECONNREFUSED;
    return has_begun ? 0 : -1;
}

#endif
