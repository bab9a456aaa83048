/* A disk with faults, for LD_PRELOAD. MODE_FILE names a file whose word says what happens to files below FAULTY_FOLDER:
   "slow" (every write and sync takes 30 ms), "readonly" (EROFS), "broken" (EIO); anything else, or no file: nothing. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static char mode(void) {
    const char *path = getenv("MODE_FILE");
    int file = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0) : -1;
    char first = 0;
    if (file >= 0) {
        if (syscall(SYS_read, file, &first, 1) != 1) first = 0;
        syscall(SYS_close, file);
    }
    return first;
}

static int is_below(const char *path) {
    const char *folder = getenv("FAULTY_FOLDER");
    return folder && path && !strncmp(path, folder, strlen(folder));
}

static int is_faulty(int file) {
    char name[64], path[PATH_MAX];
    snprintf(name, sizeof name, "/proc/self/fd/%d", file);
    ssize_t length = readlink(name, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_below(path);
}

/* What the disk does to a change: 0 lets it through. */
static int refuse(int faulty) {
    char now = faulty ? mode() : 0;
    if (now == 's') nanosleep(&(struct timespec){0, 30000000}, NULL);
    if (now != 'r' && now != 'b') return 0;
    errno = now == 'r' ? EROFS : EIO;
    return -1;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int file, const void *data, size_t size) { REAL(write); return file > 2 && refuse(is_faulty(file)) ? -1 : real(file, data, size); }
ssize_t pwrite(int file, const void *data, size_t size, off_t at) { REAL(pwrite); return refuse(is_faulty(file)) ? -1 : real(file, data, size, at); }
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) { REAL(pwrite64); return refuse(is_faulty(file)) ? -1 : real(file, data, size, at); }
int fsync(int file) { REAL(fsync); return refuse(is_faulty(file)) ? -1 : real(file); }
int fdatasync(int file) { REAL(fdatasync); return refuse(is_faulty(file)) ? -1 : real(file); }
int ftruncate(int file, off_t size) { REAL(ftruncate); return refuse(is_faulty(file)) ? -1 : real(file, size); }
int ftruncate64(int file, off64_t size) { REAL(ftruncate64); return refuse(is_faulty(file)) ? -1 : real(file, size); }
int unlink(const char *path) { REAL(unlink); return refuse(is_below(path)) ? -1 : real(path); }
int mkdir(const char *path, mode_t bits) { REAL(mkdir); return refuse(is_below(path)) ? -1 : real(path, bits); }
int rename(const char *from, const char *to) { REAL(rename); return refuse(is_below(to)) ? -1 : real(from, to); }
int link(const char *from, const char *to) { REAL(link); return refuse(is_below(to)) ? -1 : real(from, to); }

#define OPENING(name, ...) \
    mode_t bits = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, flags); bits = va_arg(more, mode_t); va_end(more); } \
    REAL(name); \
    return (flags & (O_WRONLY | O_RDWR | O_CREAT)) && refuse(is_below(path)) ? -1 : real(__VA_ARGS__, flags, bits);

int open(const char *path, int flags, ...) { OPENING(open, path) }
int open64(const char *path, int flags, ...) { OPENING(open64, path) }
int openat(int folder, const char *path, int flags, ...) { OPENING(openat, folder, path) }
int openat64(int folder, const char *path, int flags, ...) { OPENING(openat64, folder, path) }
