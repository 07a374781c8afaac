// The product with few tokens: the warps of a block share two panels and divide their chunks, so
// that codes are read once, 512 bytes per warp and load, with several loads under way.
#include "cuda/binary_matmul_warp.h"
#include "cuda/launch.h"

namespace bivlm::cuda {
namespace {

// With fewer panel pairs than this, more warps per block; see WarpsOf.
constexpr std::size_t kManyPairs = 64;

// Warps of a block at most; their sums take 16 or 32 KiB of shared memory.
template <unsigned groups>
constexpr unsigned kMaxWarps = groups == 1 ? 16 : 8;

// The chunks of `groups` times 8 tokens that a warp multiplies while it waits for the next codes.
template <unsigned groups>
constexpr unsigned kBatch = groups == 1   ? 4
                            : groups == 2 ? 2
                                          : 1;

// Activations of the tokens of a block.
struct Tokens {
  const uint4* q;
  const int4* factors;
  unsigned stride;  // tokens of a chunk
  unsigned count;   // that are wanted
};

template <unsigned groups>
struct Sums {
  float at[groups][2][4];
};

// Units of `chunk` for token g of each group, zeros where nobody wants it.
template <unsigned groups>
struct ChunkTokens {
  uint4 units[groups];
  int4 factors[groups];

