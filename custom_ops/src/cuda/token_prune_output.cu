// The outputs of TokenPrune: what dropped tokens go into, where kept ones stand, and their rows.
#include "cuda/launch.h"
#include "cuda/token_prune_kernels.h"

namespace bivlm::cuda {
namespace {

// Whether all of a row of hidden is finite, in all lanes.
__device__ bool IsFiniteRow(const TokenPruneView& v, uint32_t token) {
  const uint64_t begin = token * v.width;
  int is_finite = 1;
  for (uint64_t d = Lane(); d < v.width; d += kLanes) {
    const float value = v.is_half != 0 ? ToFloat(static_cast<const uint16_t*>(v.hidden)[begin + d])
                                       : static_cast<const float*>(v.hidden)[begin + d];
    if (!IsFinite(value)) is_finite = 0;
  }
  return __all_sync(kAllLanes, is_finite) != 0;
}

// The kept token of its item that a dropped one is most similar to; the first of equal ones.
template <MetricType type>
__global__ void MergeDropped(TokenPruneItems items, TokenPruneView v) {
  const TokenPruneItem& item = items.of[blockIdx.y];
  const uint32_t t = blockIdx.x * kPruneWarps + Warp();
  if (t >= item.n) return;
  const uint32_t at = item.at + t;
  const uint32_t token = v.index[at];
  const bool is_kept = v.target[token] >= 0;
  __syncwarp();  // all lanes have read it
  if (is_kept || !(v.norm[at] > 0.0) || !IsFiniteRow(v, token)) return;
  float best = -INFINITY;
  int32_t target = -1;
  for (uint32_t i = 0; i < item.k; ++i) {
    const uint32_t kept_at = item.at + v.rising[item.chosen_at + i];
    if (!(v.norm[kept_at] > 0.0)) continue;
    const float similarity =
        WarpSimilarity<type>(v, v.index[kept_at], v.norm[kept_at], token, v.norm[at]);
    if (!(similarity > best)) continue;
    best = similarity;
    target = static_cast<int32_t>(v.index[kept_at] % v.s);
  }
  if (Lane() != 0) return;
  v.target[token] = target;
  v.weight[token] = v.weighted_by_score != 0 ? v.z[at] : 1.0;
}

// Of one row, in the order of the input: slots of its kept tokens, kept_indices and lengths.
__global__ void AssignSlots(TokenPruneView v, uint32_t longest, TokenPruneOutputs outputs) {
  __shared__ uint32_t of_warps[kPruneWarps];
  const uint32_t row = blockIdx.x;
  const uint64_t first = uint64_t{row} * v.s;
  int64_t* kept_indices = outputs.kept_indices + uint64_t{row} * longest;
  uint32_t used = 0;
  for (uint32_t begin = 0; begin < v.s; begin += kPruneThreads) {
    const uint32_t t = begin + threadIdx.x;
    const bool is_kept = t < v.s && v.target[first + t] == static_cast<int32_t>(t);
    const unsigned votes = __ballot_sync(kAllLanes, is_kept);
    if (Lane() == 0) of_warps[Warp()] = static_cast<uint32_t>(__popc(votes));
    __syncthreads();
    uint32_t slot = used + static_cast<uint32_t>(__popc(votes & ((1U << Lane()) - 1)));
    for (unsigned warp = 0; warp < kPruneWarps; ++warp) {
      if (warp < Warp()) slot += of_warps[warp];
      used += of_warps[warp];
    }
    __syncthreads();  // of_warps has been read
    if (!is_kept) continue;
    v.slot[first + t] = static_cast<int32_t>(slot);
    v.place[first + t] = static_cast<int32_t>(slot);
    kept_indices[slot] = int64_t{t};
  }
  for (uint32_t slot = used + threadIdx.x; slot < longest; slot += blockDim.x) {
    kept_indices[slot] = 0;
  }
  if (threadIdx.x == 0 && outputs.lengths != nullptr) outputs.lengths[row] = int64_t{used};
}

// Lets the tokens of an item share their slots in the order of their choice.
__global__ void OrderByChoice(TokenPruneItems items, TokenPruneView v, uint32_t longest,
                              TokenPruneOutputs outputs) {
  const TokenPruneItem& item = items.of[blockIdx.x];
  for (uint32_t i = threadIdx.x; i < item.k; i += blockDim.x) {
    const uint32_t owner = v.index[item.at + v.rising[item.chosen_at + i]];
    const uint32_t token = v.index[item.at + v.chosen[item.chosen_at + i]];
    const int32_t slot = v.slot[owner];
    v.place[token] = slot;
    outputs.kept_indices[uint64_t{token / v.s} * longest + static_cast<uint32_t>(slot)] =
        int64_t{token % v.s};
  }
}

__global__ void WriteTokenMap(TokenPruneView v, uint64_t count, int64_t* token_map) {
  const uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int32_t target = v.target[i];
  token_map[i] = target < 0 ? int64_t{-1} : int64_t{v.place[i / v.s * v.s + uint32_t(target)]};
}

// Copies `count` words of the block's row, or zeroes where `from` is null.
template <typename Word>
__device__ void CopyWords(void* to, const void* from, uint64_t count) {
  for (uint64_t i = threadIdx.x; i < count; i += blockDim.x) {
    static_cast<Word*>(to)[i] = from == nullptr ? Word{} : static_cast<const Word*>(from)[i];
  }
}

__device__ void CopyRow(void* to, const void* from, uint64_t bytes) {
  const uint64_t bits = reinterpret_cast<uint64_t>(to) | reinterpret_cast<uint64_t>(from) | bytes;
  if (bits % sizeof(uint4) == 0) {
    CopyWords<uint4>(to, from, bytes / sizeof(uint4));
  } else if (bits % sizeof(uint32_t) == 0) {
    CopyWords<uint32_t>(to, from, bytes / sizeof(uint32_t));
  } else {
    CopyWords<uint16_t>(to, from, bytes / sizeof(uint16_t));
  }
}

// The mean of a kept row, with weight 1, and of the rows that go into it, in input order.
template <typename Element>
__device__ void WriteMean(const TokenPruneView& v, uint64_t first, uint32_t kept, Element* out) {
  const Element* hidden = static_cast<const Element*>(v.hidden);
  for (uint64_t d = threadIdx.x; d < v.width; d += blockDim.x) {
    double sum = double{ToFloat(hidden[(first + kept) * v.width + d])};
    double weights = 1.0;
    for (uint32_t t = 0; t < v.s; ++t) {
      if (t == kept || v.target[first + t] != static_cast<int32_t>(kept)) continue;
      const double weight = v.weight[first + t];
      const double value = double{ToFloat(hidden[(first + t) * v.width + d])};
      sum = __dadd_rn(sum, __dmul_rn(weight, value));
      weights += weight;
    }
    StoreAs(out + d, static_cast<float>(sum / weights));
  }
}

// One slot of one row of `pruned` per block.
__global__ void GatherRows(TokenPruneView v, uint32_t longest, bool merges, void* pruned,
                           const int64_t* kept_indices) {
  const uint32_t row = blockIdx.x / longest;
  const uint64_t first = uint64_t{row} * v.s;
  const uint64_t bytes = v.width * (v.is_half != 0 ? sizeof(uint16_t) : sizeof(float));
  char* out = static_cast<char*>(pruned) + blockIdx.x * bytes;
  const uint32_t kept = static_cast<uint32_t>(kept_indices[blockIdx.x]);
  // Padding has index 0, too, but not that token's place.
  const uint32_t slot = blockIdx.x % longest;
  const bool is_used = v.s > 0 && v.target[first + kept] == static_cast<int32_t>(kept) &&
                       v.place[first + kept] == static_cast<int32_t>(slot);
  int others = 0;
  for (uint32_t t = threadIdx.x; merges && is_used && t < v.s; t += blockDim.x) {
    others |= static_cast<int>(t != kept && v.target[first + t] == static_cast<int32_t>(kept));
  }
  if (__syncthreads_or(others) == 0) {
    const char* from = static_cast<const char*>(v.hidden) + (first + kept) * bytes;
    CopyRow(out, is_used ? from : nullptr, bytes);
  } else if (v.is_half != 0) {
    WriteMean(v, first, kept, reinterpret_cast<uint16_t*>(out));
  } else {
    WriteMean(v, first, kept, reinterpret_cast<float*>(out));
  }
}

}  // namespace

cudaError_t LaunchMerge(MetricType type, const TokenPruneItems& items, unsigned count,
                        unsigned largest_n, const TokenPruneView& view, cudaStream_t stream) {
  const dim3 grid((largest_n + kPruneWarps - 1) / kPruneWarps, count);
  return ForMetricType(type, [&](auto metric) {
    return Launch(MergeDropped<metric()>, grid, dim3(kPruneThreads), 0, stream, items, view);
  });
}

cudaError_t LaunchSlots(const TokenPruneView& view, std::size_t b, std::size_t longest,
                        const TokenPruneOutputs& outputs, cudaStream_t stream) {
  return Launch(AssignSlots, dim3(static_cast<unsigned>(b)), dim3(kPruneThreads), 0, stream, view,
                static_cast<uint32_t>(longest), outputs);
}

cudaError_t LaunchOrderByChoice(const TokenPruneItems& items, unsigned count,
                                const TokenPruneView& view, std::size_t longest,
                                const TokenPruneOutputs& outputs, cudaStream_t stream) {
  return Launch(OrderByChoice, dim3(count), dim3(kPruneThreads), 0, stream, items, view,
                static_cast<uint32_t>(longest), outputs);
}

cudaError_t LaunchOutputs(const TokenPruneView& view, std::size_t b, std::size_t longest,
                          bool merges, const TokenPruneOutputs& outputs, cudaStream_t stream) {
  const dim3 block(kPruneThreads);
  const uint64_t tokens = uint64_t{b} * view.s;
  cudaError_t error = cudaSuccess;
  if (outputs.token_map != nullptr && tokens > 0) {
    const dim3 grid(static_cast<unsigned>((tokens + kPruneThreads - 1) / kPruneThreads));
    error = Launch(WriteTokenMap, grid, block, 0, stream, view, tokens, outputs.token_map);
  }
  if (error != cudaSuccess || longest == 0 || view.width == 0) return error;
  return Launch(GatherRows, dim3(static_cast<unsigned>(b * longest)), block, 0, stream, view,
                static_cast<uint32_t>(longest), merges, outputs.pruned, outputs.kept_indices);
}

}  // namespace bivlm::cuda
