#include "token_similarity.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace bivlm {
namespace {

// Features that a task reads at least: 4 to 9 us with AVX2 or AVX-512 on Zen 5. With several
// queries, features that a task reads at most: they stay in the second cache.
constexpr std::size_t kTaskFeatures = 131072;

}  // namespace

TokenSimilarity::TokenSimilarity(const TokenPruneKernel& kernel, const TokenPruneArgs& args,
                                 std::size_t row, const std::vector<uint32_t>& tokens,
                                 const Executor& executor)
    : kernel_(kernel), args_(args), executor_(executor) {
  all_.positions.resize(tokens.size());
  std::iota(all_.positions.begin(), all_.positions.end(), std::size_t{0});
  all_.rows = tokens;
  for (uint32_t& token : all_.rows) token += static_cast<uint32_t>(row * args.s);
  all_.norms.resize(tokens.size());
  ForRows(all_, 1, [this](const TokenPruneRows& rows, std::size_t begin) {
    functions().squared_norms(rows, all_.norms.data() + begin);
  });
  // Rows that have no direction, in float32 terms, count as norm 0: similar to nothing.
  for (double& norm : all_.norms) {
    const float length = static_cast<float>(std::sqrt(norm));
    if (!std::isfinite(length) || length == 0.0F) norm = 0.0;
  }
}

TokenSet TokenSimilarity::Subset(const std::vector<std::size_t>& positions) const {
  TokenSet subset;
  for (const std::size_t position : positions) Add(position, &subset);
  return subset;
}

void TokenSimilarity::Add(std::size_t position, TokenSet* set) const {
  set->positions.push_back(position);
  set->rows.push_back(all_.rows[position]);
  set->norms.push_back(all_.norms[position]);
}

float TokenSimilarity::Own(std::size_t position) const {
  const double norm = all_.norms[position];
  if (norm == 0.0 || args_.options.similarity == SimilarityKind::kDot) {
    return static_cast<float>(std::min(norm, double{std::numeric_limits<float>::max()}));
  }
  return 1.0F;
}

void TokenSimilarity::From(std::size_t of, const TokenSet& to, float* out) {
  const double norm = all_.norms[of];
  queries_.resize(std::max(queries_.size(), args_.dim));
  const double scale = norm > 0.0 ? LoadQuery(all_.rows[of], norm, queries_.data()) : 0.0;
  ForRows(to, 1, [&](const TokenPruneRows& rows, std::size_t begin) {
    float* part = out + begin;
    if (norm > 0.0) functions().dots(rows, queries_.data(), 1, part, 0);
    for (std::size_t i = 0; i < rows.count; ++i) {
      part[i] = Similarity(part[i], scale, norm, to.norms[begin + i]);
    }
  });
}

void TokenSimilarity::Between(const TokenSet& queries, const TokenSet& to, float* out,
                              std::size_t stride) {
  const std::size_t count = queries.size();
  queries_.resize(std::max(queries_.size(), count * args_.dim));
  scales_.resize(count);
  executor_.For(count, [&](std::size_t q) {
    float* query = queries_.data() + q * args_.dim;
    if (queries.norms[q] > 0.0) {
      scales_[q] = LoadQuery(queries.rows[q], queries.norms[q], query);
    } else {
      std::fill(query, query + args_.dim, 0.0F);
    }
  });
  ForRows(to, count, [&](const TokenPruneRows& rows, std::size_t begin) {
    functions().dots(rows, queries_.data(), count, out + begin, stride);
    for (std::size_t q = 0; q < count; ++q) {
      float* part = out + q * stride + begin;
      for (std::size_t i = 0; i < rows.count; ++i) {
        part[i] = Similarity(part[i], scales_[q], queries.norms[q], to.norms[begin + i]);
      }
    }
  });
}

double TokenSimilarity::LoadQuery(uint32_t row, double norm, float* query) const {
  const int exponent = std::ilogb(norm) / 2 + 1;
  const double factor = std::ldexp(1.0, -exponent);
  const std::size_t begin = row * args_.dim;
  const auto load = [&](const auto* features, const auto& widen) {
    for (std::size_t d = 0; d < args_.dim; ++d) {
      query[d] = static_cast<float>(double{widen(features[begin + d])} * factor);
    }
  };
  switch (args_.metric_type) {
    case MetricType::kFloat32:
      load(static_cast<const float*>(args_.metric), [](float value) { return value; });
      break;
    case MetricType::kFloat16:
      load(static_cast<const uint16_t*>(args_.metric), FloatFromHalf);
      break;
    case MetricType::kInt8:
      load(static_cast<const int8_t*>(args_.metric),
           [](int8_t value) { return static_cast<float>(value); });
      break;
  }
  return std::ldexp(1.0, exponent);
}

float TokenSimilarity::Similarity(float dot, double scale, double norm, double other_norm) const {
  if (!(norm > 0.0) || !(other_norm > 0.0)) return 0.0F;
  const double product = double{dot} * scale;
  if (args_.options.similarity == SimilarityKind::kCosine) {
    return static_cast<float>(product / std::sqrt(other_norm * norm));
  }
  constexpr double kLargest = std::numeric_limits<float>::max();
  return static_cast<float>(std::clamp(product, -kLargest, kLargest));
}

template <typename Body>
void TokenSimilarity::ForRows(const TokenSet& tokens, std::size_t queries, const Body& body) const {
  const std::size_t count = tokens.size();
  std::size_t parts = count * args_.dim / kTaskFeatures;
  if (queries > 1) parts = (count * args_.dim + kTaskFeatures - 1) / kTaskFeatures;
  parts = std::clamp<std::size_t>(parts, 1, std::max<std::size_t>(count, 1));
  executor_.For(parts, [&](std::size_t part) {
    const std::size_t begin = count * part / parts;
    TokenPruneRows rows;
    rows.type = args_.metric_type;
    rows.features = args_.metric;
    rows.dim = args_.dim;
    rows.index = tokens.rows.data() + begin;
    rows.count = count * (part + 1) / parts - begin;
    body(rows, begin);
  });
}

}  // namespace bivlm
