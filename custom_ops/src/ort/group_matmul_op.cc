// GroupMatMul as an ONNX Runtime operator: attributes, checks and shapes.
#include <memory>

#include "adaptor.h"
#include "bivlm/group_matmul.h"
#include "operators.h"
#include "product.h"

namespace bivlm::ort {
namespace {

constexpr std::size_t kCodes = 1;
constexpr std::size_t kScales = 2;
constexpr std::size_t kInputs = 3;

struct Kernel {
  const Api* api = nullptr;
  std::string label;
  const GroupMatMulKernel* kernel = nullptr;
  GroupMatMulWeight weight;
};

// Checks types and shapes of the tensors that are there and enters their pointers.
void SetTensors(const Tensor& codes, const Tensor& scales, GroupMatMulWeight* weight) {
  const int64_t n = Signed(weight->n);
  const int64_t blocks = Signed(weight->blocks());
  if (codes) {
    Require(Mismatch("codes", codes, ElementType::kUint8,
                     {n, blocks, Signed(weight->block * weight->bits / 8)}));
    weight->codes = static_cast<const uint8_t*>(codes.data);
  }
  if (scales) {
    Require(Mismatch("scales", scales, ElementType::kFloat16, {n, blocks}));
    weight->scales = static_cast<const uint8_t*>(scales.data);
  }
}

Status* CreateKernel(const CustomOp*, const Api* api, const KernelInfo* info, void** out) noexcept {
  std::string label = "GroupMatMul";
  return Guard(api, label, [&] {
    auto kernel = std::make_unique<Kernel>();
    kernel->api = api;
    kernel->label = NodeLabel(api, info, "GroupMatMul");
    label = kernel->label;
    Require(MakeGroupMatMulWeight(RequiredInt(api, info, "K"), RequiredInt(api, info, "N"),
                                  RequiredInt(api, info, "bits"),
                                  RequiredInt(api, info, "block_size"), &kernel->weight));
    SetTensors(ConstantInput(api, info, kCodes), ConstantInput(api, info, kScales),
               &kernel->weight);
    const std::string forced = ForcedKernel();
    kernel->kernel = SelectGroupMatMul(SupportedIsa(), forced);
    if (kernel->kernel == nullptr) {
      throw InvalidArgument(ForcedKernelProblem(forced, AvailableGroupMatMulNames(SupportedIsa())));
    }
    *out = kernel.release();
  });
}

Status* Compute(void* state, KernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  return Guard(kernel.api, kernel.label, [&] {
    GroupMatMulWeight weight = kernel.weight;
    SetTensors(Input(kernel.api, context, kCodes), Input(kernel.api, context, kScales), &weight);
    const Product product = ReadProduct(kernel.api, context, weight.k, weight.n);
    GroupMatMulArgs args;
    args.weight = &weight;
    args.type = product.type;
    args.m = product.m;
    args.x = product.x;
    args.y = product.y;
    SessionThreads threads(kernel.api, context);
    RunGroupMatMul(*kernel.kernel, args, threads.executor());
  });
}

}  // namespace

Operator MakeGroupMatMulOp(const Api* api) {
  Operator op = NewOperator(api);
  op.GetName = [](const CustomOp*) { return "GroupMatMul"; };
  op.GetInputType = [](const CustomOp*, std::size_t index) {
    constexpr ElementType kTypes[kInputs] = {ElementType::kUndefined, ElementType::kUint8,
                                             ElementType::kFloat16};
    return kTypes[index];
  };
  op.GetInputTypeCount = [](const CustomOp*) { return kInputs; };
  op.GetOutputType = [](const CustomOp*, std::size_t) { return ElementType::kUndefined; };
  op.GetOutputTypeCount = [](const CustomOp*) { return std::size_t{1}; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.CreateKernelV2 = CreateKernel;
  op.KernelComputeV2 = Compute;
  op.InferOutputShapeFn = InferProductShape;
  return op;
}

}  // namespace bivlm::ort
