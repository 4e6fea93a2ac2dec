/* A library for LD_PRELOAD: the wall clock jumps by up to ten years, forwards or backwards, several
 * times a second. The monotonic clock is not changed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

#define SECONDS_OF_TEN_YEARS 315360000
#define NANOSECONDS_BETWEEN_JUMPS 300000000

static int real_clock(clockid_t clock, struct timespec *now) {
    static int (*original)(clockid_t, struct timespec *);
    if (original == NULL)
        original = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    return original(clock, now);
}

/* The offset is a function of the monotonic clock, so that all processes see the same jumps. */
static int64_t offset_seconds(void) {
    struct timespec now;
    real_clock(CLOCK_MONOTONIC, &now);
    uint64_t jump = ((uint64_t)now.tv_sec * 1000000000 + now.tv_nsec) / NANOSECONDS_BETWEEN_JUMPS;
    jump = (jump + 1) * 0x9E3779B97F4A7C15u; /* mixes the bits */
    jump ^= jump >> 29;
    return (int64_t)(jump % (2 * SECONDS_OF_TEN_YEARS)) - SECONDS_OF_TEN_YEARS;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = real_clock(clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += offset_seconds();
    return result;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result != NULL)
        *result = now.tv_sec;
    return now.tv_sec;
}
