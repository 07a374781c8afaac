// The modes of TokenPrune: which tokens of each item stay. A greedy mode takes one launch per
// choice: every block finds the choice among the candidates that all blocks of the launch before
// left, compares its tokens with it, and leaves its best candidate for the next one.
#include <cfloat>

#include "cuda/launch.h"
#include "cuda/token_prune_kernels.h"

namespace bivlm::cuda {
namespace {

constexpr int32_t kSpanned = 0;  // tier in mode dpp: the choices before span the token
constexpr int32_t kFree = 1;
constexpr double kSpannedShare = 1e-4;  // of a token's own similarity

enum class FirstKey { kZ, kScore, kNorm, kIsolation, kDeterminant };

// What a greedy mode ranks tokens by: weight * z - (1 - weight) * largest similarity.
struct GreedyKey {
  FirstKey first;
  double weight;  // theta in mode mmr, else 0
};

// First word of Philox4x32-10 with counter (t, segment, 0, 0), as in src/cpu/token_prune.cc.
__device__ uint32_t Philox(uint32_t t, uint32_t segment, uint32_t low, uint32_t high) {
  uint32_t c[4] = {t, segment, 0, 0};
  uint32_t k[2] = {low, high};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53U} * c[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57U} * c[2];
    c[0] = static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ k[0];
    c[2] = static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ k[1];
    c[1] = static_cast<uint32_t>(product1);
    c[3] = static_cast<uint32_t>(product0);
    k[0] += 0x9E3779B9U;
    k[1] += 0xBB67AE85U;
  }
  return c[0];
}

// ---- Modes that sort ----

__global__ void RandomKeys(TokenPruneItems items, TokenPruneView v, uint64_t seed) {
  const TokenPruneItem& item = items.of[blockIdx.y];
  const uint32_t t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= item.n) return;
  v.key[item.at + t] = Philox(t, static_cast<uint32_t>(item.segment), static_cast<uint32_t>(seed),
                              static_cast<uint32_t>(seed >> 32));
}

__global__ void ScoreKeys(TokenPruneItems items, TokenPruneView v) {
  const TokenPruneItem& item = items.of[blockIdx.y];
  const uint32_t t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= item.n) return;
  // As integers floats keep their order; -0 + 0 is +0.
  const uint32_t bits = __float_as_uint(__fadd_rn(v.score[item.at + t], 0.0F));
  v.key[item.at + t] = bits >> 31 != 0 ? ~bits : bits | 0x80000000U;
}

// The place of each token among all keys of its item, falling, is how many come before it.
__global__ void ChooseLargest(TokenPruneItems items, TokenPruneView v) {
  const TokenPruneItem& item = items.of[blockIdx.y];
  const uint32_t t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= item.n || v.all_nan[item.number] != 0) return;
  const uint32_t* keys = v.key + item.at;
  const uint32_t own = keys[t];
  uint32_t before = 0;
  for (uint32_t i = 0; i < item.n; ++i) before += keys[i] > own || (keys[i] == own && i < t);
  if (before < item.k) v.chosen[item.chosen_at + before] = t;
}

// Mode uniform, and every other one where all scores are NaN.
__global__ void ChooseUniform(TokenPruneItems items, TokenPruneView v, bool always) {
  const TokenPruneItem& item = items.of[blockIdx.x];
  if (!always && v.all_nan[item.number] == 0) return;
  for (uint32_t i = threadIdx.x; i < item.k; i += blockDim.x) {
    v.chosen[item.chosen_at + i] =
        static_cast<uint32_t>((2 * uint64_t{i} + 1) * item.n / (2 * uint64_t{item.k}));
  }
}

// ---- Greedy modes ----

// Leaves the best candidate of the block, of which lanes 0 know those of their warps.
__device__ void LeaveCandidate(const TokenPruneView& v, unsigned next, Candidate of_warp) {
  __shared__ Candidate found[kPruneWarps];
  if (Lane() == 0) found[Warp()] = of_warp;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (unsigned warp = 1; warp < kPruneWarps; ++warp) found[0] = Better(found[0], found[warp]);
  v.candidates[next][blockIdx.y * gridDim.x + blockIdx.x] = found[0];
}

// The best candidate that the blocks of the launch before left, in all lanes.
__device__ Candidate FindChoice(const TokenPruneView& v, unsigned now) {
  const Candidate* left = v.candidates[now] + blockIdx.y * gridDim.x;
  Candidate best = NoCandidate();
  for (unsigned i = Lane(); i < gridDim.x; i += kLanes) best = Better(best, left[i]);
  return WarpBest(best);
}

