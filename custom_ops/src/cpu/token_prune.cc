// TokenPrune round the selection: counting, merging, and the order of the output.
#include "bivlm/token_prune.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <optional>

#include "token_prune_select.h"

namespace bivlm {
namespace {

using Positions = std::vector<std::size_t>;

// One segment of one row of the batch.
struct Segment {
  std::size_t row = 0;
  int32_t id = 0;
  std::vector<uint32_t> tokens;  // positions in the row, rising
};

std::map<int32_t, Segment> SegmentsOf(const TokenPruneArgs& args, std::size_t row,
                                      std::vector<int64_t>* text) {
  std::map<int32_t, Segment> segments;
  for (std::size_t t = 0; t < args.s; ++t) {
    const int32_t id = args.segments == nullptr ? 0 : args.segments[row * args.s + t];
    if (id == -1) text->push_back(static_cast<int64_t>(t));
    if (id < 0) continue;
    Segment& segment = segments[id];
    segment.row = row;
    segment.id = id;
    segment.tokens.push_back(static_cast<uint32_t>(t));
  }
  return segments;
}

// The score of a token, over all heads.
float ReducedScore(const TokenPruneArgs& args, std::size_t row, std::size_t token) {
  const float* scores = args.scores + row * args.heads * args.s + token;
  double total = scores[0];
  for (std::size_t h = 1; h < args.heads; ++h) {
    const double score = scores[h * args.s];
    if (args.options.score_reduce != ScoreReduction::kMax) {
      total += score;
    } else if (std::isnan(score) || score > total) {  // false if the total is NaN
      total = score;
    }
  }
  if (args.options.score_reduce == ScoreReduction::kMean) {
    total /= static_cast<double>(args.heads);
  }
  return static_cast<float>(total);
}

std::vector<float> ScoresOf(const TokenPruneArgs& args, const Segment& segment) {
  std::vector<float> scores;
  if (args.scores == nullptr) return scores;
  for (const uint32_t token : segment.tokens) {
    scores.push_back(ReducedScore(args, segment.row, token));
  }
  return scores;
}

bool IsFinite(const TokenPruneArgs& args, std::size_t at) {
  const std::size_t begin = at * args.width;
  for (std::size_t d = begin; d < begin + args.width; ++d) {
    const float value = args.type == ElementType::kFloat32
                            ? static_cast<const float*>(args.hidden)[d]
                            : FloatFromHalf(static_cast<const uint16_t*>(args.hidden)[d]);
    if (!std::isfinite(value)) return false;
  }
  return true;
}

// Sets target and weight of the tokens of a segment that go into others. `kept` are positions
// inside the segment.
void Merge(const TokenPruneArgs& args, const Segment& segment, const Positions& kept,
           std::vector<float> scores, TokenSimilarity* similarity, TokenPruneSelection* selection) {
  const std::vector<double>& norms = similarity->all().norms;
  const std::size_t first = segment.row * args.s;
  std::vector<bool> is_kept(segment.tokens.size(), false);
  for (const std::size_t position : kept) is_kept[position] = true;
  Positions targets;
  Positions merged;
  for (std::size_t i = 0; i < segment.tokens.size(); ++i) {
    if (!(norms[i] > 0.0)) continue;
    if (is_kept[i]) {
      targets.push_back(i);
    } else if (IsFinite(args, first + segment.tokens[i])) {
      merged.push_back(i);
    }
  }
  if (targets.empty() || merged.empty()) return;

  std::vector<double> weight(segment.tokens.size(), 1.0);
  if (args.options.merge == MergeKind::kScoreWeighted) {
    for (float& score : scores) {
      if (std::isnan(score)) score = -std::numeric_limits<float>::infinity();
    }
    weight = NormalizedScores(scores);
  }
  const TokenSet sources = similarity->Subset(merged);
  std::vector<float> best(merged.size(), -std::numeric_limits<float>::infinity());
  std::vector<float> block(std::min(targets.size(), TokenSimilarity::kQueries) * merged.size());
  for (std::size_t begin = 0; begin < targets.size(); begin += TokenSimilarity::kQueries) {
    const std::size_t end = std::min(begin + TokenSimilarity::kQueries, targets.size());
    const auto at = [&](std::size_t i) { return targets.begin() + static_cast<std::ptrdiff_t>(i); };
    const TokenSet queries = similarity->Subset(Positions(at(begin), at(end)));
    similarity->Between(queries, sources, block.data(), sources.size());
    for (std::size_t q = 0; q < queries.size(); ++q) {
      for (std::size_t i = 0; i < merged.size(); ++i) {
        const float value = block[q * sources.size() + i];
        if (!(value > best[i])) continue;
        best[i] = value;
        const std::size_t token = first + segment.tokens[merged[i]];
        selection->target[token] = segment.tokens[queries.positions[q]];
        selection->weight[token] = weight[merged[i]];
      }
    }
  }
}

// The tokens to keep of a segment, in the order of their choice, and what becomes of the others.
std::vector<int64_t> Keep(const TokenPruneKernel& kernel, const TokenPruneArgs& args,
                          const Segment& segment, std::size_t k, const Executor& executor,
                          TokenPruneSelection* selection) {
  const std::size_t n = segment.tokens.size();
  if (k == n) return {segment.tokens.begin(), segment.tokens.end()};
  if (k == 0) return {};
  const std::vector<float> scores = ScoresOf(args, segment);
  std::optional<TokenSimilarity> similarity;
  if (NeedsSimilarity(args.options.mode) || args.options.merge != MergeKind::kNone) {
    similarity.emplace(kernel, args, segment.row, segment.tokens, executor);
  }
  const Positions chosen =
      SelectTokens(args.options, segment.id, n, k, scores, similarity ? &*similarity : nullptr);
  if (args.options.merge != MergeKind::kNone) {
    Merge(args, segment, chosen, scores, &*similarity, selection);
  }
  std::vector<int64_t> tokens;
  for (const std::size_t position : chosen) tokens.push_back(segment.tokens[position]);
  return tokens;
}

// Lets the tokens of each segment share their slots of `row`, which is rising, in the order of
// their choice.
void OrderByChoice(const std::vector<std::vector<int64_t>>& segments, std::vector<int64_t>* row) {
  const std::vector<int64_t> rising = *row;
  for (const std::vector<int64_t>& chosen : segments) {
    std::vector<int64_t> sorted = chosen;
    std::sort(sorted.begin(), sorted.end());
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      const auto slot = std::lower_bound(rising.begin(), rising.end(), sorted[i]);
      (*row)[static_cast<std::size_t>(slot - rising.begin())] = chosen[i];
    }
  }
}

// The mean of the hidden rows of `kept`, with weight 1, and of `others`.
void WriteMean(const TokenPruneArgs& args, std::size_t row, int64_t kept,
               const std::vector<int64_t>& others, const TokenPruneSelection& selection,
               std::byte* slot) {
  const auto place = [&](int64_t token) { return row * args.s + static_cast<std::size_t>(token); };
  double weights = 1.0;
  for (const int64_t token : others) weights += selection.weight[place(token)];
  const auto write = [&](const auto* hidden, auto* out, const auto& widen, const auto& narrow) {
    constexpr std::size_t kBlock = 512;
    double sums[kBlock];
    for (std::size_t begin = 0; begin < args.width; begin += kBlock) {
      const std::size_t count = std::min(kBlock, args.width - begin);
      const auto* own = hidden + place(kept) * args.width + begin;
      for (std::size_t d = 0; d < count; ++d) sums[d] = double{widen(own[d])};
      for (const int64_t token : others) {
        const auto* features = hidden + place(token) * args.width + begin;
        const double weight = selection.weight[place(token)];
        for (std::size_t d = 0; d < count; ++d) sums[d] += weight * double{widen(features[d])};
      }
      for (std::size_t d = 0; d < count; ++d) {
        out[begin + d] = narrow(static_cast<float>(sums[d] / weights));
      }
    }
  };
  const auto same = [](float value) { return value; };
  if (args.type == ElementType::kFloat32) {
    write(static_cast<const float*>(args.hidden), reinterpret_cast<float*>(slot), same, same);
  } else {
    write(static_cast<const uint16_t*>(args.hidden), reinterpret_cast<uint16_t*>(slot),
          FloatFromHalf, HalfFromFloat);
  }
}

}  // namespace

