/* A library for LD_PRELOAD that lets calls of the C library fail.

   ANEW_FAIL_CALLS is a list of faults, separated by spaces: CALL:ERRNO:COUNT:PATH. The next COUNT
   calls of CALL (open, read, write, fsync or rename) whose path contains PATH return -1 with this
   errno. Each failed call appends a line "CALL PATH" to the file ANEW_FAILED_CALLS. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_FAULTS 64

struct fault {
    char call[16];
    int number;
    int left;
    char path[200];
};

static struct fault faults[MAX_FAULTS];
static int n_faults;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void read_faults(void)
{
    const char *text = getenv("ANEW_FAIL_CALLS");
    while (text != NULL && n_faults < MAX_FAULTS) {
        struct fault *fault = &faults[n_faults];
        if (sscanf(text, "%15[^:]:%d:%d:%199s", fault->call, &fault->number, &fault->left,
                   fault->path) == 4)
            n_faults++;
        text = strchr(text, ' ');
        if (text != NULL)
            text++;
    }
}

/* Appends to ANEW_FAILED_CALLS with system calls of its own, which no fault can reach. */
static void record(const char *call, const char *path)
{
    char line[4200];
    const char *name = getenv("ANEW_FAILED_CALLS");
    if (name == NULL)
        return;
    int length = snprintf(line, sizeof line, "%s %s\n", call, path);
    int flags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC;
    int file = (int)syscall(SYS_openat, AT_FDCWD, name, flags, 0644);
    if (file >= 0) {
        syscall(SYS_write, file, line, (size_t)length);
        syscall(SYS_close, file);
    }
}

/* Returns 1, with errno set, if this call must fail. */
static int fails(const char *call, const char *path)
{
    int failed = 0;
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < n_faults && !failed; i++) {
        struct fault *fault = &faults[i];
        if (fault->left > 0 && strcmp(fault->call, call) == 0 && strstr(path, fault->path)) {
            fault->left--;
            failed = 1;
            record(call, path);
            errno = fault->number;
        }
    }
    pthread_mutex_unlock(&mutex);
    return failed;
}

static int fails_on_file(const char *call, int file)
{
    char link[64];
    char path[4096];
    if (n_faults == 0)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = '\0';
    return fails(call, path);
}

ssize_t read(int file, void *content, size_t size)
{
    if (fails_on_file("read", file))
        return -1;
    return syscall(SYS_read, file, content, size);
}

ssize_t write(int file, const void *content, size_t size)
{
    if (fails_on_file("write", file))
        return -1;
    return syscall(SYS_write, file, content, size);
}

int fsync(int file)
{
    if (fails_on_file("fsync", file))
        return -1;
    return (int)syscall(SYS_fsync, file);
}

int rename(const char *source, const char *target)
{
    if (fails("rename", target))
        return -1;
    return renameat(AT_FDCWD, source, AT_FDCWD, target);
}

static int open_or_fail(const char *path, int flags, int mode)
{
    if (fails("open", path))
        return -1;
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

static int mode_of(int flags, va_list arguments)
{
    int has_mode = (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE;
    return has_mode ? va_arg(arguments, int) : 0;
}

int open(const char *path, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    int mode = mode_of(flags, arguments);
    va_end(arguments);
    return open_or_fail(path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    int mode = mode_of(flags, arguments);
    va_end(arguments);
    return open_or_fail(path, flags | O_LARGEFILE, mode);
}