// Calls body(position) for the tokens of the item that this warp looks after.
template <typename Body>
__device__ void ForTokensOfWarp(const TokenPruneItem& item, const Body& body) {
  const uint32_t begin = blockIdx.x * kTokensPerBlock + Warp();
  for (uint32_t i = begin; i < item.n && i < begin + kTokensPerBlock - Warp(); i += kPruneWarps) {
    body(i);
  }
}

// Whether there is nothing to choose; alike in a block.
__device__ bool IsDone(const TokenPruneView& v, const TokenPruneItem& item, uint32_t step) {
  return step >= item.k || v.all_nan[item.number] != 0;
}

__device__ double DeterminantKey(const TokenPruneView& v, uint32_t at) {
  return v.log_weight[at] + log(double{static_cast<float>(v.residual[at])});
}

// The largest similarity of a token to any other of its item, in all lanes.
template <MetricType type>
__device__ float LargestSimilarity(const TokenPruneView& v, const TokenPruneItem& item,
                                   uint32_t i) {
  float largest = -kLargestFloat;
  for (uint32_t j = 0; j < item.n; ++j) {
    if (j == i) continue;
    largest = fmaxf(largest, WarpSimilarity<type>(v, v.index[item.at + i], v.norm[item.at + i],
                                                  v.index[item.at + j], v.norm[item.at + j]));
  }
  return largest;
}

// Leaves the candidates of the first choice.
template <MetricType type>
__global__ void BeginGreedy(TokenPruneItems items, TokenPruneView v, GreedyKey by, double theta) {
  const TokenPruneItem& item = items.of[blockIdx.y];
  if (IsDone(v, item, 0)) return;
  Candidate best = NoCandidate();
  ForTokensOfWarp(item, [&](uint32_t i) {
    const uint32_t at = item.at + i;
    float isolation = 0.0F;
    if (by.first == FirstKey::kIsolation) isolation = LargestSimilarity<type>(v, item, i);
    if (Lane() != 0) return;
    v.nearest[at] = -kLargestFloat;
    v.taken[at] = 0;
    Candidate token = {v.z[at], i, kFree};
    if (by.first == FirstKey::kScore) token.key = double{v.score[at]};
    if (by.first == FirstKey::kNorm) token.key = v.norm[at];
    if (by.first == FirstKey::kIsolation) token.key = -double{isolation};
    if (by.first == FirstKey::kDeterminant) {
      const double own = double{OwnSimilarity(v, v.norm[at])};
      v.residual[at] = own;
      v.log_weight[at] = theta < 1.0 ? theta / (1.0 - theta) * v.z[at] : 2.0 * log(v.z[at] + 1e-6);
      if (own > kSpannedShare * own) {
        token.key = DeterminantKey(v, at);
      } else {
        token = {double{kLargestFloat}, i, kSpanned};
      }
    }
    best = Better(best, token);
  });
  LeaveCandidate(v, 0, best);
}

// The sum of the products of the first `count` factors of two tokens, in all lanes.
__device__ double FactorProduct(const TokenPruneView& v, const TokenPruneItem& item, uint32_t i,
                                uint32_t j, uint32_t count) {
  const double* a = v.factors + item.pairs_at + uint64_t{i} * item.k;
  const double* b = v.factors + item.pairs_at + uint64_t{j} * item.k;
  double sum = 0.0;
  for (uint32_t p = Lane(); p < count; p += kLanes) sum += a[p] * b[p];
  return WarpSum(sum);
}