  __device__ __forceinline__ void Load(const Tokens& tokens, const Lane& lane, unsigned chunk,
                                       bool is_inside) {
    const std::size_t first = std::size_t{chunk} * tokens.stride;
#pragma unroll
    for (unsigned i = 0; i < groups; ++i) {
      const unsigned token = kGroupTokens * i + lane.g;
      const unsigned pair = kGroupTokens * i + 2 * lane.q;
      units[i] = make_uint4(0, 0, 0, 0);
      factors[i] = make_int4(0, 0, 0, 0);
      if (is_inside && token < tokens.count) {
        units[i] = __ldg(tokens.q + (first + token) * 4 + lane.q);
      }
      if (is_inside && pair < tokens.count) factors[i] = __ldg(tokens.factors + (first + pair) / 2);
    }
  }
};

// Adds this warp's chunks of a stream to `total`.
template <Block block, unsigned groups>
__device__ void AddStream(const DeviceWeight& weight, const DeviceStream& stream, const Lane& lane,
                          const Tokens& tokens, Sums<groups>* total) {
  constexpr unsigned batch = kBatch<groups>;
  const unsigned warps = blockDim.x / kWarp;
  const uint8_t* codes = lane.Codes(weight, stream);
  const auto load = [&](unsigned chunk) {
    return chunk < stream.chunk_end
               ? LoadCodes(codes + std::size_t{chunk - stream.chunk_begin} * stream.code_stride)
               : make_uint4(0, 0, 0, 0);
  };
  unsigned chunk = stream.chunk_begin + threadIdx.x / kWarp;
  uint4 next[batch];
#pragma unroll
  for (unsigned i = 0; i < batch; ++i) next[i] = load(chunk + i * warps);
  const LaneCoefficients rows = MakeCoefficients<block>(weight, stream, lane);
  Sums<groups> sums = {};
  for (; chunk < stream.chunk_end; chunk += batch * warps) {
    uint4 words[batch];
    ChunkTokens<groups> activations[batch];
#pragma unroll
    for (unsigned i = 0; i < batch; ++i) {
      words[i] = next[i];
      next[i] = load(chunk + (batch + i) * warps);
      const unsigned at = chunk + i * warps;
      activations[i].Load(tokens, lane, at, at < stream.chunk_end);
    }
#pragma unroll
    for (unsigned i = 0; i < batch; ++i) {
      const WeightFragments fragments = Unpack<block>(words[i], rows, lane.q);
#pragma unroll
      for (unsigned group = 0; group < groups; ++group) {
        AddProducts<block>(fragments, activations[i].units[group], activations[i].factors[group],
                           sums.at[group]);
      }
    }
  }
#pragma unroll
  for (unsigned group = 0; group < groups; ++group) {
    AddScaled(sums.at[group], rows, total->at[group]);
  }
}

// y of the block's rows and tokens = the sums of its warps.
template <typename T, unsigned groups>
__device__ void StoreSums(const DeviceWeight& weight, const Lane& lane, const Sums<groups>& total,
                          std::size_t first_row, unsigned tokens, T* y) {
  constexpr unsigned kTokens = groups * kGroupTokens;
  float* shared = DynamicShared<float>();  // (warps, kTokens, kWarpRows)
  float* own = shared + threadIdx.x / kWarp * (kTokens * kWarpRows);
#pragma unroll
  for (unsigned group = 0; group < groups; ++group) {
#pragma unroll
    for (unsigned i = 0; i < 2; ++i) {
      const float (&sums)[2][4] = total.at[group];
      const unsigned token = kGroupTokens * group + 2 * lane.q + i;
      *reinterpret_cast<float4*>(own + token * kWarpRows + 4 * lane.g) =
          make_float4(sums[0][i], sums[0][2 + i], sums[1][i], sums[1][2 + i]);
    }
  }
  __syncthreads();
  for (unsigned at = threadIdx.x; at < tokens * kWarpRows; at += blockDim.x) {
    float sum = shared[at];
    for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) {
      sum += shared[warp * (kTokens * kWarpRows) + at];
    }
    const std::size_t row = first_row + at % kWarpRows;
    if (row < weight.n) StoreAs(y + at / kWarpRows * weight.n + row, sum);
  }
}

template <typename T, unsigned groups>
__global__ void __launch_bounds__(kMaxWarps<groups>* kWarp)
    DecodeKernel(DeviceWeight weight, Prepared prepared, unsigned m, unsigned token_tiles, T* y) {
  constexpr unsigned kTokens = groups * kGroupTokens;
  const unsigned pair = blockIdx.x / token_tiles;
  const unsigned first_token = blockIdx.x % token_tiles * kTokens;
  const Lane lane(weight, 2 * pair);
  Tokens tokens;
  tokens.q = prepared.q + std::size_t{first_token} * 4;
  tokens.factors = reinterpret_cast<const int4*>(prepared.factors + first_token);
  tokens.stride = prepared.tokens;
  tokens.count = m - first_token < kTokens ? m - first_token : kTokens;
  Sums<groups> total = {};
  for (unsigned s = 0; s < weight.stream_count; ++s) {
    const DeviceStream& stream = weight.streams[s];
    if (stream.is_pair) {
      AddStream<Block::kPair>(weight, stream, lane, tokens, &total);
    } else if (stream.is_behind_pair) {
      AddStream<Block::kSingleBehindPair>(weight, stream, lane, tokens, &total);
    } else {
      AddStream<Block::kSingle>(weight, stream, lane, tokens, &total);
    }
  }
  StoreSums(weight, lane, total, std::size_t{pair} * kWarpRows, tokens.count,
            y + std::size_t{first_token} * weight.n);
}

// A warp gets four chunks or more. Eight warps leave room for a second block on a multiprocessor,
// whose start the first one hides; with few pairs there is no second block.
template <unsigned groups>
unsigned WarpsOf(const DeviceWeight& weight, std::size_t pairs) {
  const unsigned most = pairs < kManyPairs ? kMaxWarps<groups> : 8;
  const unsigned wanted = (weight.chunks + 3) / 4;
  return wanted < most ? wanted : most;
}

template <unsigned groups, typename T>
cudaError_t LaunchOf(const DeviceWeight& weight, const Prepared& prepared, unsigned m, T* y,
                     cudaStream_t stream) {
  constexpr unsigned kTokens = groups * kGroupTokens;
  const unsigned pairs = (weight.panels + 1) / 2;
  const unsigned token_tiles = (m + kTokens - 1) / kTokens;
  const unsigned warps = WarpsOf<groups>(weight, pairs);
  return Launch(DecodeKernel<T, groups>, dim3(pairs * token_tiles), dim3(warps * kWarp),
                warps * kTokens * kWarpRows * sizeof(float), stream, weight, prepared, m,
                token_tiles, y);
}

template <typename T>
cudaError_t LaunchFor(const DeviceWeight& weight, const Prepared& prepared, unsigned m, T* y,
                      cudaStream_t stream) {
  if (m <= kGroupTokens) return LaunchOf<1>(weight, prepared, m, y, stream);
  if (m <= 2 * kGroupTokens) return LaunchOf<2>(weight, prepared, m, y, stream);
  return LaunchOf<4>(weight, prepared, m, y, stream);
}

}  // namespace

cudaError_t LaunchDecode(const DeviceWeight& weight, const BinaryMatMulArgs& args,
                         const Prepared& prepared, cudaStream_t stream) {
  const unsigned m = static_cast<unsigned>(args.m);
  if (args.type == ElementType::kFloat16) {
    return LaunchFor(weight, prepared, m, static_cast<uint16_t*>(args.y), stream);
  }
  return LaunchFor(weight, prepared, m, static_cast<float*>(args.y), stream);
}

}  // namespace bivlm::cuda
