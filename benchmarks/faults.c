/*
 * A workload that measures what a missing page costs it: it touches pages of its block in
 * random order, each once, on several threads.
 *
 *     faults SOCKET MIB THREADS PAGES PAUSE_US REPORT
 *
 * At its source it fills the block and then does nothing. Where it arrives it touches PAGES
 * pages on each thread with PAUSE_US between two of them, and writes to REPORT the time of all
 * together and of each touch, in nanoseconds.
 */
#include "migrationd_workload.h"

#define PAGE 4096

struct state {
    uint64_t is_filled;
};

static const struct mw_field fields[] = {MW_FIELD(struct state, is_filled)};

static struct state state;
static struct mw_workload *workload;
static uint8_t *heap;
static long pages, each, pause_us;
static uint32_t *order;
static uint64_t *taken;
static bool has_arrived;

static uint64_t now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000ULL + at.tv_nsec;
}

static void arrived(void *unused)
{
    (void)unused;
    has_arrived = true;
}

static void *touch(void *argument)
{
    long thread = (long)argument;
    volatile uint8_t *memory = heap;
    mw_enter(workload);
    for (long i = thread * each; i < (thread + 1) * each; i++) {
        uint64_t begin = now();
        uint8_t value = memory[(size_t)order[i] * PAGE];
        taken[i] = now() - begin;
        if (value != (uint8_t)(order[i] | 1))
            abort();
        if (pause_us)
            usleep(pause_us);
    }
    mw_leave(workload);
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 7)
        return 2;
    long threads = atol(argv[3]);
    pages = atol(argv[2]) << 8;
    each = atol(argv[4]);
    pause_us = atol(argv[5]);
    order = malloc(pages * sizeof(*order));
    taken = calloc(threads * each, sizeof(*taken));
    workload = mw_create("faults");
    heap = workload ? mw_add_block(workload, "heap", (size_t)pages * PAGE) : NULL;
    if (!heap || !order || !taken || threads * each > pages)
        return 1;
    workload->on_loaded = arrived;
    if (mw_add_device(workload, "faults", 1, fields, 1, &state) < 0 ||
        mw_attach(workload, argv[1]) < 0)
        return 1;
    uint64_t random = 88172645463325252ULL;
    for (long i = 0; i < pages; i++)
        order[i] = i;
    for (long i = pages - 1; i > 0; i--) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        long other = random % (i + 1);
        uint32_t kept = order[i];
        order[i] = order[other], order[other] = kept;
    }
    mw_enter(workload);
    if (!state.is_filled)
        for (long i = 0; i < pages; i++) {
            uint64_t *words = (uint64_t *)(heap + i * PAGE);
            for (int word = 0; word < PAGE / 8; word++) {
                random ^= random << 13, random ^= random >> 7, random ^= random << 17;
                words[word] = random;
            }
            heap[i * PAGE] = i | 1;
        }
    state.is_filled = 1;
    mw_leave(workload);
    mw_enter(workload);
    mw_leave(workload);
    if (has_arrived) {
        pthread_t ids[64];
        uint64_t begin = now();
        for (long i = 0; i < threads; i++)
            pthread_create(&ids[i], NULL, touch, (void *)i);
        for (long i = 0; i < threads; i++)
            pthread_join(ids[i], NULL);
        uint64_t end = now();
        char aside[4096];
        snprintf(aside, sizeof(aside), "%s.new", argv[6]);
        FILE *out = fopen(aside, "w");
        fprintf(out, "%llu\n", (unsigned long long)(end - begin));
        for (long i = 0; i < threads * each; i++)
            fprintf(out, "%llu\n", (unsigned long long)taken[i]);
        fclose(out);
        rename(aside, argv[6]);
    } else {
        FILE *out = fopen(argv[6], "w");
        fprintf(out, "filled\n");
        fclose(out);
    }
    for (;;)
        pause();
}