// Takes choice number `step`, and compares all other tokens with it.
template <MetricType type>
__global__ void GreedyStep(TokenPruneItems items, TokenPruneView v, GreedyKey by, uint32_t step) {
  const TokenPruneItem& item = items.of[blockIdx.y];
  if (IsDone(v, item, step)) return;
  const Candidate choice = FindChoice(v, step % 2);
  if (blockIdx.x == 0 && threadIdx.x == 0) v.chosen[item.chosen_at + step] = choice.position;
  if (step + 1 == item.k) return;
  const uint32_t chosen_at = item.at + choice.position;
  const bool factorizes = by.first == FirstKey::kDeterminant && choice.tier == kFree;
  Candidate best = NoCandidate();
  ForTokensOfWarp(item, [&](uint32_t i) {
    const uint32_t at = item.at + i;
    if (i == choice.position) {
      if (Lane() == 0) v.taken[at] = 1;
      return;
    }
    if (v.taken[at] != 0) return;
    const float similarity =
        WarpSimilarity<type>(v, v.index[chosen_at], v.norm[chosen_at], v.index[at], v.norm[at]);
    double product = 0.0;
    if (factorizes) product = FactorProduct(v, item, i, choice.position, step);
    if (Lane() != 0) return;
    const float nearest = fmaxf(v.nearest[at], similarity);
    v.nearest[at] = nearest;
    Candidate token = {0.0, i, kFree};
    // No FMA of the two products: ties must stay ties, as on the CPU.
    token.key = __dsub_rn(__dmul_rn(by.weight, by.weight > 0.0 ? v.z[at] : 0.0),
                          __dmul_rn(1.0 - by.weight, double{nearest}));
    if (by.first == FirstKey::kDeterminant) {
      const double limit = kSpannedShare * double{OwnSimilarity(v, v.norm[at])};
      token.tier = kSpanned;
      if (factorizes && v.residual[at] > limit) {
        const double factor = (double{similarity} - product) / sqrt(v.residual[chosen_at]);
        v.factors[item.pairs_at + uint64_t{i} * item.k + step] = factor;
        v.residual[at] = __dsub_rn(v.residual[at], __dmul_rn(factor, factor));
        if (v.residual[at] > limit) token = {DeterminantKey(v, at), i, kFree};
      }
    }
    best = Better(best, token);
  });
  LeaveCandidate(v, (step + 1) % 2, best);
}

// ---- Coverage ----

// matrix[i, j] of every item, symmetric.
template <MetricType type>
__global__ void Similarities(TokenPruneItems items, TokenPruneView v) {
  const TokenPruneItem& item = items.of[blockIdx.y];
  if (IsDone(v, item, 0)) return;
  float* matrix = v.matrix + item.pairs_at;
  ForTokensOfWarp(item, [&](uint32_t i) {
    for (uint32_t j = i + 1; j < item.n; ++j) {
      const float similarity = WarpSimilarity<type>(v, v.index[item.at + i], v.norm[item.at + i],
                                                    v.index[item.at + j], v.norm[item.at + j]);
      if (Lane() != 0) continue;
      matrix[uint64_t{i} * item.n + j] = similarity;
      matrix[uint64_t{j} * item.n + i] = similarity;
    }
    if (Lane() == 0) matrix[uint64_t{i} * item.n + i] = OwnSimilarity(v, v.norm[item.at + i]);
  });
}

// Takes choice number `step`, and computes what each other token would add; at step -1 there is no
// choice yet.
__global__ void CoverStep(TokenPruneItems items, TokenPruneView v, int32_t step) {
  const TokenPruneItem& item = items.of[blockIdx.y];
  if (step >= 0 ? IsDone(v, item, static_cast<uint32_t>(step)) : IsDone(v, item, 0)) return;
  const unsigned next = static_cast<unsigned>(step + 1) % 2;
  Candidate choice = NoCandidate();
  if (step >= 0) choice = FindChoice(v, 1 - next);
  if (step >= 0 && blockIdx.x == 0 && threadIdx.x == 0) {
    v.chosen[item.chosen_at + static_cast<uint32_t>(step)] = choice.position;
  }
  if (step + 1 == static_cast<int32_t>(item.k)) return;
  const float* matrix = v.matrix + item.pairs_at;
  const float* row_of_choice = matrix + uint64_t{step < 0 ? 0 : choice.position} * item.n;
  const auto covered = [&](uint32_t j) {
    return step < 0 ? 0.0F : fmaxf(v.covered[1 - next][item.at + j], row_of_choice[j]);
  };
  Candidate best = NoCandidate();
  ForTokensOfWarp(item, [&](uint32_t i) {
    const uint32_t at = item.at + i;
    if (Lane() == 0) {
      v.covered[next][at] = covered(i);
      if (step < 0 || i == choice.position) v.taken[at] = step < 0 ? 0 : 1;
    }
    if (i == choice.position || (step >= 0 && v.taken[at] != 0)) return;
    const float* row = matrix + uint64_t{i} * item.n;
    double sum = 0.0;
    for (uint32_t j = Lane(); j < item.n; j += kLanes) {
      const double more = double{row[j]} - double{covered(j)};
      sum += v.z[item.at + j] * (more > 0.0 ? more : 0.0);
    }
    sum = WarpSum(sum);
    if (Lane() == 0) best = Better(best, {double{static_cast<float>(sum)}, i, kFree});
  });
  LeaveCandidate(v, next, best);
}

