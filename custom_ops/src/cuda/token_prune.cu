// TokenPrune on a GPU from plan to outputs: the order of the stages, their memory, and the stages
// before the choice.
#include <algorithm>
#include <cfloat>

#include "cuda/launch.h"
#include "cuda/token_prune_kernels.h"

namespace bivlm::cuda {
namespace {

// Runs as a parameter of a kernel.
struct Runs {
  static constexpr std::size_t kMost = 200;
  TokenPruneRun of[kMost];
};
static_assert(sizeof(Runs) + sizeof(TokenPruneView) + 64 <= 4096);

// Marks what stays for certain, and lists the tokens of the items.
__global__ void ExpandRuns(Runs runs, TokenPruneView v) {
  const TokenPruneRun& run = runs.of[blockIdx.x];
  for (uint32_t i = threadIdx.x; i < run.count; i += blockDim.x) {
    const uint32_t token = run.begin + i;
    v.target[token] =
        run.item == TokenPruneRun::kKept ? static_cast<int32_t>(token % v.s) : int32_t{-1};
    if (run.item >= 0) v.index[run.at + i] = token;
  }
}

// The score of a token over all heads.
__device__ float ReducedScore(const TokenPruneView& v, uint32_t token) {
  const float* scores = v.scores + uint64_t{token / v.s} * v.heads * v.s + token % v.s;
  double total = double{scores[0]};
  for (uint32_t head = 1; head < v.heads; ++head) {
    const double score = double{scores[uint64_t{head} * v.s]};
    if (v.score_reduce != ScoreReduction::kMax) {
      total += score;
    } else if (score != score || score > total) {  // false if the total is NaN
      total = score;
    }
  }
  if (v.score_reduce == ScoreReduction::kMean) total /= static_cast<double>(v.heads);
  return static_cast<float>(total);
}

__device__ float WarpMax(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

// The largest of the block, in all threads.
__device__ float BlockMax(float value) {
  __shared__ float of_warps[kPruneWarps];
  __syncthreads();  // a former call has been read
  const float of_warp = WarpMax(value);
  if (Lane() == 0) of_warps[Warp()] = of_warp;
  __syncthreads();
  float largest = of_warps[0];
  for (unsigned warp = 1; warp < kPruneWarps; ++warp) largest = fmaxf(largest, of_warps[warp]);
  return largest;
}

// Scores with NaN as -inf, z of OPS.md, and whether all scores are NaN, for one item.
__global__ void PrepareScores(TokenPruneItems items, TokenPruneView v) {
  const TokenPruneItem& item = items.of[blockIdx.x];
  float low = INFINITY;
  float high = -INFINITY;
  int numbers = 0;
  for (uint32_t t = threadIdx.x; t < item.n && v.scores != nullptr; t += blockDim.x) {
    float score = ReducedScore(v, v.index[item.at + t]);
    const bool is_nan = score != score;
    numbers |= static_cast<int>(!is_nan);
    if (is_nan) score = -INFINITY;
    v.score[item.at + t] = score;
    if (!IsFinite(score)) continue;
    low = fminf(low, score);
    high = fmaxf(high, score);
  }
  low = -BlockMax(-low);
  high = BlockMax(high);
  numbers = __syncthreads_or(numbers);
  if (threadIdx.x == 0) {
    v.all_nan[item.number] = static_cast<int32_t>(v.uses_scores != 0 && numbers == 0);
  }
  for (uint32_t t = threadIdx.x; t < item.n; t += blockDim.x) {
    double z = 1.0;
    if (v.scores != nullptr) {
      const float score = v.score[item.at + t];
      if (!IsFinite(score)) {
        z = score > 0.0F ? 1.0 : 0.0;
      } else {
        z = low == high ? 0.5 : (double{score} - double{low}) / (double{high} - double{low});
      }
    }
    v.z[item.at + t] = z;
  }
}

template <MetricType type>
__global__ void SquaredNorms(TokenPruneItems items, TokenPruneView v) {
  const TokenPruneItem& item = items.of[blockIdx.y];
  const uint32_t t = blockIdx.x * kPruneWarps + Warp();
  if (t >= item.n) return;
  const uint64_t begin = v.index[item.at + t] * v.dim;
  double sum = 0.0;
  for (uint64_t d = Lane(); d < v.dim; d += kLanes) {
    const double value = double{MetricAt<type>(v.metric, begin + d)};
    sum += value * value;
  }
  sum = WarpSum(sum);
  if (Lane() != 0) return;
  // Rows that have no direction, in float32 terms, are similar to nothing.
  const float length = static_cast<float>(sqrt(sum));
  v.norm[item.at + t] = IsFinite(length) && length != 0.0F ? sum : 0.0;
}

// The chosen tokens stay.
__global__ void KeepChosen(TokenPruneItems items, TokenPruneView v) {
  const TokenPruneItem& item = items.of[blockIdx.x];
  for (uint32_t i = threadIdx.x; i < item.k; i += blockDim.x) {
    const uint32_t token = v.index[item.at + v.chosen[item.chosen_at + i]];
    v.target[token] = static_cast<int32_t>(token % v.s);
  }
}

// Rank by rank, so that choices come in rising order.
__global__ void SortChosen(TokenPruneItems items, TokenPruneView v) {
  const TokenPruneItem& item = items.of[blockIdx.x];
  const uint32_t* chosen = v.chosen + item.chosen_at;
  for (uint32_t i = threadIdx.x; i < item.k; i += blockDim.x) {
    uint32_t before = 0;
    for (uint32_t j = 0; j < item.k; ++j) before += chosen[j] < chosen[i];
    v.rising[item.chosen_at + before] = chosen[i];
  }
}

// Divides scratch memory; with a null base it only measures.
class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<std::byte*>(base)) {}

