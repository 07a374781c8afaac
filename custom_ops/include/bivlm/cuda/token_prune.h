// TokenPrune on a GPU: all modes of export/OPS.md, with the choices of the CPU kernels.
//
// How many tokens stay of each row follows from `segments` and `keep`, which are on the host; which
// ones, the GPU decides. The launch only enqueues kernels on a stream: it waits for nothing,
// allocates nothing, keeps no state, copies nothing between host and GPU (what the plan says
// travels in the parameters of the kernels), and can be captured in a CUDA graph. Any number of
// threads and streams may call it, each with scratch memory of its own.
#ifndef BIVLM_CUDA_TOKEN_PRUNE_H_
#define BIVLM_CUDA_TOKEN_PRUNE_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "bivlm/token_prune.h"

namespace bivlm::cuda {

// What `scratch` must start at (cudaMalloc gives 256 bytes). Tensors need the alignment of their
// elements.
inline constexpr std::size_t kTokenPruneAlignment = 16;

// A segment of which some tokens, not all, stay.
struct TokenPruneItem {
  uint32_t number;     // among all items
  uint32_t at;         // of its first token among the tokens of all items
  uint32_t n;          // tokens
  uint32_t k;          // of them stay
  uint32_t chosen_at;  // of its first choice among the choices of all items
  int32_t segment;     // its id
  uint64_t pairs_at;   // of its first number among the (n, k) or (n, n) numbers of all items
};

// Tokens that lie side by side and share their fate.
struct TokenPruneRun {
  static constexpr int32_t kKept = -1;
  static constexpr int32_t kDropped = -2;

  uint32_t begin;  // row of the batch * s + token
  uint32_t count;
  int32_t item;  // number of an item, or kKept, kDropped
  uint32_t at;   // of the first one among the tokens of all items
};

struct TokenPrunePlan {
  std::vector<TokenPruneRun> runs;
  std::vector<TokenPruneItem> items;
  std::vector<int64_t> lengths;  // (b): tokens that stay
  std::size_t tokens = 0;        // of all items
  std::size_t choices = 0;       // of all items
  std::size_t pairs = 0;         // numbers (n, k) of all items in mode dpp, (n, n) in coverage
  std::size_t largest_n = 0;
  std::size_t largest_k = 0;

  // The largest of `lengths`.
  std::size_t Longest() const;
};

// Reads args.segments and args.keep; other tensors are not looked at.
TokenPrunePlan PlanTokenPrune(const TokenPruneArgs& args);

std::size_t TokenPruneScratchBytes(const TokenPruneArgs& args, const TokenPrunePlan& plan);

// Device memory; token_map and lengths may be null.
struct TokenPruneOutputs {
  void* pruned = nullptr;           // (b, Longest(), width)
  int64_t* kept_indices = nullptr;  // (b, Longest())
  int64_t* lengths = nullptr;       // (b)
  int64_t* token_map = nullptr;     // (b, s)
};

// Writes the outputs on `stream`. Of `args`, hidden, scores and metric are device memory and must
// stay until the kernels have run; all else may be gone when this returns. `plan` is that of these
// arguments. Returns "" or what is wrong.
std::string LaunchTokenPrune(const TokenPruneArgs& args, const TokenPrunePlan& plan, void* scratch,
                             std::size_t scratch_bytes, const TokenPruneOutputs& outputs,
                             cudaStream_t stream);

}  // namespace bivlm::cuda

#endif  // BIVLM_CUDA_TOKEN_PRUNE_H_
