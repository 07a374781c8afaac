// GroupQueryAttention as an ONNX Runtime operator: attributes, checks and shapes.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "adaptor.h"
#include "bivlm/attention.h"
#include "operators.h"

namespace bivlm::ort {
namespace {

constexpr std::size_t kStates = 0;
constexpr std::size_t kCos = 1;
constexpr std::size_t kSin = 2;
constexpr std::size_t kPastKey = 3;
constexpr std::size_t kPastValue = 4;
constexpr std::size_t kLastIndex = 5;
constexpr std::size_t kTotalLength = 6;
constexpr std::size_t kInputs = 7;

struct Kernel {
  const Api* api = nullptr;
  std::string label;
  const AttentionKernel* kernel = nullptr;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  float scale = 0.0F;
};

Status* CreateKernel(const CustomOp*, const Api* api, const KernelInfo* info, void** out) noexcept {
  std::string label = "GroupQueryAttention";
  return Guard(api, label, [&] {
    auto kernel = std::make_unique<Kernel>();
    kernel->api = api;
    kernel->label = NodeLabel(api, info, "GroupQueryAttention");
    label = kernel->label;
    kernel->heads = RequiredInt(api, info, "num_heads");
    kernel->kv_heads = RequiredInt(api, info, "kv_num_heads");
    kernel->scale = FloatAttribute(api, info, "scale", 0.0F);
    constexpr int64_t kMaxHeads = 1 << 16;
    if (kernel->kv_heads < 1 || kernel->heads < 1 || kernel->heads > kMaxHeads ||
        kernel->heads % kernel->kv_heads != 0) {
      throw InvalidArgument("num_heads is " + std::to_string(kernel->heads) + " and kv_num_heads " +
                            std::to_string(kernel->kv_heads) +
                            ", expected 1 to 65536 heads, a multiple of the kv heads");
    }
    if (!std::isfinite(kernel->scale)) {
      throw InvalidArgument("scale is " + std::to_string(kernel->scale) +
                            ", expected a finite number, or 0 for 1 / sqrt(head size)");
    }
    const std::string forced = ForcedKernel();
    kernel->kernel = SelectAttention(SupportedIsa(), forced);
    if (kernel->kernel == nullptr) {
      throw InvalidArgument(ForcedKernelProblem(forced, AvailableAttentionNames(SupportedIsa())));
    }
    *out = kernel.release();
  });
}

bivlm::ElementType KernelType(ElementType type) {
  return type == ElementType::kFloat32 ? bivlm::ElementType::kFloat32
                                       : bivlm::ElementType::kFloat16;
}

// Checks the inputs and returns their part of the arguments; `inputs` has kInputs tensors.
AttentionArgs CheckedArgs(const Kernel& kernel, const Tensor* inputs) {
  const Dims& states = inputs[kStates].dims;
  const Dims& past = inputs[kPastKey].dims;
  const int64_t heads = kernel.heads + 2 * kernel.kv_heads;
  if (states.size() != 3 || states[2] % (2 * heads) != 0 || states[2] == 0) {
    throw InvalidArgument("qkv is " + Text(states) + ", expected [B, S, heads * d] with the " +
                          std::to_string(heads) +
                          " heads of queries, keys and values, and d a multiple of 2");
  }
  const ElementType type = inputs[kStates].type;
  const ElementType cache_type = inputs[kPastKey].type;
  const int64_t b = states[0];
  const int64_t s = states[1];
  const int64_t d = states[2] / heads;
  if (past.size() != 4) {
    throw InvalidArgument("past_key is " + Text(past) + ", expected [B, kv_num_heads, P, d]");
  }
  const int64_t p = past[2];
  Require(Mismatch("cos", inputs[kCos], type, {b, s, d / 2}));
  Require(Mismatch("sin", inputs[kSin], type, {b, s, d / 2}));
  Require(Mismatch("past_key", inputs[kPastKey], cache_type, {b, kernel.kv_heads, p, d}));
  Require(Mismatch("past_value", inputs[kPastValue], cache_type, {b, kernel.kv_heads, p, d}));
  Require(Mismatch("seqlens_k", inputs[kLastIndex], ElementType::kInt32, {b}));
  const Tensor& length = inputs[kTotalLength];
  int64_t count = 1;
  for (const int64_t size : length.dims) count *= size;
  if (length.type != ElementType::kInt32 || count != 1) {
    throw InvalidArgument("total_sequence_length is " + Text(length.type) + " " +
                          Text(length.dims) + ", expected one int32");
  }
  const int64_t total = *static_cast<const int32_t*>(length.data);
  const int32_t* last = static_cast<const int32_t*>(inputs[kLastIndex].data);
  if (total < s) {
    throw InvalidArgument("total_sequence_length is " + std::to_string(total) + ", less than the " +
                          std::to_string(s) + " tokens of qkv");
  }
  for (int64_t row = 0; row < b; ++row) {
    const int64_t tokens = int64_t{last[row]} + 1;
    if (tokens < s || tokens > total || tokens - s > p) {
      throw InvalidArgument("seqlens_k is " + std::to_string(last[row]) + " in row " +
                            std::to_string(row) + ", expected " + std::to_string(s - 1) + " to " +
                            std::to_string(std::min(total, p + s) - 1) +
                            ": the index of the last token, behind at most " + std::to_string(p) +
                            " past and " + std::to_string(s) + " new ones");
    }
  }
  AttentionArgs args;
  args.type = KernelType(type);
  args.cache_type = KernelType(cache_type);
  args.b = static_cast<std::size_t>(b);
  args.s = static_cast<std::size_t>(s);
  args.heads = static_cast<std::size_t>(kernel.heads);
  args.kv_heads = static_cast<std::size_t>(kernel.kv_heads);
  args.d = static_cast<std::size_t>(d);
  args.past_capacity = static_cast<std::size_t>(p);
  args.capacity = static_cast<std::size_t>(std::max(p, total));
  args.scale = kernel.scale != 0.0F ? kernel.scale : 1.0F / std::sqrt(static_cast<float>(d));
  args.last_index = last;
  args.qkv = inputs[kStates].data;
  args.cos = inputs[kCos].data;
  args.sin = inputs[kSin].data;
  args.past_key = inputs[kPastKey].data;
  args.past_value = inputs[kPastValue].data;
  return args;
}

Status* Compute(void* state, KernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  return Guard(kernel.api, kernel.label, [&] {
    Tensor inputs[kInputs];
    for (std::size_t i = 0; i < kInputs; ++i) inputs[i] = Input(kernel.api, context, i);
    AttentionArgs args = CheckedArgs(kernel, inputs);
    const Dims& states = inputs[kStates].dims;
    const Dims& past = inputs[kPastKey].dims;
    const Dims present = {past[0], past[1], static_cast<int64_t>(args.capacity), past[3]};
    args.output = Output(kernel.api, context, 0, {states[0], states[1], kernel.heads * past[3]});
    args.present_key = Output(kernel.api, context, 1, present);
    args.present_value = Output(kernel.api, context, 2, present);
    SessionThreads threads(kernel.api, context);
    RunAttention(*kernel.kernel, args, threads.executor());
  });
}

Status* InferShape(const CustomOp* op, ShapeInferContext* context) noexcept {
  const Api* api = static_cast<const Operator*>(op)->api;
  return Guard(api, "GroupQueryAttention", [&] {
    const int64_t heads = InferenceInt(api, context, "num_heads");
    const int64_t kv_heads = InferenceInt(api, context, "kv_num_heads");
    InferredShape states = InferenceInput(api, context, kStates);
    if (states.known && states.dims.size() == 3 && heads > 0 && kv_heads > 0) {
      if (states.dims[2] > 0) states.dims[2] = states.dims[2] / (heads + 2 * kv_heads) * heads;
      states.names[2].clear();
      SetInferenceOutput(api, context, 0, states);
    }
    for (const std::size_t part : {kPastKey, kPastValue}) {
      InferredShape present = InferenceInput(api, context, part);
      if (!present.known || present.dims.size() != 4) continue;
      present.dims[2] = -1;
      present.names[2] = UniqueSizeName("cached_tokens");
      SetInferenceOutput(api, context, part - kPastKey + 1, present);
    }
  });
}

}  // namespace

Operator MakeAttentionOp(const Api* api, ElementType type, ElementType cache_type) {
  Operator op = NewOperator(api);
  op.type = type;
  op.cache_type = cache_type;
  op.GetName = [](const CustomOp*) { return "GroupQueryAttention"; };
  op.GetInputType = [](const CustomOp* self, std::size_t index) {
    const Operator& made = *static_cast<const Operator*>(self);
    if (index < kPastKey) return made.type;
    return index < kLastIndex ? made.cache_type : ElementType::kInt32;
  };
  op.GetInputTypeCount = [](const CustomOp*) { return kInputs; };
  op.GetOutputType = [](const CustomOp* self, std::size_t index) {
    const Operator& made = *static_cast<const Operator*>(self);
    return index == 0 ? made.type : made.cache_type;
  };
  op.GetOutputTypeCount = [](const CustomOp*) { return std::size_t{3}; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.CreateKernelV2 = CreateKernel;
  op.KernelComputeV2 = Compute;
  op.InferOutputShapeFn = InferShape;
  return op;
}

}  // namespace bivlm::ort
