// TokenPrune as an ONNX Runtime operator: attributes, checks, shapes and the copy of kept rows.
#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#include "adaptor.h"
#include "bivlm/token_prune.h"
#include "operators.h"

namespace bivlm::ort {
namespace {

constexpr std::size_t kHidden = 0;
constexpr std::size_t kScores = 1;
constexpr std::size_t kSegments = 2;
constexpr std::size_t kKeep = 3;
constexpr std::size_t kMetric = 4;
constexpr std::size_t kInputs = 5;

struct Kernel {
  const Api* api = nullptr;
  std::string label;
  std::string mode_name;
  const TokenPruneKernel* kernel = nullptr;
  TokenPruneOptions options;
};

bool NeedsScores(TokenPruneMode mode) {
  return mode == TokenPruneMode::kTopkScore || mode == TokenPruneMode::kMmr;
}

std::string MissingScores(const std::string& mode) {
  return "mode '" + mode + "' needs the input scores, which is missing";
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

Status* CreateKernel(const CustomOp*, const Api* api, const KernelInfo* info, void** out) noexcept {
  std::string label = "TokenPrune";
  return Guard(api, label, [&] {
    auto kernel = std::make_unique<Kernel>();
    kernel->api = api;
    kernel->label = NodeLabel(api, info, "TokenPrune");
    label = kernel->label;

    TokenPruneOptions& options = kernel->options;
    kernel->mode_name = StringAttribute(api, info, "mode", "mmr");
    if (!ParseTokenPruneMode(kernel->mode_name, &options.mode)) {
      throw InvalidArgument("mode is '" + kernel->mode_name +
                            "', expected topk_score, maxmin, mmr, uniform, random or none");
    }
    options.keep_count = IntAttribute(api, info, "keep_count", options.keep_count);
    options.keep_ratio = FloatAttribute(api, info, "keep_ratio", options.keep_ratio);
    options.min_keep = IntAttribute(api, info, "min_keep", options.min_keep);
    options.theta = FloatAttribute(api, info, "theta", options.theta);
    options.seed = IntAttribute(api, info, "seed", options.seed);
    CheckOptions(options);
    std::size_t inputs = 0;
    Check(KernelInfo_GetInputCount::Call(api, info, &inputs));
    if (NeedsScores(options.mode) && inputs <= kScores) {
      throw InvalidArgument(MissingScores(kernel->mode_name));
    }

    const std::string forced = ForcedKernel();
    kernel->kernel = SelectTokenPrune(SupportedIsa(), forced);
    if (kernel->kernel == nullptr) {
      throw InvalidArgument(ForcedKernelProblem(forced, AvailableTokenPruneNames(SupportedIsa())));
    }
    *out = kernel.release();
  });
}

struct Inputs {
  Tensor hidden;
  Tensor scores;
  Tensor segments;
  Tensor keep;
  Tensor metric;
};

void CheckInputs(const Kernel& kernel, const Inputs& inputs) {
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
  if (inputs.scores) {
    require(Mismatch("scores", inputs.scores, ElementType::kFloat32, tokens));
  } else if (NeedsScores(kernel.options.mode)) {
    throw InvalidArgument(MissingScores(kernel.mode_name));
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
  if (inputs.keep) {
    int64_t count = 1;
    for (const int64_t size : inputs.keep.dims) count *= size;
    if (inputs.keep.type != ElementType::kInt64 || count != 1) {
      throw InvalidArgument("keep is " + Text(inputs.keep.type) + " " + Text(inputs.keep.dims) +
                            ", expected one int64");
    }
    const int64_t keep = *static_cast<const int64_t*>(inputs.keep.data);
    if (keep < 0) {
      throw InvalidArgument("keep is " + std::to_string(keep) + ", expected 0 or more");
    }
  }
  const Dims& metric = inputs.metric.dims;
  if (inputs.metric && (inputs.metric.type != inputs.hidden.type || metric.size() != 3 ||
                        metric[0] != tokens[0] || metric[1] != tokens[1])) {
    throw InvalidArgument("metric is " + Text(inputs.metric.type) + " " + Text(metric) +
                          ", expected " + Text(inputs.hidden.type) + " [" +
                          std::to_string(tokens[0]) + ", " + std::to_string(tokens[1]) + ", Dm]");
  }
}

// Writes the three outputs.
void WriteOutputs(const Api* api, KernelContext* context, const Tensor& hidden,
                  const std::vector<std::vector<int64_t>>& kept) {
  std::size_t longest = 0;
  for (const std::vector<int64_t>& row : kept) longest = std::max(longest, row.size());
  const int64_t b = hidden.dims[0];
  const int64_t s_kept = static_cast<int64_t>(longest);
  const std::size_t element_bytes = hidden.type == ElementType::kFloat32 ? 4 : 2;
  const std::size_t token_bytes = static_cast<std::size_t>(hidden.dims[2]) * element_bytes;
  const std::size_t row_bytes = static_cast<std::size_t>(hidden.dims[1]) * token_bytes;

  const std::byte* source = static_cast<const std::byte*>(hidden.data);
  std::byte* pruned = static_cast<std::byte*>(Output(api, context, 0, {b, s_kept, hidden.dims[2]}));
  int64_t* indices = static_cast<int64_t*>(Output(api, context, 1, {b, s_kept}));
  int64_t* lengths = static_cast<int64_t*>(Output(api, context, 2, {b}));
  for (std::size_t row = 0; row < kept.size(); ++row) {
    const std::vector<int64_t>& tokens = kept[row];
    if (lengths != nullptr) lengths[row] = static_cast<int64_t>(tokens.size());
    if (pruned != nullptr && token_bytes > 0 && longest > 0) {
      std::byte* target = pruned + row * longest * token_bytes;
      for (const int64_t token : tokens) {
        std::memcpy(target,
                    source + row * row_bytes + static_cast<std::size_t>(token) * token_bytes,
                    token_bytes);
        target += token_bytes;
      }
      std::memset(target, 0, (longest - tokens.size()) * token_bytes);
    }
    if (indices != nullptr) {
      int64_t* target = std::copy(tokens.begin(), tokens.end(), indices + row * longest);
      std::fill(target, indices + (row + 1) * longest, int64_t{0});
    }
  }
}

Status* Compute(void* state, KernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  return Guard(kernel.api, kernel.label, [&] {
    Inputs inputs;
    inputs.hidden = Input(kernel.api, context, kHidden);
    inputs.scores = Input(kernel.api, context, kScores);
    inputs.segments = Input(kernel.api, context, kSegments);
    inputs.keep = Input(kernel.api, context, kKeep);
    inputs.metric = Input(kernel.api, context, kMetric);
    CheckInputs(kernel, inputs);

    const Tensor& metric = inputs.metric ? inputs.metric : inputs.hidden;
    TokenPruneArgs args;
    args.options = kernel.options;
    args.b = static_cast<std::size_t>(inputs.hidden.dims[0]);
    args.s = static_cast<std::size_t>(inputs.hidden.dims[1]);
    args.scores = static_cast<const float*>(inputs.scores.data);
    args.segments = static_cast<const int32_t*>(inputs.segments.data);
    args.keep = static_cast<const int64_t*>(inputs.keep.data);
    args.type = inputs.hidden.type == ElementType::kFloat32 ? bivlm::ElementType::kFloat32
                                                            : bivlm::ElementType::kFloat16;
    args.metric = metric.data;
    args.dim = static_cast<std::size_t>(metric.dims[2]);
    SessionThreads threads(kernel.api, context);
    WriteOutputs(kernel.api, context, inputs.hidden,
                 RunTokenPrune(*kernel.kernel, args, threads.executor()));
  });
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
  const ElementType type = static_cast<const Operator*>(op)->type;
  const ElementType types[kInputs] = {type, ElementType::kFloat32, ElementType::kInt32,
                                      ElementType::kInt64, type};
  return types[index];
}

}  // namespace

Operator MakeTokenPruneOp(const Api* api, ElementType type) {
  Operator op = NewOperator(api);
  op.type = type;
  op.GetName = [](const CustomOp*) { return "TokenPrune"; };
  op.GetInputType = InputType;
  op.GetInputTypeCount = [](const CustomOp*) { return kInputs; };
  op.GetOutputType = [](const CustomOp* self, std::size_t index) {
    return index == 0 ? static_cast<const Operator*>(self)->type : ElementType::kInt64;
  };
  op.GetOutputTypeCount = [](const CustomOp*) { return std::size_t{3}; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetInputCharacteristic = [](const CustomOp*, std::size_t index) {
    return index == kHidden ? Characteristic::kRequired : Characteristic::kOptional;
  };
  op.GetOutputCharacteristic = [](const CustomOp*, std::size_t index) {
    return index == 2 ? Characteristic::kOptional : Characteristic::kRequired;
  };
  op.CreateKernelV2 = CreateKernel;
  op.KernelComputeV2 = Compute;
  op.InferOutputShapeFn = InferShape;
  return op;
}

}  // namespace bivlm::ort
