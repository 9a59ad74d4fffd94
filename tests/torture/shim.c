/* Faults the k-th file call below a folder: preloaded into a process, which arms it.

   Counted: opening to write, writing, truncating, syncing, renaming, linking, making and removing. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { COUNT, KILL, STOP, NO_SPACE, IO_ERROR, NO_SPACE_FROM_NOW, SHORT_WRITE };

static char root[PATH_MAX];
static long target = 0, seen = 0;
static int action = COUNT;

void torture_arm(const char *folder, long k, int what) {
    snprintf(root, sizeof root, "%s/", folder);
    target = k, action = what, seen = 0;
}

long torture_count(void) { return seen; }

static int is_inside(const char *path) {
    char absolute[PATH_MAX];
    if (!root[0] || !path) return 0;
    if (path[0] != '/') {
        if (!getcwd(absolute, sizeof absolute)) return 0;
        size_t length = strlen(absolute);
        snprintf(absolute + length, sizeof absolute - length, "/%s", path);
        path = absolute;
    }
    return !strncmp(path, root, strlen(root));
}

static int is_file_inside(int fd) {
    char link[64], path[PATH_MAX];
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_inside(path);
}

/* Whether the call fails now, with errno set; a process that is killed or stopped is so before the call. */
static int fails(void) {
    long number = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (!target || number < target || (number > target && action != NO_SPACE_FROM_NOW)) return 0;
    if (action == KILL) kill(getpid(), SIGKILL);
    if (action == STOP) kill(getpid(), SIGSTOP);
    errno = action == IO_ERROR ? EIO : ENOSPC;
    return action == NO_SPACE || action == IO_ERROR || action == NO_SPACE_FROM_NOW;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                                            \
    int name(const char *path, int flags, ...) {                                              \
        mode_t mode = 0;                                                                      \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                  \
            va_list rest;                                                                     \
            va_start(rest, flags);                                                            \
            mode = va_arg(rest, mode_t);                                                      \
            va_end(rest);                                                                     \
        }                                                                                     \
        if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && is_inside(path) && fails()) return -1; \
        return REAL(name)(path, flags, mode);                                                 \
    }
OPEN(open)
OPEN(open64)

ssize_t write(int fd, const void *data, size_t size) {
    if (is_file_inside(fd)) {
        int is_next = target && seen + 1 == target;
        if (is_next && action == KILL && size > 1) REAL(write)(fd, data, size / 2); /* torn */
        if (is_next && action == SHORT_WRITE && size > 1) size /= 2;
        if (fails()) return -1;
    }
    return REAL(write)(fd, data, size);
}

#define ON_FILE(name, arguments, call) \
    int name arguments { return is_file_inside(fd) && fails() ? -1 : REAL(name) call; }
ON_FILE(fsync, (int fd), (fd))
ON_FILE(fdatasync, (int fd), (fd))
ON_FILE(ftruncate, (int fd, off_t size), (fd, size))
ON_FILE(ftruncate64, (int fd, off64_t size), (fd, size))

#define ON_PATH(name, arguments, call) \
    int name arguments { return is_inside(path) && fails() ? -1 : REAL(name) call; }
ON_PATH(rename, (const char *path, const char *to), (path, to))
ON_PATH(link, (const char *path, const char *to), (path, to))
ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode))
ON_PATH(rmdir, (const char *path), (path))
ON_PATH(unlink, (const char *path), (path))

static int is_at_inside(int fd, const char *path) {
    return path[0] == '/' || fd == AT_FDCWD ? is_inside(path) : is_file_inside(fd);
}

int unlinkat(int fd, const char *path, int flags) {
    return is_at_inside(fd, path) && fails() ? -1 : REAL(unlinkat)(fd, path, flags);
}

int renameat(int fd, const char *path, int fd_to, const char *to) {
    return is_at_inside(fd, path) && fails() ? -1 : REAL(renameat)(fd, path, fd_to, to);
}
