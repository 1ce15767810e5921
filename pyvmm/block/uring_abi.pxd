# io_uring's structures and numbers (uring_abi.h says where they come from): only what uring.pyx uses.

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "uring_abi.h" nogil:
    enum:
        URING_NR_SETUP, URING_NR_ENTER, URING_NR_REGISTER
        URING_OP_READV, URING_OP_WRITEV, URING_OP_FSYNC, URING_OP_ASYNC_CANCEL, URING_OP_READ, URING_OP_WRITE
        URING_FSYNC_DATASYNC
        URING_OFF_SQ_RING, URING_OFF_SQES
        URING_SQ_CQ_OVERFLOW
        URING_ENTER_GETEVENTS
        URING_FEAT_SINGLE_MMAP, URING_FEAT_NODROP, URING_FEAT_SUBMIT_STABLE
        URING_REGISTER_EVENTFD, URING_REGISTER_PROBE
        URING_PROBE_OPS, URING_OP_SUPPORTED

    struct uring_sqe:
        uint8_t opcode
        int32_t fd
        uint64_t off
        uint64_t addr
        uint32_t len
        uint32_t op_flags
        uint64_t user_data

    struct uring_cqe:
        uint64_t user_data
        int32_t res

    struct uring_sq_offsets:
        uint32_t head, tail, ring_mask, flags, array

    struct uring_cq_offsets:
        uint32_t head, tail, ring_mask, cqes

    struct uring_params:
        uint32_t sq_entries, cq_entries, features
        uring_sq_offsets sq_off
        uring_cq_offsets cq_off

    struct uring_probe_op:
        uint16_t flags

    struct uring_probe:
        uint8_t ops_len
        uring_probe_op ops[256]
