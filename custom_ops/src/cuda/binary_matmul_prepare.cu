// The transform of activations and their rounding to int8, one warp per token and chunk.
#include <cfloat>

#include "cuda/activation.h"
#include "cuda/binary_matmul_kernels.h"
#include "cuda/launch.h"

namespace bivlm::cuda {
namespace {

constexpr unsigned kBlockWarps = 4;
constexpr unsigned kChunk = kChunkColumns;
constexpr uint32_t kInfinityBits = 0x7F800000U;

// Channel j of a row of x, padded with zeros.
template <typename T>
__device__ float Channel(const DeviceWeight& weight, const T* x, std::size_t j) {
  return j < weight.k ? ToFloat(x[j]) : 0.0F;
}

// u = H diag(signs) x / sqrt(32 count) for the 32 count channels from `start` on; u[i] is channel
// start + 32 i + lane.
template <unsigned count, typename T>
__device__ void SignedHadamard(const DeviceWeight& weight, const T* x, std::size_t start,
                               unsigned lane, float (&u)[count]) {
  constexpr float kFactor = count == 2 ? 0.125F : 0.08838834764831845F;
  static_assert(count == 2 || count == 4);
#pragma unroll
  for (unsigned i = 0; i < count; ++i) {
    const std::size_t j = start + kWarp * i + lane;
    const bool is_plus = weight.signs == nullptr || (weight.signs[j / 8] >> (j % 8) & 1) != 0;
    u[i] = Channel(weight, x, j) * (is_plus ? kFactor : -kFactor);
  }
#pragma unroll
  for (unsigned step = 1; step < kWarp; step *= 2) {
#pragma unroll
    for (unsigned i = 0; i < count; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, u[i], static_cast<int>(step));
      u[i] = (lane & step) == 0 ? u[i] + other : other - u[i];
    }
  }
#pragma unroll
  for (unsigned step = 1; step < count; step *= 2) {
#pragma unroll
    for (unsigned i = 0; i < count; ++i) {
      if ((i & step) != 0) continue;
      const float sum = u[i] + u[i + step];
      u[i + step] = u[i] - u[i + step];
      u[i] = sum;
    }
  }
}

// Channels lane and 32 + lane of chunk `chunk` of u, the transform without the order.
template <typename T>
__device__ void TransformChunk(const DeviceWeight& weight, const T* x, unsigned chunk,
                               unsigned lane, float (&v)[2]) {
  if (weight.hadamard_block == 64) {
    SignedHadamard(weight, x, std::size_t{chunk} * kChunk, lane, v);
    return;
  }
  float u[4];
  SignedHadamard(weight, x, std::size_t{chunk / 2} * (2 * kChunk), lane, u);
  v[0] = chunk % 2 == 0 ? u[0] : u[2];
  v[1] = chunk % 2 == 0 ? u[1] : u[3];
}

// Token and chunk of a warp. False behind the last one.
__device__ bool FindUnit(unsigned tokens, unsigned chunks, std::size_t* token, unsigned* chunk) {
  const std::size_t unit = std::size_t{blockIdx.x} * kBlockWarps + threadIdx.x / kWarp;
  *token = unit / chunks;
  *chunk = static_cast<unsigned>(unit % chunks);
  return *token < tokens;
}

// transformed = u for the m rows of x.
template <typename T>
__global__ void __launch_bounds__(kBlockWarps* kWarp)
    TransformKernel(DeviceWeight weight, const T* x, unsigned m, float* transformed) {
  std::size_t token;
  unsigned chunk;
  if (!FindUnit(m, weight.chunks, &token, &chunk)) return;
  const unsigned lane = threadIdx.x % kWarp;
  float v[2];
  TransformChunk(weight, x + token * weight.k, chunk, lane, v);
  float* u = transformed + (token * weight.chunks + chunk) * kChunk;
  u[lane] = v[0];
  u[kWarp + lane] = v[1];
}

// Where a chunk's column lies among its bytes, see binary_matmul_kernels.h.
__device__ unsigned ByteOf(unsigned column, bool is_paired) {
  if (!is_paired) return column;
  const unsigned i = column / 4 % 4;
  const unsigned e = column % 4;
  return column / 16 * 16 + 4 * (e / 2 + 2 * (i % 2)) + 2 * (e % 2) + i / 2;
}

// Rounds chunk `chunk` of v; lanes hold columns lane and 32 + lane.
__device__ void QuantizeChunk(const float (&v)[2], bool is_paired, unsigned lane, int8_t* q,
                              ChunkFactors* factors) {
  const uint32_t first = __float_as_uint(v[0]) & 0x7FFFFFFFU;
  const uint32_t second = __float_as_uint(v[1]) & 0x7FFFFFFFU;
  uint32_t largest = first > second ? first : second;
#pragma unroll
  for (int step = 1; step < static_cast<int>(kWarp); step *= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, largest, step);
    largest = other > largest ? other : largest;
  }
  const float scale = __fdiv_rn(__uint_as_float(largest), 127.0F);
  const bool is_finite = largest < kInfinityBits;
  int32_t sum = 0;
#pragma unroll
  for (unsigned i = 0; i < 2; ++i) {
    const int32_t rounded =
        is_finite && scale >= FLT_MIN ? __float2int_rn(__fdiv_rn(v[i], scale)) : 0;
    q[ByteOf(kWarp * i + lane, is_paired)] = static_cast<int8_t>(rounded);
    sum += rounded;
  }
#pragma unroll
  for (int step = 1; step < static_cast<int>(kWarp); step *= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, step);
  }
  if (lane != 0) return;
  factors->scale = scale >= FLT_MIN ? scale : 0.0F;
  if (!is_finite) factors->scale = __int_as_float(0x7FC00000);
  factors->start = kFloatBias - sum;
}