// ---- Launches ----

unsigned Blocks(unsigned count, unsigned per_block) { return (count + per_block - 1) / per_block; }

GreedyKey KeyOf(const TokenPruneOptions& options, bool has_scores) {
  if (options.mode == TokenPruneMode::kMmr) return {FirstKey::kZ, double{options.theta}};
  if (options.mode == TokenPruneMode::kDpp) return {FirstKey::kDeterminant, 0.0};
  if (options.first == FirstToken::kFarthest) return {FirstKey::kIsolation, 0.0};
  const bool by_score = options.first == FirstToken::kMaxScore || has_scores;
  if (options.first != FirstToken::kMaxNorm && by_score) return {FirstKey::kScore, 0.0};
  return {FirstKey::kNorm, 0.0};
}

template <MetricType type>
cudaError_t LaunchGreedy(GreedyKey by, double theta, const TokenPruneItems& items, dim3 grid,
                         unsigned largest_k, const TokenPruneView& view, cudaStream_t stream) {
  cudaError_t error =
      Launch(BeginGreedy<type>, grid, dim3(kPruneThreads), 0, stream, items, view, by, theta);
  for (unsigned step = 0; step < largest_k && error == cudaSuccess; ++step) {
    error = Launch(GreedyStep<type>, grid, dim3(kPruneThreads), 0, stream, items, view, by, step);
  }
  return error;
}

template <MetricType type>
cudaError_t LaunchCoverage(const TokenPruneItems& items, dim3 grid, unsigned largest_k,
                           const TokenPruneView& view, cudaStream_t stream) {
  cudaError_t error = Launch(Similarities<type>, grid, dim3(kPruneThreads), 0, stream, items, view);
  for (int32_t step = -1; step < static_cast<int32_t>(largest_k) && error == cudaSuccess; ++step) {
    error = Launch(CoverStep, grid, dim3(kPruneThreads), 0, stream, items, view, step);
  }
  return error;
}

cudaError_t LaunchSorting(const TokenPruneOptions& options, const TokenPruneItems& items, dim3 grid,
                          const TokenPruneView& view, cudaStream_t stream) {
  const dim3 block(kPruneThreads);
  const cudaError_t error = options.mode == TokenPruneMode::kRandom
                                ? Launch(RandomKeys, grid, block, 0, stream, items, view,
                                         static_cast<uint64_t>(options.seed))
                                : Launch(ScoreKeys, grid, block, 0, stream, items, view);
  if (error != cudaSuccess) return error;
  return Launch(ChooseLargest, grid, block, 0, stream, items, view);
}

}  // namespace

cudaError_t LaunchSelection(const TokenPruneOptions& options, MetricType type, bool has_scores,
                            const TokenPruneItems& items, unsigned count, unsigned largest_n,
                            unsigned largest_k, const TokenPruneView& view, cudaStream_t stream) {
  const TokenPruneMode mode = options.mode;
  const dim3 by_warp(Blocks(largest_n, kTokensPerBlock), count);
  cudaError_t error = cudaSuccess;
  if (mode == TokenPruneMode::kTopkScore || mode == TokenPruneMode::kRandom) {
    const dim3 by_thread(Blocks(largest_n, kPruneThreads), count);
    error = LaunchSorting(options, items, by_thread, view, stream);
  } else if (mode == TokenPruneMode::kCoverage) {
    error = ForMetricType(type, [&](auto metric) {
      return LaunchCoverage<metric()>(items, by_warp, largest_k, view, stream);
    });
  } else if (mode != TokenPruneMode::kUniform) {
    error = ForMetricType(type, [&](auto metric) {
      return LaunchGreedy<metric()>(KeyOf(options, has_scores), double{options.theta}, items,
                                    by_warp, largest_k, view, stream);
    });
  }
  if (error != cudaSuccess) return error;
  const bool always = mode == TokenPruneMode::kUniform;
  if (!always && view.uses_scores == 0) return cudaSuccess;
  return Launch(ChooseUniform, dim3(count), dim3(kPruneThreads), 0, stream, items, view, always);
}

}  // namespace bivlm::cuda
