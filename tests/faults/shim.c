/* Faults for one process: every system call that changes a file below a folder is counted, written to a trace, and the
   k-th fails, tears, kills, or moves the clock.

   The calls are caught by seccomp (SECCOMP_RET_TRAP), not by name: safetensors renames its files by a bare syscall
   instruction and libc opens files for itself, and neither passes a function that a preloaded library could replace.
   Only the clock, which is no system call, is replaced by name: this library is preloaded. Linux on x86-64.

   faults_begin() reads the plan from the environment and stays in force until the process ends:
     FAULTS_ROOT   the folder             FAULTS_TRACE  file for one line a call      FAULTS_DATA  file for what is written
     FAULTS_AT     k, from 1              FAULTS_DO     an errno, or a word of `words`
     FAULTS_OPS    calls that also fail after the k-th, ",write,mkdir," (for an errno)
     FAULTS_JUMP   seconds that CLOCK_REALTIME moves by */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define PATH 4352 /* PATH_MAX and a name */

/* kill: before the call is made; torn: after half of a write, after any other call; short: half of a write is done, the
   rest is the caller's; jump: the clock. */
enum { KILL = -1, TORN = -2, SHORT = -3, JUMP = -4 };
static const char *const words[] = {"kill", "torn", "short", "jump"};

static char root[PATH], also_fail[512];
static long at, what, seen, jump;
static int trace = -1, data = -1;
static volatile long offset; /* of the clock, now */
static volatile int lock;

/* The one place from which calls are not caught. */
long direct(long number, long a, long b, long c, long d, long e, long f);
extern const char after_direct[];
__asm__(".text\n.globl direct\n.hidden direct\n.globl after_direct\n.hidden after_direct\n"
        "direct: mov %rdi,%rax\n mov %rsi,%rdi\n mov %rdx,%rsi\n mov %rcx,%rdx\n mov %r8,%r10\n mov %r9,%r8\n"
        " mov 8(%rsp),%r9\n syscall\nafter_direct: ret\n");
#define CALL3(number, a, b, c) direct(number, (long)(a), (long)(b), (long)(c), 0, 0, 0)

struct call {
    const char *op;
    long dir, dir2;           /* folder descriptors for name, name2 */
    const char *name, *name2; /* NULL: the call is about a descriptor, `fd` */
    long fd, size, flags;
};

static int understood(long number, const long *a, struct call *c) {
    *c = (struct call){.dir = AT_FDCWD, .dir2 = AT_FDCWD, .fd = a[0]};
    switch (number) {
#define NAMED(number, word, ...)                                                                                       \
    case number:                                                                                                       \
        c->op = word;                                                                                                  \
        __VA_ARGS__;                                                                                                   \
        return 1;
#define P(i) ((const char *)a[i])
        NAMED(SYS_open, "open", c->name = P(0), c->flags = a[1])
        NAMED(SYS_creat, "open", c->name = P(0), c->flags = O_WRONLY | O_CREAT | O_TRUNC)
        NAMED(SYS_openat, "open", c->dir = a[0], c->name = P(1), c->flags = a[2])
        NAMED(SYS_mkdir, "mkdir", c->name = P(0))
        NAMED(SYS_mkdirat, "mkdir", c->dir = a[0], c->name = P(1))
        NAMED(SYS_rmdir, "rmdir", c->name = P(0))
        NAMED(SYS_unlink, "unlink", c->name = P(0))
        NAMED(SYS_unlinkat, a[2] & AT_REMOVEDIR ? "rmdir" : "unlink", c->dir = a[0], c->name = P(1))
        NAMED(SYS_rename, "rename", c->name = P(0), c->name2 = P(1))
        NAMED(SYS_renameat, "rename", c->dir = a[0], c->name = P(1), c->dir2 = a[2], c->name2 = P(3))
        NAMED(SYS_renameat2, "rename", c->dir = a[0], c->name = P(1), c->dir2 = a[2], c->name2 = P(3))
        NAMED(SYS_link, "link", c->name = P(0), c->name2 = P(1))
        NAMED(SYS_linkat, "link", c->dir = a[0], c->name = P(1), c->dir2 = a[2], c->name2 = P(3))
        NAMED(SYS_symlink, "symlink", c->name = P(1))
        NAMED(SYS_symlinkat, "symlink", c->dir = a[1], c->name = P(2))
        NAMED(SYS_chmod, "chmod", c->name = P(0))
        NAMED(SYS_fchmodat, "chmod", c->dir = a[0], c->name = P(1))
        NAMED(SYS_truncate, "truncate", c->name = P(0), c->size = a[1])
        NAMED(SYS_fchmod, "chmod")
        NAMED(SYS_ftruncate, "truncate", c->size = a[1])
        NAMED(SYS_fallocate, "fallocate")
        NAMED(SYS_write, "write", c->size = a[2])
        NAMED(SYS_pwrite64, "write", c->size = a[2])
        NAMED(SYS_writev, "writev")
        NAMED(SYS_pwritev, "writev")
        NAMED(SYS_pwritev2, "writev")
        NAMED(SYS_sendfile, "sendfile")
        NAMED(SYS_copy_file_range, "sendfile", c->fd = a[2])
        NAMED(SYS_fsync, "fsync")
        NAMED(SYS_fdatasync, "fsync")
        NAMED(SYS_close, "close")
        NAMED(SYS_mmap, "mmap", c->fd = a[4])
    }
    return 0;
}

