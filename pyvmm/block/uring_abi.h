/* What the kernel and a program have in common about io_uring: structures and numbers of <linux/io_uring.h>.
 *
 * They are here because that header may be missing or older than what is used of it (the images that portable wheels
 * are built in come with headers of Linux 4.18 and before). The kernel never changes them. Where this host has the
 * header, tests/unit/block/test_block_uring.py has the compiler compare the two.
 */
#ifndef PYVMM_URING_ABI_H
#define PYVMM_URING_ABI_H

#include <stdint.h>

/* The three system calls have these numbers on every architecture. */
enum { URING_NR_SETUP = 425, URING_NR_ENTER = 426, URING_NR_REGISTER = 427 };

enum {
    URING_OP_READV = 1, URING_OP_WRITEV = 2, URING_OP_FSYNC = 3, URING_OP_ASYNC_CANCEL = 14,
    URING_OP_READ = 22, URING_OP_WRITE = 23,
};
enum { URING_FSYNC_DATASYNC = 1 };
enum { URING_OFF_SQ_RING = 0, URING_OFF_SQES = 0x10000000 };
enum { URING_SQ_CQ_OVERFLOW = 2 };
enum { URING_ENTER_GETEVENTS = 1 };
enum { URING_FEAT_SINGLE_MMAP = 1, URING_FEAT_NODROP = 2, URING_FEAT_SUBMIT_STABLE = 4 };
enum { URING_REGISTER_EVENTFD = 4, URING_REGISTER_PROBE = 8 };
enum { URING_PROBE_OPS = 256, URING_OP_SUPPORTED = 1 };

struct uring_sqe {
    uint8_t opcode;
    uint8_t flags;
    uint16_t ioprio;
    int32_t fd;
    uint64_t off;
    uint64_t addr;
    uint32_t len;
    uint32_t op_flags; /* a union there: rw_flags, fsync_flags, cancel_flags */
    uint64_t user_data;
    uint16_t buf_index;
    uint16_t personality;
    int32_t splice_fd_in;
    uint64_t reserved[2];
};

struct uring_cqe {
    uint64_t user_data;
    int32_t res;
    uint32_t flags;
};

struct uring_sq_offsets {
    uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved1;
    uint64_t reserved2;
};

struct uring_cq_offsets {
    uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved1;
    uint64_t reserved2;
};

struct uring_params {
    uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, reserved[3];
    struct uring_sq_offsets sq_off;
    struct uring_cq_offsets cq_off;
};

struct uring_probe_op {
    uint8_t op;
    uint8_t reserved1;
    uint16_t flags;
    uint32_t reserved2;
};

struct uring_probe {
    uint8_t last_op, ops_len;
    uint16_t reserved1;
    uint32_t reserved2[3];
    struct uring_probe_op ops[URING_PROBE_OPS];
};

_Static_assert(sizeof(struct uring_sqe) == 64, "struct io_uring_sqe");
_Static_assert(sizeof(struct uring_cqe) == 16, "struct io_uring_cqe");
_Static_assert(sizeof(struct uring_params) == 120, "struct io_uring_params");

#endif
