// What the parts of BinaryMatMul share: the weight as kernels get it, activations as they read
// them, and the launches.
#ifndef BIVLM_CUDA_BINARY_MATMUL_KERNELS_H_
#define BIVLM_CUDA_BINARY_MATMUL_KERNELS_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "bivlm/binary_matmul.h"

namespace bivlm::cuda {

inline constexpr unsigned kWarp = 32;
inline constexpr unsigned kAllLanes = 0xFFFFFFFFU;

// Tokens of one tensor-core product; rows of prepared activations come in multiples of it.
inline constexpr unsigned kGroupTokens = 8;

// The bits of 1.5 * 2^23, where floats are whole numbers: adding an int below 2^22 to them adds it
// to the float. The int8 products of a chunk are less than 2^20.
inline constexpr int32_t kFloatBias = 0x4B400000;

// Columns as int8, one unit of 16 per lane quarter. Column 16 u + 4 i + e of a chunk is byte
// 16 u + 4 i + e, or, in chunks with pair blocks, byte 16 u + 4 (e / 2 + 2 (i % 2)) + 2 (e % 2) +
// i / 2: the order in which PRMT looks up the codes of a word.
struct ChunkFactors {
  float scale;    // 0 where all q are 0; NaN where v is not finite
  int32_t start;  // kFloatBias - sum of q: what a product with bits 0 and 2 starts from
};

struct Prepared {
  uint4* q;               // (chunks, tokens, 4)
  ChunkFactors* factors;  // (chunks, tokens)
  float* transformed;     // (m, k_padded), where blocks are transformed before a column order
  unsigned tokens;        // m rounded up to kGroupTokens
};

// Passed by value to kernels.
struct DeviceStream {
  std::size_t code_offset;
  unsigned code_stride;
  unsigned chunk_begin;
  unsigned chunk_end;
  unsigned coefficient_slot;
  bool is_pair;
  bool is_behind_pair;  // a single block in chunks whose columns have the order of pair blocks
};

struct DeviceWeight {
  const uint8_t* codes;
  const uint16_t* coefficients;
  const uint8_t* signs;
  const uint16_t* order;
  std::size_t panel_code_bytes;
  std::size_t n;
  std::size_t k;
  unsigned panels;
  unsigned chunks;
  unsigned coefficient_slots;
  unsigned hadamard_block;
  unsigned stream_count;
  unsigned paired_chunks;  // the first ones, which have two planes or more
  bool order_has_chunks;
  DeviceStream streams[kMaxPlanes + 2];
};

// Transforms and rounds the m rows of x.
cudaError_t LaunchPrepare(const DeviceWeight& weight, const BinaryMatMulArgs& args,
                          const Prepared& prepared, cudaStream_t stream);

// y for few tokens, 8 to 32 at a time, or few rows.
cudaError_t LaunchDecode(const DeviceWeight& weight, const BinaryMatMulArgs& args,
                         const Prepared& prepared, cudaStream_t stream);

// y for any number of tokens, 64 at a time.
cudaError_t LaunchPrefill(const DeviceWeight& weight, const BinaryMatMulArgs& args,
                          const Prepared& prepared, cudaStream_t stream);

// Which of the two computes y; LaunchBinaryMatMul chooses, tests run both.
enum class Path { kDecode, kPrefill };
Path ChoosePath(const BinaryMatMulWeight& weight, std::size_t m);
std::string LaunchBy(Path path, const BinaryMatMulArgs& args, void* scratch,
                     std::size_t scratch_bytes, cudaStream_t stream);

}  // namespace bivlm::cuda

#endif  // BIVLM_CUDA_BINARY_MATMUL_KERNELS_H_
