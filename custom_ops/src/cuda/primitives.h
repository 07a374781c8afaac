// What CUDA C++ has no name for; the tests put tests/cuda_shim/cuda/primitives.h in its place.
#ifndef BIVLM_CUDA_PRIMITIVES_H_
#define BIVLM_CUDA_PRIMITIVES_H_

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace bivlm::cuda {

// The dynamic shared memory of the block, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ T* DynamicShared() {
  extern __shared__ uint4 dynamic_shared[];
  return reinterpret_cast<T*>(dynamic_shared);
}

// Copies 16 bytes from global to shared memory, both aligned to 16; the copies before a
// CommitCopies form a group, and WaitForCopies leaves the `pending` newest groups under way. From
// sm_80 on they need no registers and no waiting in between.
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global) {
  __pipeline_memcpy_async(shared, global, 16);
}
__device__ __forceinline__ void CommitCopies() { __pipeline_commit(); }
template <unsigned pending>
__device__ __forceinline__ void WaitForCopies() {
  __pipeline_wait_prior(pending);
}

// d = a * b + c for a warp: a 16 x 32 and b 32 x 8 int8, c and d 16 x 8 int32, all lanes together.
// With g = lane / 4 and i = lane % 4, byte n of register r holds
//   a: row g + 8 (r % 2), k = 4 i + 16 (r / 2) + n
//   b: k = 4 i + 16 r + n, column g
// and register r of c and d row g + 8 (r / 2), column 2 i + r % 2. From sm_80 on.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-16832
__device__ __forceinline__ void MmaM16N8K32(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                            const int32_t (&c)[4], int32_t (&d)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]),
        "r"(c[2]), "r"(c[3]));
}

// The same of a 8 x 16, b 16 x 8 and c 8 x 8: byte n holds
//   a: row g, k = 4 i + n
//   b: k = 4 i + n, column g
// and register r of c and d row g, column 2 i + r.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-8816
__device__ __forceinline__ void MmaM8N8K16(uint32_t a, uint32_t b, const int32_t (&c)[2],
                                           int32_t (&d)[2]) {
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(a), "r"(b), "r"(c[0]), "r"(c[1]));
}

}  // namespace bivlm::cuda

#endif  // BIVLM_CUDA_PRIMITIVES_H_
