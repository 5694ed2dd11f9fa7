/*
 * A guest in C: it counts in its memory, page after page, and checks what it reads.
 *
 *     cc -O2 -o counter counter.c -lpthread && ./counter SOCKET REPORT
 *
 * REPORT always holds the present pass, page and the number of mistakes, as JSON.
 */
#include "migrationd_workload.h"

#define PAGE 4096
#define PAGES 4096

struct counter {
    uint64_t passes;
    uint64_t at;
    uint32_t mistakes;
};

static struct counter state = {.passes = 1};
static uint8_t *heap;
static volatile bool ends;

static const struct mw_field fields[] = {
    MW_FIELD(struct counter, passes),
    MW_FIELD(struct counter, at),
    MW_FIELD(struct counter, mistakes),
};

/* As after a power cycle; nobody counts meanwhile. */
static void begin_anew(void *unused)
{
    (void)unused;
    memset(heap, 0, (size_t)PAGES * PAGE);
    state = (struct counter){.passes = 1};
}

static void end_soon(void *unused)
{
    (void)unused;
    ends = true;
}

static void report(const char *path, const struct counter *state, double now)
{
    char aside[4096];
    snprintf(aside, sizeof(aside), "%s.new", path);
    FILE *out = fopen(aside, "w");
    if (!out)
        return;
    fprintf(out, "{\"passes\": %llu, \"at\": %llu, \"mistakes\": %u, \"t\": %f}",
            (unsigned long long)state->passes, (unsigned long long)state->at, state->mistakes,
            now);
    fclose(out);
    rename(aside, path);
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: counter SOCKET REPORT\n");
        return 2;
    }
    struct mw_workload *workload = mw_create("counter");
    heap = workload ? mw_add_block(workload, "heap", (size_t)PAGES * PAGE) : NULL;
    if (workload) {
        workload->on_reset = begin_anew;
        workload->on_powerdown = end_soon;
    }
    if (!heap || mw_add_device(workload, "counter", 1, fields, 3, &state) < 0 ||
        mw_attach(workload, argv[1]) < 0) {
        perror("counter");
        return 1;
    }
    while (!ends) {
        struct timespec now;
        mw_enter(workload);
        for (int i = 0; i < 64; i++) {
            uint64_t *page = (uint64_t *)(heap + state.at * PAGE);
            if (*page != state.passes - 1)
                state.mistakes++;
            *page = state.passes;
            if (++state.at == PAGES) {
                state.at = 0;
                state.passes++;
            }
        }
        clock_gettime(CLOCK_MONOTONIC, &now);
        report(argv[2], &state, now.tv_sec + now.tv_nsec / 1e9);
        mw_leave(workload);
        usleep(5000);
    }
    return 0;
}