uint32_t Philox4x32(const uint32_t (&counter)[4], const uint32_t (&key)[2]) {
  uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]};
  uint32_t k[2] = {key[0], key[1]};
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53U} * c[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57U} * c[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(product1),
        static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(product0)};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9U;
    k[1] += 0xBB67AE85U;
  }
  return c[0];
}

const int64_t* TokenPruneQuotas::Of(std::size_t row, int32_t segment) const {
  if (counts == nullptr) return nullptr;
  const std::size_t columns = std::max<std::size_t>(segments, 1);
  return counts + (rows == 1 ? 0 : row) * columns +
         (segments == 0 ? 0 : static_cast<std::size_t>(segment));
}

std::size_t TokenPruneSelection::Longest() const {
  std::size_t longest = 0;
  for (const std::vector<int64_t>& row : kept) longest = std::max(longest, row.size());
  return longest;
}

std::size_t TokenPruneCount(const TokenPruneOptions& options, const int64_t* keep, std::size_t n) {
  if (options.mode == TokenPruneMode::kNone) return n;
  const int64_t tokens = static_cast<int64_t>(n);
  if (keep != nullptr) return static_cast<std::size_t>(std::min(tokens, *keep));
  int64_t wanted = tokens;
  if (options.keep_count >= 0) {
    wanted = options.keep_count;
  } else if (options.keep_ratio >= 0.0F) {
    const double share = static_cast<double>(n) * double{options.keep_ratio};
    wanted = static_cast<int64_t>(std::ceil(share - 1e-6));
  }
  return static_cast<std::size_t>(
      std::min(tokens, std::max({options.min_keep, wanted, int64_t{0}})));
}

