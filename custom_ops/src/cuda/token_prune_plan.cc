// What the host can say about a call of TokenPrune: sizes, and which segments need a choice.
#include <algorithm>
#include <map>

#include "bivlm/cuda/token_prune.h"

namespace bivlm::cuda {
namespace {

constexpr int32_t kText = -1;

int32_t SegmentOf(const TokenPruneArgs& args, std::size_t token) {
  return args.segments == nullptr ? 0 : args.segments[token];
}

// What becomes of the tokens of one segment, or of text or padding.
struct Fate {
  std::size_t n = 0;
  int32_t item = TokenPruneRun::kDropped;
  uint32_t next = 0;  // place of the next token among those of all items
};

// Plans the segments of a row; *length: its tokens that stay.
void AddItems(const TokenPruneArgs& args, std::size_t row, std::map<int32_t, Fate>* fates,
              int64_t* length, TokenPrunePlan* plan) {
  for (auto& [segment, fate] : *fates) {
    std::size_t k = segment == kText ? fate.n : 0;
    if (segment >= 0) k = TokenPruneCount(args.options, args.keep.Of(row, segment), fate.n);
    *length += static_cast<int64_t>(k);
    if (k == fate.n) fate.item = TokenPruneRun::kKept;
    if (k == 0 || k == fate.n) continue;
    fate.item = static_cast<int32_t>(plan->items.size());
    fate.next = static_cast<uint32_t>(plan->tokens);
    plan->items.push_back({static_cast<uint32_t>(plan->items.size()), fate.next,
                           static_cast<uint32_t>(fate.n), static_cast<uint32_t>(k),
                           static_cast<uint32_t>(plan->choices), segment, plan->pairs});
    plan->tokens += fate.n;
    plan->choices += k;
    if (args.options.mode == TokenPruneMode::kDpp) plan->pairs += fate.n * k;
    if (args.options.mode == TokenPruneMode::kCoverage) plan->pairs += fate.n * fate.n;
    plan->largest_n = std::max(plan->largest_n, fate.n);
    plan->largest_k = std::max(plan->largest_k, k);
  }
}

}  // namespace

std::size_t TokenPrunePlan::Longest() const {
  return lengths.empty()
             ? 0
             : static_cast<std::size_t>(*std::max_element(lengths.begin(), lengths.end()));
}

TokenPrunePlan PlanTokenPrune(const TokenPruneArgs& args) {
  TokenPrunePlan plan;
  plan.lengths.assign(args.b, 0);
  for (std::size_t row = 0; row < args.b; ++row) {
    const std::size_t first = row * args.s;
    std::map<int32_t, Fate> fates;
    for (std::size_t t = first; t < first + args.s; ++t) ++fates[SegmentOf(args, t)].n;
    AddItems(args, row, &fates, &plan.lengths[row], &plan);
    std::size_t end = first;
    while (end < first + args.s) {
      const std::size_t begin = end;
      const int32_t segment = SegmentOf(args, begin);
      while (end < first + args.s && SegmentOf(args, end) == segment) ++end;
      Fate& fate = fates[segment];
      const auto count = static_cast<uint32_t>(end - begin);
      plan.runs.push_back({static_cast<uint32_t>(begin), count, fate.item, fate.next});
      fate.next += count;
    }
  }
  return plan;
}

}  // namespace bivlm::cuda