// Rounds the m rows of x, and zeros for the tokens behind them.
template <typename T>
__global__ void __launch_bounds__(kBlockWarps* kWarp)
    QuantizeKernel(DeviceWeight weight, const T* x, unsigned m, Prepared prepared) {
  std::size_t token;
  unsigned chunk;
  if (!FindUnit(prepared.tokens, weight.chunks, &token, &chunk)) return;
  const unsigned lane = threadIdx.x % kWarp;
  float v[2] = {0.0F, 0.0F};
  if (token < m) {
    const T* row = x + token * weight.k;
    if (weight.hadamard_block > 0 && prepared.transformed == nullptr) {
      TransformChunk(weight, row, weight.order == nullptr ? chunk : weight.order[chunk], lane, v);
    } else {
#pragma unroll
      for (unsigned i = 0; i < 2; ++i) {
        const unsigned column = kWarp * i + lane;
        std::size_t from = std::size_t{chunk} * kChunk + column;
        if (weight.order != nullptr) {
          from = weight.order_has_chunks ? std::size_t{weight.order[chunk]} * kChunk + column
                                         : weight.order[from];
        }
        v[i] = prepared.transformed == nullptr
                   ? Channel(weight, row, from)
                   : prepared.transformed[token * weight.chunks * kChunk + from];
      }
    }
  }
  const std::size_t at = std::size_t{chunk} * prepared.tokens + token;
  QuantizeChunk(v, chunk < weight.paired_chunks, lane,
                reinterpret_cast<int8_t*>(prepared.q + 4 * at), prepared.factors + at);
}

template <typename T>
cudaError_t LaunchPrepareOf(const DeviceWeight& weight, const T* x, unsigned m,
                            const Prepared& prepared, cudaStream_t stream) {
  const auto blocks = [&](unsigned tokens) {
    const std::size_t units = std::size_t{tokens} * weight.chunks;
    return dim3(static_cast<unsigned>((units + kBlockWarps - 1) / kBlockWarps));
  };
  const dim3 block(kBlockWarps * kWarp);
  if (prepared.transformed != nullptr) {
    const cudaError_t error =
        Launch(TransformKernel<T>, blocks(m), block, 0, stream, weight, x, m, prepared.transformed);
    if (error != cudaSuccess) return error;
  }
  return Launch(QuantizeKernel<T>, blocks(prepared.tokens), block, 0, stream, weight, x, m,
                prepared);
}

}  // namespace

cudaError_t LaunchPrepare(const DeviceWeight& weight, const BinaryMatMulArgs& args,
                          const Prepared& prepared, cudaStream_t stream) {
  const unsigned m = static_cast<unsigned>(args.m);
  if (args.type == ElementType::kFloat16) {
    return LaunchPrepareOf(weight, static_cast<const uint16_t*>(args.x), m, prepared, stream);
  }
  return LaunchPrepareOf(weight, static_cast<const float*>(args.x), m, prepared, stream);
}

}  // namespace bivlm::cuda