static const int caught_calls[] = {
    SYS_open,    SYS_creat,     SYS_openat, SYS_mkdir,    SYS_mkdirat, SYS_rmdir,    SYS_unlink,   SYS_unlinkat,
    SYS_rename,  SYS_renameat,  SYS_renameat2, SYS_link,  SYS_linkat,  SYS_symlink,  SYS_symlinkat, SYS_chmod,
    SYS_fchmodat, SYS_truncate, SYS_fchmod, SYS_ftruncate, SYS_fallocate, SYS_write, SYS_pwrite64, SYS_writev,
    SYS_pwritev, SYS_pwritev2,  SYS_sendfile, SYS_copy_file_range, SYS_fsync, SYS_fdatasync, SYS_close};
enum { CALLS = sizeof caught_calls / sizeof *caught_calls };

/* ------------------------------------------------------------------------------------------------------------ paths */

static void of_descriptor(long fd, char *out) {
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", (int)fd);
    long n = CALL3(SYS_readlink, link, out, PATH - 1);
    out[n > 0 ? n : 0] = 0;
}

static void whole_path(long dir, const char *name, char *out) {
    size_t n = 0;
    if (name[0] != '/') {
        if ((int)dir == AT_FDCWD) {
            if (CALL3(SYS_getcwd, out, PATH, 0) < 0)
                out[0] = 0;
        } else
            of_descriptor(dir, out);
        n = strlen(out);
        out[n++] = '/';
    }
    snprintf(out + n, PATH - n, "%s", name);
}

static int below(const char *path) {
    size_t n = strlen(root);
    return !strncmp(path, root, n) && (path[n] == '/' || !path[n]);
}

static int changes(const struct call *c) {
    if (!strcmp(c->op, "open"))
        return c->flags & (O_ACCMODE | O_CREAT | O_TRUNC);
    if (!strcmp(c->op, "close"))
        return direct(SYS_fcntl, c->fd, F_GETFL, 0, 0, 0, 0) & O_ACCMODE;
    return 1;
}

/* ------------------------------------------------------------------------------------------------------------ a call */

static void die(void) {
    CALL3(SYS_kill, CALL3(SYS_getpid, 0, 0, 0), SIGKILL, 0);
    for (;;)
        ;
}

static void keep(const void *bytes, long n) {
    if (data >= 0 && n > 0)
        CALL3(SYS_write, data, bytes, n);
}

static long made(long number, const long *a) { return direct(number, a[0], a[1], a[2], a[3], a[4], a[5]); }

/* One line: k, call, inode, result, offset, length, flags, path, second path; the inode is the file's after the call. */
static void note(long k, const struct call *c, long number, const long *a, long result, long flags, const char *path,
                 const char *path2) {
    struct stat s = {0};
    char line[2 * PATH + 256];
    long from = c->size, length = 0;
    if (!strcmp(c->op, "open") && result >= 0)
        CALL3(SYS_fstat, result, &s, 0);
    else if (!c->name)
        CALL3(SYS_fstat, c->fd, &s, 0);
    else
        CALL3(SYS_lstat, path2[0] && result >= 0 ? path2 : path, &s, 0);
    if (!strncmp(c->op, "write", 5)) {
        int positioned = number != SYS_write && number != SYS_writev;
        length = result > 0 ? result : 0;
        from = positioned ? a[3] : CALL3(SYS_lseek, c->fd, 0, SEEK_CUR) - length;
        if (number == SYS_write || number == SYS_pwrite64)
            keep((const void *)a[1], length);
        else
            for (long i = 0, left = length; i < a[2] && left > 0; i++) {
                const struct iovec *v = (const struct iovec *)a[1] + i;
                long n = left < (long)v->iov_len ? left : (long)v->iov_len;
                keep(v->iov_base, n);
                left -= n;
            }
    }
    int n = snprintf(line, sizeof line, "%ld\t%s\t%lu\t%ld\t%ld\t%ld\t%ld\t%s\t%s\n", k, c->op, (unsigned long)s.st_ino,
                     result, from, length, flags, path, path2);
    CALL3(SYS_write, trace, line, n);
}

