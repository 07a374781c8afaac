#include "token_prune_inputs.h"

#include <limits>

namespace bivlm::ort {
namespace {

constexpr std::size_t kHidden = 0;
constexpr std::size_t kScores = 1;
constexpr std::size_t kMetric = 4;
constexpr std::size_t kInputs = 5;

// What needs the input scores, or "".
std::string NeedOfScores(const TokenPruneOptions& options) {
  const auto choice = [](const char* name, std::string_view value) {
    return std::string(name) + " '" + std::string(value) + "'";
  };
  if (options.mode == TokenPruneMode::kTopkScore || options.mode == TokenPruneMode::kMmr) {
    return choice("mode", kTokenPruneModes[static_cast<std::size_t>(options.mode)]);
  }
  if (options.mode == TokenPruneMode::kMaxmin && options.first == FirstToken::kMaxScore) {
    return choice("first", "max_score");
  }
  if (options.merge == MergeKind::kScoreWeighted) return choice("merge", "score_weighted");
  return "";
}

void RefuseMissingScores(const TokenPruneOptions& options) {
  const std::string need = NeedOfScores(options);
  if (need.empty()) return;
  throw InvalidArgument(need + " needs the input scores, which is missing");
}

// *choice as the attribute says, unchanged if it is missing.
template <typename Choice, std::size_t count>
void ReadChoice(const Api* api, const KernelInfo* info, const char* attribute,
                const std::string_view (&names)[count], Choice* choice) {
  const std::string_view unset = names[static_cast<std::size_t>(*choice)];
  const std::string given = StringAttribute(api, info, attribute, std::string(unset).c_str());
  if (ParseChoice(names, given, choice)) return;
  std::string known;
  for (const std::string_view name : names) {
    if (!known.empty()) known += name == names[count - 1] ? " or " : ", ";
    known += name;
  }
  throw InvalidArgument(std::string(attribute) + " is '" + given + "', expected " + known);
}

// Whether the value is in 0..1; not so for NaN.
bool IsFraction(float value) { return value >= 0.0F && value <= 1.0F; }

void CheckOptions(const TokenPruneOptions& options) {
  if (options.keep_count < -1) {
    throw InvalidArgument("keep_count is " + std::to_string(options.keep_count) +
                          ", expected 0 or more, or -1 for none");
  }
  if (!IsFraction(options.keep_ratio) && options.keep_ratio != -1.0F) {
    throw InvalidArgument("keep_ratio is " + std::to_string(options.keep_ratio) +
                          ", expected 0 to 1, or -1 for none");
  }
  if (!IsFraction(options.theta)) {
    throw InvalidArgument("theta is " + std::to_string(options.theta) + ", expected 0 to 1");
  }
}

struct Inputs {
  Tensor hidden;
  Tensor scores;
  Tensor segments;
  Tensor keep;
  Tensor metric;
};

void CheckInputs(const Inputs& inputs) {
  const auto require = [](const std::string& problem) {
    if (!problem.empty()) throw InvalidArgument(problem);
  };
  if (inputs.hidden.dims.size() != 3) {
    throw InvalidArgument("hidden is " + Text(inputs.hidden.dims) + ", expected [B, S, D]");
  }
  const Dims tokens = {inputs.hidden.dims[0], inputs.hidden.dims[1]};
  if (tokens[0] * tokens[1] > int64_t{std::numeric_limits<int32_t>::max()}) {
    throw InvalidArgument("hidden is " + Text(inputs.hidden.dims) + ", at most 2^31 - 1 tokens");
  }
  if (inputs.scores && inputs.scores.dims.size() != 3) {
    require(Mismatch("scores", inputs.scores, ElementType::kFloat32, tokens));
  } else if (inputs.scores) {
    const Dims by_head = {tokens[0], inputs.scores.dims[1], tokens[1]};
    require(Mismatch("scores", inputs.scores, ElementType::kFloat32, by_head));
    if (by_head[1] == 0) {
      throw InvalidArgument("scores is " + Text(by_head) + ", expected at least one head");
    }
  }
  if (inputs.segments) {
    require(Mismatch("segments", inputs.segments, ElementType::kInt32, tokens));
    const int32_t* ids = static_cast<const int32_t*>(inputs.segments.data);
    for (int64_t i = 0; i < tokens[0] * tokens[1]; ++i) {
      if (ids[i] < -2) {
        throw InvalidArgument("segments has " + std::to_string(ids[i]) + " at row " +
                              std::to_string(i / tokens[1]) + ", token " +
                              std::to_string(i % tokens[1]) +
                              "; expected an image number from 0 up, -1 (text) or -2 (padding)");
      }
    }
  }
  const Dims& metric = inputs.metric.dims;
  if (inputs.metric && (metric.size() != 3 || metric[0] != tokens[0] || metric[1] != tokens[1])) {
    throw InvalidArgument("metric is " + Text(metric) + ", expected [" + std::to_string(tokens[0]) +
                          ", " + std::to_string(tokens[1]) + ", Dm]");
  }
}

// The numbers of keep, checked against the segments.
TokenPruneQuotas Quotas(const Tensor& keep, const TokenPruneArgs& args) {
  TokenPruneQuotas quotas;
  if (!keep) return quotas;
  int64_t count = 1;
  for (const int64_t size : keep.dims) count *= size;
  const auto rows = static_cast<int64_t>(args.b);
  const bool is_one = count == 1;
  const bool by_row = keep.dims.size() == 1 && keep.dims[0] == rows;
  const bool by_segment = keep.dims.size() == 2 && keep.dims[0] == rows;
  if (keep.type != ElementType::kInt64 || !(is_one || by_row || by_segment)) {
    const std::string batch = std::to_string(rows);
    throw InvalidArgument("keep is " + Text(keep.type) + " " + Text(keep.dims) +
                          ", expected int64: one number, one per row [" + batch +
                          "], or one per row and segment [" + batch + ", segments]");
  }
  quotas.counts = static_cast<const int64_t*>(keep.data);
  if (!is_one) {
    quotas.rows = args.b;
    if (by_segment) quotas.segments = static_cast<std::size_t>(keep.dims[1]);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (quotas.counts[i] < 0) {
      throw InvalidArgument("keep is " + std::to_string(quotas.counts[i]) + ", expected 0 or more");
    }
  }
  if (is_one || !by_segment) return quotas;
  for (std::size_t i = 0; i < args.b * args.s; ++i) {
    const int64_t segment = args.segments == nullptr ? 0 : args.segments[i];
    if (segment < keep.dims[1]) continue;
    throw InvalidArgument("keep is " + Text(keep.dims) + ", but row " + std::to_string(i / args.s) +
                          " has a token of segment " + std::to_string(segment) +
                          "; expected numbers for segments 0 to " + std::to_string(segment));
  }
  return quotas;
}

MetricType MetricTypeOf(ElementType type) {
  if (type == ElementType::kInt8) return MetricType::kInt8;
  return type == ElementType::kFloat32 ? MetricType::kFloat32 : MetricType::kFloat16;
}

Status* InferShape(const CustomOp* op, ShapeInferContext* context) noexcept {
  const Api* api = static_cast<const Operator*>(op)->api;
  return Guard(api, "TokenPrune", [&] {
    const InferredShape hidden = InferenceInput(api, context, kHidden);
    if (!hidden.known || hidden.dims.empty()) return;
    if (hidden.dims.size() != 3) {
      throw InvalidArgument("hidden is " + Text(hidden.dims) + ", expected [B, S, D]");
    }
    InferredShape pruned = hidden;
    pruned.dims[1] = -1;
    pruned.names[1] = UniqueSizeName("kept_tokens");
    SetInferenceOutput(api, context, 0, pruned);
    InferredShape indices = pruned;
    indices.type = ElementType::kInt64;
    indices.dims.pop_back();
    indices.names.pop_back();
    SetInferenceOutput(api, context, 1, indices);
  });
}

ElementType InputType(const CustomOp* op, std::size_t index) {
  const Operator& made = *static_cast<const Operator*>(op);
  const ElementType types[kInputs] = {made.type, ElementType::kFloat32, ElementType::kInt32,
                                      ElementType::kInt64, made.metric_type};
  return types[index];
}

}  // namespace

TokenPruneOptions ReadTokenPruneOptions(const Api* api, const KernelInfo* info) {
  TokenPruneOptions options;
  ReadChoice(api, info, "mode", kTokenPruneModes, &options.mode);
  ReadChoice(api, info, "score_reduce", kScoreReductions, &options.score_reduce);
  ReadChoice(api, info, "first", kFirstTokens, &options.first);
  ReadChoice(api, info, "similarity", kSimilarityKinds, &options.similarity);
  ReadChoice(api, info, "merge", kMergeKinds, &options.merge);
  ReadChoice(api, info, "order", kTokenOrders, &options.order);
  options.keep_count = IntAttribute(api, info, "keep_count", options.keep_count);
  options.keep_ratio = FloatAttribute(api, info, "keep_ratio", options.keep_ratio);
  options.min_keep = IntAttribute(api, info, "min_keep", options.min_keep);
  options.theta = FloatAttribute(api, info, "theta", options.theta);
  options.seed = IntAttribute(api, info, "seed", options.seed);
  CheckOptions(options);
  if (!HasInput(api, info, kScores)) RefuseMissingScores(options);

  return options;
}

TokenPruneArgs ReadTokenPruneArgs(const Api* api, const KernelContext* context,
                                  const TokenPruneOptions& options) {
  Inputs inputs;
  inputs.hidden = Input(api, context, kHidden);
  inputs.scores = Input(api, context, kScores);
  inputs.segments = Input(api, context, kTokenPruneSegments);
  inputs.keep = Input(api, context, kTokenPruneKeep);
  inputs.metric = Input(api, context, kMetric);
  CheckInputs(inputs);

  const Tensor& metric = inputs.metric ? inputs.metric : inputs.hidden;
  TokenPruneArgs args;
  args.options = options;
  args.b = static_cast<std::size_t>(inputs.hidden.dims[0]);
  args.s = static_cast<std::size_t>(inputs.hidden.dims[1]);
  args.type = inputs.hidden.type == ElementType::kFloat32 ? bivlm::ElementType::kFloat32
                                                          : bivlm::ElementType::kFloat16;
  args.hidden = inputs.hidden.data;
  args.width = static_cast<std::size_t>(inputs.hidden.dims[2]);
  args.scores = static_cast<const float*>(inputs.scores.data);
  if (inputs.scores.dims.size() == 3) args.heads = static_cast<std::size_t>(inputs.scores.dims[1]);
  args.segments = static_cast<const int32_t*>(inputs.segments.data);
  args.keep = Quotas(inputs.keep, args);
  args.metric_type = MetricTypeOf(metric.type);
  args.metric = metric.data;
  args.dim = static_cast<std::size_t>(metric.dims[2]);
  return args;
}

Operator TokenPruneSchema(const Api* api, ElementType type, ElementType metric_type) {
  Operator op = NewOperator(api);
  op.type = type;
  op.metric_type = metric_type;
  op.GetName = [](const CustomOp*) { return "TokenPrune"; };
  op.GetInputType = InputType;
  op.GetInputTypeCount = [](const CustomOp*) { return kInputs; };
  op.GetOutputType = [](const CustomOp* self, std::size_t index) {
    return index == 0 ? static_cast<const Operator*>(self)->type : ElementType::kInt64;
  };
  op.GetOutputTypeCount = [](const CustomOp*) { return std::size_t{4}; };
  op.GetInputCharacteristic = [](const CustomOp*, std::size_t index) {
    return index == kHidden ? Characteristic::kRequired : Characteristic::kOptional;
  };
  op.GetOutputCharacteristic = [](const CustomOp*, std::size_t index) {
    return index >= 2 ? Characteristic::kOptional : Characteristic::kRequired;
  };
  op.InferOutputShapeFn = InferShape;
  return op;
}

}  // namespace bivlm::ort
