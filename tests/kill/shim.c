/* Preloaded into a process, kills it with SIGKILL just before the N-th file operation of one kind under one folder.
 *
 * strace can inject a signal at the N-th system call too, but it counts for each thread by itself: the first thread to
 * reach N dies, and the N-th calls of the others are never tried. This counts over the whole process.
 *
 *   void kill_shim_arm(const char *kind, long at, const char *folder)   at = 0 counts and never kills
 *   long kill_shim_count(void)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char armed_kind[16], folder[4096];
static long kill_at;
static atomic_long count;

void kill_shim_arm(const char *kind, long at, const char *under) {
    snprintf(armed_kind, sizeof armed_kind, "%s", kind);
    snprintf(folder, sizeof folder, "%s", under);
    kill_at = at;
    count = 0;
}

long kill_shim_count(void) { return count; }

static void reached(const char *kind, const char *path) {
    if (armed_kind[0] == 0 || strcmp(kind, armed_kind) != 0 || path == NULL) return;
    if (strncmp(path, folder, strlen(folder)) != 0) return;
    if (atomic_fetch_add(&count, 1) + 1 == kill_at) kill(getpid(), SIGKILL);
}

static void reached_fd(const char *kind, int fd) {
    if (armed_kind[0] == 0 || strcmp(kind, armed_kind) != 0) return;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return;
    path[length] = 0;
    reached(kind, path);
}

#define REAL(name, type) \
    static __typeof__(type) real; \
    if (!real) real = (__typeof__(type))dlsym(RTLD_NEXT, name)

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }

typedef int (*open_type)(const char *, int, ...);
typedef int (*openat_type)(int, const char *, int, ...);

int open(const char *path, int flags, ...) { MODE(flags) REAL("open", open_type); reached("openat", path); return real(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) REAL("open64", open_type); reached("openat", path); return real(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags) REAL("openat", openat_type); reached("openat", path); return real(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags) REAL("openat64", openat_type); reached("openat", path); return real(at, path, flags, mode); }

ssize_t write(int fd, const void *data, size_t size) {
    REAL("write", ssize_t (*)(int, const void *, size_t));
    reached_fd("write", fd);
    return real(fd, data, size);
}

int fsync(int fd) { REAL("fsync", int (*)(int)); reached_fd("fsync", fd); return real(fd); }
int link(const char *from, const char *to) { REAL("link", int (*)(const char *, const char *)); reached("link", to); return real(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) { REAL("linkat", int (*)(int, const char *, int, const char *, int)); reached("link", to); return real(a, from, b, to, flags); }
int rename(const char *from, const char *to) { REAL("rename", int (*)(const char *, const char *)); reached("rename", to); return real(from, to); }
int renameat(int a, const char *from, int b, const char *to) { REAL("renameat", int (*)(int, const char *, int, const char *)); reached("rename", to); return real(a, from, b, to); }
int unlink(const char *path) { REAL("unlink", int (*)(const char *)); reached("unlink", path); return real(path); }
int rmdir(const char *path) { REAL("rmdir", int (*)(const char *)); reached("unlink", path); return real(path); }
int mkdir(const char *path, mode_t mode) { REAL("mkdir", int (*)(const char *, mode_t)); reached("mkdir", path); return real(path, mode); }