static long handled(long number, long *a) {
    struct call c;
    char path[PATH] = "", path2[PATH] = "";
    if (!understood(number, a, &c))
        return made(number, a);
    if (c.name)
        whole_path(c.dir, c.name, path);
    else
        of_descriptor(c.fd, path);
    if (c.name2)
        whole_path(c.dir2, c.name2, path2);
    if (!(below(path) || (path2[0] && below(path2))) || !changes(&c))
        return made(number, a);
    while (__sync_lock_test_and_set(&lock, 1))
        CALL3(SYS_sched_yield, 0, 0, 0);
    long k = ++seen, result, flags = c.flags;
    if (flags & O_CREAT) { /* the trace says whether the file is new */
        struct stat s;
        flags = CALL3(SYS_lstat, path, &s, 0) < 0 ? flags : flags & ~O_CREAT;
    }
    char word[32];
    snprintf(word, sizeof word, ",%s,", c.op);
    int now = at && (k == at || (k > at && what > 0 && strstr(also_fail, word)));
    int halves = now && (what == TORN || what == SHORT) && (number == SYS_write || number == SYS_pwrite64);
    if (now && what == KILL) {
        note(k, &c, number, a, -EINTR, flags, path, path2);
        die();
    }
    if (now && what == JUMP)
        offset = jump;
    if (halves && a[2] > 1)
        a[2] /= 2;
    if (now && what > 0) {
        if (!strcmp(c.op, "close"))
            made(number, a); /* the descriptor goes, whatever close says */
        result = -what;
    } else
        result = made(number, a);
    note(k, &c, number, a, result, flags, path, path2);
    if (now && what == TORN)
        die();
    __sync_lock_release(&lock);
    return result;
}

static void caught(int signal, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    long a[6] = {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], r[REG_R9]};
    (void)signal;
    r[REG_RAX] = handled(info->si_syscall, a);
}

/* ------------------------------------------------------------------------------------------------------------ the plan */

static const char *setting(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

static int opened(const char *name) {
    const char *path = setting(name);
    return path[0] ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
}

/* Gives 0, or an errno where this system can't catch calls. */
int faults_begin(void) {
    snprintf(root, sizeof root, "%s", setting("FAULTS_ROOT"));
    snprintf(also_fail, sizeof also_fail, "%s", setting("FAULTS_OPS"));
    at = atol(setting("FAULTS_AT")), jump = atol(setting("FAULTS_JUMP")), what = atol(setting("FAULTS_DO"));
    for (int i = 0; i < 4; i++)
        if (!strcmp(setting("FAULTS_DO"), words[i]))
            what = -1 - i;
    trace = opened("FAULTS_TRACE"), data = opened("FAULTS_DATA");
    struct sigaction action = {.sa_sigaction = caught, .sa_flags = SA_SIGINFO | SA_RESTART};
    if (sigaction(SIGSYS, &action, NULL))
        return errno;

    unsigned long us = (unsigned long)after_direct;
    enum { HEAD = 7, MMAP = 6 };
    struct sock_filter f[HEAD + CALLS + MMAP + 2];
    int n = 0, trap = HEAD + CALLS + MMAP + 1, allow = trap - 1;
#define FIELD(name) offsetof(struct seccomp_data, name)
#define LOAD(where) f[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, where)
#define TEST(kind, value, yes, no) /* to a line, or -1: the next */                                                    \
    f[n] = (struct sock_filter)BPF_JUMP(BPF_JMP | kind | BPF_K, (unsigned)(value), (yes) < 0 ? 0 : (yes)-n - 1,       \
                                        (no) < 0 ? 0 : (no)-n - 1),                                                    \
    n++
    LOAD(FIELD(arch));
    TEST(BPF_JEQ, AUDIT_ARCH_X86_64, -1, allow);
    LOAD(FIELD(instruction_pointer));
    TEST(BPF_JEQ, us & 0xffffffff, -1, 6);
    LOAD(FIELD(instruction_pointer) + 4);
    TEST(BPF_JEQ, us >> 32, allow, -1);
    LOAD(FIELD(nr));
    for (int i = 0; i < CALLS; i++)
        TEST(BPF_JEQ, caught_calls[i], trap, -1);
    TEST(BPF_JEQ, SYS_mmap, -1, allow); /* a file mapped to be written: writes that nobody sees */
    LOAD(FIELD(args[2]));
    TEST(BPF_JSET, PROT_WRITE, -1, allow);
    LOAD(FIELD(args[3]));
    TEST(BPF_JSET, MAP_SHARED, -1, allow);
    TEST(BPF_JSET, MAP_ANONYMOUS, allow, trap);
    f[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    f[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
    struct sock_fprog program = {.len = (unsigned short)n, .filter = f};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        return errno;
    return 0;
}

/* ------------------------------------------------------------------------------------------------------------ the clock */

int clock_gettime(clockid_t clock, struct timespec *t) {
    long result = CALL3(SYS_clock_gettime, clock, t, 0);
    if (result < 0) {
        errno = (int)-result;
        return -1;
    }
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)
        t->tv_sec += offset;
    return 0;
}

int gettimeofday(struct timeval *t, void *zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    *t = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out)
        *out = now.tv_sec;
    return now.tv_sec;
}
