/* Preloaded with LD_PRELOAD: counts what a process changes below a folder, and at a number ends it or fills its disk.

   arm(folder, at, full, log) begins in the process that calls it. From then on every mkdir, rename, unlink, rmdir, fsync, write,
   and every open for writing of a path that begins with `folder` counts as an operation, which gets a line in the file `log`,
   unless that is empty. At number `at` a write is done by half, anything else not at all, and the process is ended by SIGKILL; with
   `full` that operation and all later ones that need room fail with ENOSPC instead. With `at` 0 nothing happens but the counting. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { GO_ON, END_HERE, NO_ROOM };

static char watched[PATH_MAX], log_path[PATH_MAX];
static long counted, wanted;
static int disk_full;
static pid_t armed;

void arm(const char *folder, long at, int full, const char *log) {
  snprintf(watched, sizeof watched, "%s", folder);
  snprintf(log_path, sizeof log_path, "%s", log);
  counted = 0, wanted = at, disk_full = full, armed = getpid();
}

static void note(long number, const char *operation, const char *path) {
  char line[PATH_MAX + 64];
  int size = snprintf(line, sizeof line, "%ld %s %s\n", number, operation, path);
  int file = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND, 0644);
  syscall(SYS_write, file, line, size);
  syscall(SYS_close, file);
}

static int decide(const char *operation, const char *path, int takes_room) {
  if (getpid() != armed || strncmp(path, watched, strlen(watched))) return GO_ON; /* a reader of samples is not counted */
  long number = __sync_add_and_fetch(&counted, 1);
  if (log_path[0]) note(number, operation, path);
  if (!wanted || number < wanted) return GO_ON;
  if (!disk_full) return number == wanted ? END_HERE : GO_ON;
  if (!takes_room) return GO_ON;
  errno = ENOSPC;
  return NO_ROOM;
}

static void end(void) {
  kill(getpid(), SIGKILL);
  pause();
}

/* The whole path of a name in an open folder, or in the working folder. */
static const char *whole(int folder, const char *name, char *buffer) {
  char link[64];
  if (name[0] == '/') return name;
  snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
  ssize_t size = readlink(link, buffer, PATH_MAX - 1);
  buffer[size < 0 ? 0 : size] = 0;
  if (name[0] && strlen(buffer) + strlen(name) + 2 < PATH_MAX) strcat(strcat(buffer, "/"), name);
  return buffer;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

/* The body of a function that changes names: what the real one says, unless its turn has come. */
#define CHANGE(operation, folder, name, takes_room, call)                        \
  char buffer[PATH_MAX];                                                         \
  int what = armed ? decide(operation, whole(folder, name, buffer), takes_room) : GO_ON; \
  if (what == END_HERE) end();                                                   \
  return what == NO_ROOM ? -1 : call;

int mkdir(const char *path, mode_t mode) {
  CHANGE("mkdir", AT_FDCWD, path, 1, REAL(int, mkdir, const char *, mode_t)(path, mode))
}
int rename(const char *old, const char *new) {
  CHANGE("rename", AT_FDCWD, new, 0, REAL(int, rename, const char *, const char *)(old, new))
}
int renameat(int from, const char *old, int to, const char *new) {
  CHANGE("rename", to, new, 0, REAL(int, renameat, int, const char *, int, const char *)(from, old, to, new))
}
int unlink(const char *path) { CHANGE("unlink", AT_FDCWD, path, 0, REAL(int, unlink, const char *)(path)) }
int rmdir(const char *path) { CHANGE("rmdir", AT_FDCWD, path, 0, REAL(int, rmdir, const char *)(path)) }
int unlinkat(int folder, const char *path, int flags) {
  CHANGE("unlink", folder, path, 0, REAL(int, unlinkat, int, const char *, int)(folder, path, flags))
}
int fsync(int file) { CHANGE("fsync", file, "", 0, REAL(int, fsync, int)(file)) }

#define WRITE(half, call)                                                        \
  char buffer[PATH_MAX];                                                         \
  int what = armed ? decide("write", whole(file, "", buffer), 1) : GO_ON;        \
  if (what == END_HERE) {                                                        \
    half;                                                                        \
    end();                                                                       \
  }                                                                              \
  return what == NO_ROOM ? -1 : call;

ssize_t write(int file, const void *data, size_t size) {
  WRITE(syscall(SYS_write, file, data, size / 2), syscall(SYS_write, file, data, size))
}
ssize_t pwrite64(int file, const void *data, size_t size, off_t place) {
  WRITE(syscall(SYS_pwrite64, file, data, size / 2, place), syscall(SYS_pwrite64, file, data, size, place))
}
ssize_t writev(int file, const struct iovec *parts, int count) {
  WRITE(syscall(SYS_writev, file, parts, count / 2), syscall(SYS_writev, file, parts, count))
}

static int opened(int folder, const char *path, int flags, mode_t mode) {
  if ((flags & O_ACCMODE) == O_RDONLY && !(flags & O_CREAT)) return syscall(SYS_openat, folder, path, flags, mode);
  CHANGE("open", folder, path, 1, syscall(SYS_openat, folder, path, flags, mode))
}

#define MODE                               \
  va_list rest;                            \
  va_start(rest, flags);                   \
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
  va_end(rest);

int open(const char *path, int flags, ...) {
  MODE return opened(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  MODE return opened(AT_FDCWD, path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
  MODE return opened(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
  MODE return opened(folder, path, flags, mode);
}

FILE *fopen64(const char *path, const char *mode) {
  char buffer[PATH_MAX];
  int what = armed && strpbrk(mode, "wa+") ? decide("open", whole(AT_FDCWD, path, buffer), 1) : GO_ON;
  if (what == END_HERE) end();
  return what == NO_ROOM ? NULL : REAL(FILE *, fopen64, const char *, const char *)(path, mode);
}
