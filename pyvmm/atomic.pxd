# The compiler's atomics on int, for the few flags that one thread sets and another one reads.

cdef extern from * nogil:
    int ATOMIC_SEQ_CST "__ATOMIC_SEQ_CST"
    int ATOMIC_ACQUIRE "__ATOMIC_ACQUIRE"
    int ATOMIC_RELEASE "__ATOMIC_RELEASE"
    int ATOMIC_RELAXED "__ATOMIC_RELAXED"
    int atomic_load "__atomic_load_n" (int *, int)
    void atomic_store "__atomic_store_n" (int *, int, int)
    int atomic_exchange "__atomic_exchange_n" (int *, int, int)
    void atomic_fence "__atomic_thread_fence" (int)
    unsigned int atomic_load_u32 "__atomic_load_n" (unsigned int *, int)
    void atomic_store_u32 "__atomic_store_n" (unsigned int *, unsigned int, int)
    void atomic_store_u8 "__atomic_store_n" (unsigned char *, unsigned char, int)