TokenPruneSelection RunTokenPrune(const TokenPruneKernel& kernel, const TokenPruneArgs& args,
                                  const Executor& executor) {
  TokenPruneSelection selection;
  selection.kept.resize(args.b);
  selection.target.assign(args.b * args.s, -1);
  if (args.options.merge != MergeKind::kNone) selection.weight.assign(args.b * args.s, 0.0);
  for (std::size_t row = 0; row < args.b; ++row) {
    std::vector<int64_t>& kept = selection.kept[row];
    std::vector<std::vector<int64_t>> of_segments;
    for (const auto& [id, segment] : SegmentsOf(args, row, &kept)) {
      const std::size_t k =
          TokenPruneCount(args.options, args.keep.Of(row, id), segment.tokens.size());
      of_segments.push_back(Keep(kernel, args, segment, k, executor, &selection));
      kept.insert(kept.end(), of_segments.back().begin(), of_segments.back().end());
    }
    std::sort(kept.begin(), kept.end());
    for (const int64_t token : kept) {
      selection.target[row * args.s + static_cast<std::size_t>(token)] = token;
    }
    if (args.options.order == TokenOrder::kScore) OrderByChoice(of_segments, &kept);
  }
  return selection;
}

void WritePruned(const TokenPruneArgs& args, const TokenPruneSelection& selection, void* pruned,
                 const Executor& executor) {
  const std::size_t token_bytes = args.width * ElementBytes(args.type);
  const std::size_t longest = selection.Longest();
  if (token_bytes == 0 || longest == 0) return;
  for (std::size_t row = 0; row < args.b; ++row) {
    const std::vector<int64_t>& kept = selection.kept[row];
    std::byte* target = static_cast<std::byte*>(pruned) + row * longest * token_bytes;
    const std::byte* source =
        static_cast<const std::byte*>(args.hidden) + row * args.s * token_bytes;
    for (std::size_t slot = 0; slot < kept.size(); ++slot) {
      std::memcpy(target + slot * token_bytes,
                  source + static_cast<std::size_t>(kept[slot]) * token_bytes, token_bytes);
    }
    std::memset(target + kept.size() * token_bytes, 0, (longest - kept.size()) * token_bytes);
    if (args.options.merge == MergeKind::kNone) continue;

    std::vector<std::vector<int64_t>> parts(args.s);  // of kept tokens: what goes into them
    for (std::size_t t = 0; t < args.s; ++t) {
      const int64_t into = selection.target[row * args.s + t];
      if (into >= 0 && into != static_cast<int64_t>(t)) {
        parts[static_cast<std::size_t>(into)].push_back(static_cast<int64_t>(t));
      }
    }
    executor.For(kept.size(), [&](std::size_t slot) {
      const std::vector<int64_t>& others = parts[static_cast<std::size_t>(kept[slot])];
      if (others.empty()) return;
      WriteMean(args, row, kept[slot], others, selection, target + slot * token_bytes);
    });
  }
}

void WriteTokenMap(const TokenPruneArgs& args, const TokenPruneSelection& selection,
                   int64_t* token_map) {
  std::vector<int64_t> slots(args.s);
  for (std::size_t row = 0; row < args.b; ++row) {
    const std::vector<int64_t>& kept = selection.kept[row];
    for (std::size_t slot = 0; slot < kept.size(); ++slot) {
      slots[static_cast<std::size_t>(kept[slot])] = static_cast<int64_t>(slot);
    }
    for (std::size_t t = row * args.s; t < (row + 1) * args.s; ++t) {
      const int64_t target = selection.target[t];
      token_map[t] = target < 0 ? -1 : slots[static_cast<std::size_t>(target)];
    }
  }
}

}  // namespace bivlm
