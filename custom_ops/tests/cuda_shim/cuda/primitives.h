// src/cuda/primitives.h for the shim: what PTX alone can say, in C++.
#ifndef BIVLM_CUDA_PRIMITIVES_H_
#define BIVLM_CUDA_PRIMITIVES_H_

#include <cuda_runtime.h>

#include <cstdint>

namespace bivlm::cuda {

template <typename T>
T* DynamicShared() {
  return static_cast<T*>(cuda_shim::DynamicShared());
}

// Copies happen as late as they may, in WaitForCopies, or at once: see SetReverse.
inline void CopyAsync16(void* shared, const void* global) {
  cuda_shim::CopyLater(shared, global, 16);
}
inline void CommitCopies() { cuda_shim::CommitCopies(); }
template <unsigned pending>
void WaitForCopies() {
  cuda_shim::WaitForCopies(pending);
}

// The fragments of mma.sync.m16n8k32 with .s8 operands, PTX ISA "Warp-level matrix fragment": with
// g = lane / 4 and i = lane % 4, byte b of register r holds
//   a: row g + 8 (r % 2), k 4 i + 16 (r / 2) + b
//   b: k 4 i + 16 r + b, column g
// and register r of the accumulator row g + 8 (r / 2), column 2 i + r % 2.
inline void MmaM16N8K32(const uint32_t (&a)[4], const uint32_t (&b)[2], const int32_t (&c)[4],
                        int32_t (&d)[4]) {
  struct Registers {
    uint32_t a[4];
    uint32_t b[2];
  };
  Registers given;
  std::memcpy(given.a, a, sizeof(a));
  std::memcpy(given.b, b, sizeof(b));
  const unsigned own_row = cuda_shim::LaneIndex() / 4;
  const unsigned own_column = cuda_shim::LaneIndex() % 4 * 2;
  int32_t result[4];
  cuda_shim::Exchange(~0U, "mma.m16n8k32", given, [&](const cuda_shim::LaneData& lanes) {
    for (unsigned r = 0; r < 4; ++r) {
      const unsigned row = own_row + 8 * (r / 2);
      const unsigned column = own_column + r % 2;
      result[r] = c[r];
      for (unsigned k = 0; k < 32; k += 4) {
        const unsigned i = k % 16 / 4;
        const auto* of_a = static_cast<const Registers*>(lanes[row % 8 * 4 + i]);
        const auto* of_b = static_cast<const Registers*>(lanes[column * 4 + i]);
        result[r] = __dp4a(static_cast<int>(of_a->a[row / 8 + 2 * (k / 16)]),
                           static_cast<int>(of_b->b[k / 16]), result[r]);
      }
    }
  });
  std::memcpy(d, result, sizeof(d));
}

// mma.sync.m8n8k16 with .s8 operands: byte b of a is row g, k 4 i + b, of b k 4 i + b, column g;
// register r of the accumulator row g, column 2 i + r.
inline void MmaM8N8K16(uint32_t a, uint32_t b, const int32_t (&c)[2], int32_t (&d)[2]) {
  struct Registers {
    uint32_t a;
    uint32_t b;
  };
  const unsigned row = cuda_shim::LaneIndex() / 4;
  const unsigned own_column = cuda_shim::LaneIndex() % 4 * 2;
  int32_t result[2] = {c[0], c[1]};
  cuda_shim::Exchange(~0U, "mma.m8n8k16", Registers{a, b}, [&](const cuda_shim::LaneData& lanes) {
    for (unsigned r = 0; r < 2; ++r) {
      for (unsigned i = 0; i < 4; ++i) {
        const auto* of_a = static_cast<const Registers*>(lanes[row * 4 + i]);
        const auto* of_b = static_cast<const Registers*>(lanes[(own_column + r) * 4 + i]);
        result[r] = __dp4a(static_cast<int>(of_a->a), static_cast<int>(of_b->b), result[r]);
      }
    }
  });
  std::memcpy(d, result, sizeof(d));
}

}  // namespace bivlm::cuda

#endif  // BIVLM_CUDA_PRIMITIVES_H_