  template <typename T>
  void Take(std::size_t count, T** pointer) {
    *pointer = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    const std::size_t bytes = count * sizeof(T);
    used_ += (bytes + kTokenPruneAlignment - 1) / kTokenPruneAlignment * kTokenPruneAlignment;
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

std::size_t CandidateCount(const TokenPrunePlan& plan) {
  const std::size_t items = std::min(plan.items.size(), TokenPruneItems::kMost);
  return items * ((plan.largest_n + kTokensPerBlock - 1) / kTokensPerBlock);
}

bool Merges(const TokenPruneArgs& args) { return args.options.merge != MergeKind::kNone; }

bool NeedsNorms(const TokenPruneArgs& args) {
  const TokenPruneMode mode = args.options.mode;
  return Merges(args) || mode == TokenPruneMode::kMaxmin || mode == TokenPruneMode::kMmr ||
         mode == TokenPruneMode::kDpp || mode == TokenPruneMode::kCoverage;
}

// Whether NaN scores make the selection uniform.
bool UsesScores(const TokenPruneArgs& args) {
  const TokenPruneOptions& options = args.options;
  if (args.scores == nullptr || options.mode == TokenPruneMode::kRandom ||
      options.mode == TokenPruneMode::kUniform) {
    return false;
  }
  return options.mode != TokenPruneMode::kMaxmin ||
         (options.first != FirstToken::kMaxNorm && options.first != FirstToken::kFarthest);
}

TokenPruneView ViewOf(const TokenPruneArgs& args, const TokenPrunePlan& plan, Scratch* scratch) {
  TokenPruneView v = {};
  v.hidden = args.hidden;
  v.metric = args.metric;
  v.scores = args.scores;
  v.width = args.width;
  v.dim = args.dim;
  v.s = static_cast<uint32_t>(args.s);
  v.heads = static_cast<uint32_t>(args.heads);
  v.score_reduce = args.options.score_reduce;
  v.is_cosine = args.options.similarity == SimilarityKind::kCosine;
  v.is_half = args.type == ElementType::kFloat16;
  v.weighted_by_score = args.options.merge == MergeKind::kScoreWeighted;
  v.uses_scores = UsesScores(args);
  const std::size_t all = args.b * args.s;
  scratch->Take(all, &v.target);
  scratch->Take(Merges(args) ? all : 0, &v.weight);
  scratch->Take(all, &v.slot);
  scratch->Take(all, &v.place);
  const std::size_t n = plan.tokens;
  scratch->Take(n, &v.index);
  scratch->Take(n, &v.key);
  scratch->Take(n, &v.score);
  scratch->Take(n, &v.z);
  scratch->Take(NeedsNorms(args) ? n : 0, &v.norm);
  scratch->Take(n, &v.nearest);
  scratch->Take(n, &v.taken);
  const bool is_dpp = args.options.mode == TokenPruneMode::kDpp;
  scratch->Take(is_dpp ? n : 0, &v.residual);
  scratch->Take(is_dpp ? n : 0, &v.log_weight);
  const bool is_coverage = args.options.mode == TokenPruneMode::kCoverage;
  for (float*& covered : v.covered) scratch->Take(is_coverage ? n : 0, &covered);
  scratch->Take(is_dpp ? plan.pairs : 0, &v.factors);
  scratch->Take(is_coverage ? plan.pairs : 0, &v.matrix);
  scratch->Take(plan.choices, &v.chosen);
  scratch->Take(plan.choices, &v.rising);
  scratch->Take(plan.items.size(), &v.all_nan);
  for (Candidate*& candidates : v.candidates) scratch->Take(CandidateCount(plan), &candidates);
  return v;
}

cudaError_t LaunchRuns(const TokenPrunePlan& plan, const TokenPruneView& view,
                       cudaStream_t stream) {
  for (std::size_t begin = 0; begin < plan.runs.size(); begin += Runs::kMost) {
    const std::size_t count = std::min(plan.runs.size() - begin, Runs::kMost);
    Runs runs = {};
    std::copy_n(plan.runs.begin() + static_cast<std::ptrdiff_t>(begin), count, runs.of);
    const cudaError_t error = Launch(ExpandRuns, dim3(static_cast<unsigned>(count)),
                                     dim3(kPruneThreads), 0, stream, runs, view);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// All stages of `count` items but the outputs.
cudaError_t LaunchItems(const TokenPruneArgs& args, const TokenPrunePlan& plan,
                        const TokenPruneItems& items, unsigned count, const TokenPruneView& view,
                        cudaStream_t stream) {
  const dim3 by_item(count);
  const dim3 block(kPruneThreads);
  const auto largest_n = static_cast<unsigned>(plan.largest_n);
  cudaError_t error = Launch(PrepareScores, by_item, block, 0, stream, items, view);
  if (error == cudaSuccess && NeedsNorms(args)) {
    const dim3 by_warp((largest_n + kPruneWarps - 1) / kPruneWarps, count);
    error = ForMetricType(args.metric_type, [&](auto type) {
      return Launch(SquaredNorms<type()>, by_warp, block, 0, stream, items, view);
    });
  }
  if (error == cudaSuccess) {
    error = LaunchSelection(args.options, args.metric_type, args.scores != nullptr, items, count,
                            largest_n, static_cast<unsigned>(plan.largest_k), view, stream);
  }
  if (error == cudaSuccess) error = Launch(KeepChosen, by_item, block, 0, stream, items, view);
  const bool by_choice = args.options.order == TokenOrder::kScore;
  if (error == cudaSuccess && (Merges(args) || by_choice)) {
    error = Launch(SortChosen, by_item, block, 0, stream, items, view);
  }
  if (error == cudaSuccess && Merges(args)) {
    error = LaunchMerge(args.metric_type, items, count, largest_n, view, stream);
  }
  return error;
}

// Calls launch(items, count) for as many items at a time as a kernel takes.
template <typename Body>
cudaError_t ForItems(const TokenPrunePlan& plan, const Body& launch) {
  for (std::size_t begin = 0; begin < plan.items.size(); begin += TokenPruneItems::kMost) {
    const std::size_t count = std::min(plan.items.size() - begin, TokenPruneItems::kMost);
    TokenPruneItems items = {};
    std::copy_n(plan.items.begin() + static_cast<std::ptrdiff_t>(begin), count, items.of);
    const cudaError_t error = launch(items, static_cast<unsigned>(count));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

std::size_t TokenPruneScratchBytes(const TokenPruneArgs& args, const TokenPrunePlan& plan) {
  Scratch scratch(nullptr);
  ViewOf(args, plan, &scratch);
  return scratch.used();
}

std::string LaunchTokenPrune(const TokenPruneArgs& args, const TokenPrunePlan& plan, void* scratch,
                             std::size_t scratch_bytes, const TokenPruneOutputs& outputs,
                             cudaStream_t stream) {
  if (args.b == 0) return "";
  Scratch memory(scratch);
  const TokenPruneView view = ViewOf(args, plan, &memory);
  if (memory.used() > scratch_bytes) {
    return "TokenPrune needs " + std::to_string(memory.used()) + " bytes of scratch memory, got " +
           std::to_string(scratch_bytes);
  }
  const std::size_t longest = plan.Longest();
  const bool by_choice = args.options.order == TokenOrder::kScore;
  cudaError_t error = LaunchRuns(plan, view, stream);
  if (error == cudaSuccess) {
    error = ForItems(plan, [&](const TokenPruneItems& items, unsigned count) {
      return LaunchItems(args, plan, items, count, view, stream);
    });
  }
  if (error == cudaSuccess) error = LaunchSlots(view, args.b, longest, outputs, stream);
  if (error == cudaSuccess && by_choice) {
    error = ForItems(plan, [&](const TokenPruneItems& items, unsigned count) {
      return LaunchOrderByChoice(items, count, view, longest, outputs, stream);
    });
  }
  if (error == cudaSuccess) {
    error = LaunchOutputs(view, args.b, longest, Merges(args), outputs, stream);
  }
  if (error == cudaSuccess) return "";
  return std::string("TokenPrune on ") + std::to_string(args.b) + " x " + std::to_string(args.s) +
         " tokens could not be launched: " + cudaGetErrorString(error);
}

}  // namespace bivlm::cuda
