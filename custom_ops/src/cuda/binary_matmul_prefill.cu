// The product with many tokens: four warps with two panels each multiply the same 64 tokens, whose
// chunks they copy to shared memory a few ahead.
#include "cuda/binary_matmul_warp.h"
#include "cuda/launch.h"

namespace bivlm::cuda {
namespace {

constexpr unsigned kWarps = 4;
constexpr unsigned kThreads = kWarps * kWarp;
constexpr unsigned kGroups = 8;
constexpr unsigned kTokens = kGroups * kGroupTokens;
constexpr unsigned kStages = 3;

// A chunk of the block's tokens.
struct Stage {
  uint4 units[kTokens][4];
  ChunkFactors factors[kTokens];
};

// Also in shared memory, and only where a weight has several streams: what the streams before the
// present one add to the sums of a thread.
struct Totals {
  float at[kGroups * 8][kThreads];
};

struct Tile {
  const uint4* q;  // of the first token and chunk
  const ChunkFactors* factors;
  unsigned stride;  // tokens of a chunk
  unsigned count;   // tokens that exist, a multiple of kGroupTokens
};

__device__ __forceinline__ void CopyStage(const Tile& tile, unsigned chunk, Stage* stage) {
  const std::size_t first = std::size_t{chunk} * tile.stride;
#pragma unroll
  for (unsigned i = 0; i < kTokens * 4; i += kThreads) {
    const unsigned at = i + threadIdx.x;
    if (at / 4 < tile.count) CopyAsync16(&stage->units[0][0] + at, tile.q + first * 4 + at);
  }
  static_assert(kTokens / 2 <= kThreads);
  const unsigned pair = 2 * threadIdx.x;
  if (pair < tile.count) CopyAsync16(stage->factors + pair, tile.factors + first + pair);
}

struct Sums {
  float at[kGroups][2][4];
};

template <Block block>
__device__ __forceinline__ void MultiplyStage(const Stage& stage, unsigned groups, const Lane& lane,
                                              const WeightFragments& fragments, Sums* sums) {
#pragma unroll
  for (unsigned group = 0; group < kGroups; ++group) {
    if (group >= groups) break;
    const uint4 units = stage.units[kGroupTokens * group + lane.g][lane.q];
    const int4 factors =
        *reinterpret_cast<const int4*>(stage.factors + kGroupTokens * group + 2 * lane.q);
    AddProducts<block>(fragments, units, factors, sums->at[group]);
  }
}

// sums = the products of one stream, times the factors of the rows.
template <Block block>
__device__ void MultiplyStream(const DeviceWeight& weight, const DeviceStream& stream,
                               const Lane& lane, const Tile& tile, Stage* stages, Sums* sums) {
  const unsigned count = stream.chunk_end - stream.chunk_begin;
  const unsigned groups = tile.count / kGroupTokens;
  const uint8_t* codes = lane.Codes(weight, stream);
#pragma unroll
  for (unsigned i = 0; i + 1 < kStages; ++i) {
    if (i < count) CopyStage(tile, stream.chunk_begin + i, stages + i);
    CommitCopies();
  }
  uint4 next = LoadCodes(codes);
  const LaneCoefficients rows = MakeCoefficients<block>(weight, stream, lane);
  *sums = Sums();
  for (unsigned i = 0; i < count; ++i) {
    const WeightFragments fragments = Unpack<block>(next, rows, lane.q);
    codes += stream.code_stride;
    if (i + 1 < count) next = LoadCodes(codes);
    WaitForCopies<kStages - 2>();
    __syncthreads();  // the copies of all threads have come, and nobody reads the stage before
    const unsigned ahead = i + kStages - 1;
    if (ahead < count) CopyStage(tile, stream.chunk_begin + ahead, stages + ahead % kStages);
    CommitCopies();
    MultiplyStage<block>(stages[i % kStages], groups, lane, fragments, sums);
  }
  __syncthreads();  // before the next stream copies
#pragma unroll
  for (unsigned group = 0; group < kGroups; ++group) {
    float (&own)[2][4] = sums->at[group];
    float scaled[2][4] = {};
    AddScaled(own, rows, scaled);
#pragma unroll
    for (int r = 0; r < 8; ++r) own[r / 4][r % 4] = scaled[r / 4][r % 4];
  }
}

template <typename T>
__device__ __forceinline__ void Store(const DeviceWeight& weight, const Lane& lane,
                                      const Sums& sums, std::size_t first_row, unsigned tokens,
                                      T* y) {
#pragma unroll
  for (unsigned at = 0; at < kGroups * 8; ++at) {
    const unsigned r = at % 4;
    const unsigned tile = at / 4 % 2;
    const unsigned token = at / 8 * kGroupTokens + 2 * lane.q + r % 2;
    const std::size_t row = first_row + 4 * lane.g + 2 * tile + r / 2;
    if (token < tokens && row < weight.n) {
      StoreAs(y + token * weight.n + row, sums.at[at / 8][tile][r]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    PrefillKernel(DeviceWeight weight, Prepared prepared, unsigned m, unsigned token_tiles, T* y) {
  Stage* stages = DynamicShared<Stage>();
  Totals* totals = reinterpret_cast<Totals*>(stages + kStages);
  const unsigned first_token = blockIdx.x % token_tiles * kTokens;
  const unsigned pair = blockIdx.x / token_tiles * kWarps + threadIdx.x / kWarp;
  const Lane lane(weight, 2 * pair);
  Tile tile;
  tile.q = prepared.q + std::size_t{first_token} * 4;
  tile.factors = prepared.factors + first_token;
  tile.stride = prepared.tokens;
  const unsigned left = prepared.tokens - first_token;
  tile.count = left < kTokens ? left : kTokens;

  Sums sums;
  for (unsigned s = 0; s < weight.stream_count; ++s) {
    const DeviceStream& stream = weight.streams[s];
    if (stream.is_pair) {
      MultiplyStream<Block::kPair>(weight, stream, lane, tile, stages, &sums);
    } else if (stream.is_behind_pair) {
      MultiplyStream<Block::kSingleBehindPair>(weight, stream, lane, tile, stages, &sums);
    } else {
      MultiplyStream<Block::kSingle>(weight, stream, lane, tile, stages, &sums);
    }
    if (weight.stream_count == 1) break;
#pragma unroll
    for (unsigned at = 0; at < kGroups * 8; ++at) {
      float& sum = sums.at[at / 8][at / 4 % 2][at % 4];
      float& total = totals->at[at][threadIdx.x];
      if (s > 0) sum += total;
      total = sum;
    }
  }
  Store(weight, lane, sums, std::size_t{pair} * kWarpRows, m - first_token,
        y + std::size_t{first_token} * weight.n);
}

template <typename T>
cudaError_t LaunchOf(const DeviceWeight& weight, const Prepared& prepared, unsigned m, T* y,
                     cudaStream_t stream) {
  constexpr std::size_t kStageBytes = kStages * sizeof(Stage);
  constexpr std::size_t kMostBytes = kStageBytes + sizeof(Totals);
  static_assert(kMostBytes <= 48 << 10);
  const unsigned row_tiles = (weight.panels + 2 * kWarps - 1) / (2 * kWarps);
  const unsigned token_tiles = (m + kTokens - 1) / kTokens;
  return Launch(PrefillKernel<T>, dim3(row_tiles * token_tiles), dim3(kThreads),
                weight.stream_count > 1 ? kMostBytes : kStageBytes, stream, weight, prepared, m,
                token_tiles, y);
}

}  // namespace

cudaError_t LaunchPrefill(const DeviceWeight& weight, const BinaryMatMulArgs& args,
                          const Prepared& prepared, cudaStream_t stream) {
  const unsigned m = static_cast<unsigned>(args.m);
  if (args.type == ElementType::kFloat16) {
    return LaunchOf(weight, prepared, m, static_cast<uint16_t*>(args.y), stream);
  }
  return LaunchOf(weight, prepared, m, static_cast<float*>(args.y), stream);
}

}  // namespace bivlm::cuda
