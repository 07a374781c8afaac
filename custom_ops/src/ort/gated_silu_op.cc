// GatedSiLU as an ONNX Runtime operator: checks and shapes.
#include <memory>

#include "adaptor.h"
#include "bivlm/gated_silu.h"
#include "operators.h"

namespace bivlm::ort {
namespace {

struct Kernel {
  const Api* api = nullptr;
  std::string label;
  const GatedSiluKernel* kernel = nullptr;
};

Status* CreateKernel(const CustomOp*, const Api* api, const KernelInfo* info, void** out) noexcept {
  std::string label = "GatedSiLU";
  return Guard(api, label, [&] {
    auto kernel = std::make_unique<Kernel>();
    kernel->api = api;
    kernel->label = NodeLabel(api, info, "GatedSiLU");
    label = kernel->label;
    const std::string forced = ForcedKernel();
    kernel->kernel = SelectGatedSilu(SupportedIsa(), forced);
    if (kernel->kernel == nullptr) {
      throw InvalidArgument(ForcedKernelProblem(forced, AvailableGatedSiluNames(SupportedIsa())));
    }
    *out = kernel.release();
  });
}

void RequireHalves(const Dims& x) {
  if (x.empty() || x.back() % 2 != 0) {
    throw InvalidArgument("X is " + Text(x) +
                          ", expected at least one axis and an even last one: gate, then up");
  }
}

Status* Compute(void* state, KernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  return Guard(kernel.api, kernel.label, [&] {
    const Tensor x = Input(kernel.api, context, 0);
    RequireHalves(x.dims);
    Dims dims = x.dims;
    dims.back() /= 2;
    GatedSiluArgs args;
    args.type = x.type == ElementType::kFloat32 ? bivlm::ElementType::kFloat32
                                                : bivlm::ElementType::kFloat16;
    args.rows = 1;
    for (std::size_t axis = 0; axis + 1 < dims.size(); ++axis) {
      args.rows *= static_cast<std::size_t>(dims[axis]);
    }
    args.width = static_cast<std::size_t>(dims.back());
    args.x = x.data;
    args.y = Output(kernel.api, context, 0, dims);
    SessionThreads threads(kernel.api, context);
    RunGatedSilu(*kernel.kernel, args, threads.executor());
  });
}

Status* InferShape(const CustomOp* op, ShapeInferContext* context) noexcept {
  const Api* api = static_cast<const Operator*>(op)->api;
  return Guard(api, "GatedSiLU", [&] {
    InferredShape shape = InferenceInput(api, context, 0);
    if (!shape.known || shape.dims.empty()) return;
    if (shape.dims.back() >= 0) {
      RequireHalves(shape.dims);
      shape.dims.back() /= 2;
    }
    shape.names.back().clear();
    SetInferenceOutput(api, context, 0, shape);
  });
}

}  // namespace

Operator MakeGatedSiluOp(const Api* api, ElementType type) {
  Operator op = NewOperator(api);
  op.type = type;
  op.GetName = [](const CustomOp*) { return "GatedSiLU"; };
  op.GetInputType = [](const CustomOp* self, std::size_t) {
    return static_cast<const Operator*>(self)->type;
  };
  op.GetInputTypeCount = [](const CustomOp*) { return std::size_t{1}; };
  op.GetOutputType = [](const CustomOp* self, std::size_t) {
    return static_cast<const Operator*>(self)->type;
  };
  op.GetOutputTypeCount = [](const CustomOp*) { return std::size_t{1}; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.CreateKernelV2 = CreateKernel;
  op.KernelComputeV2 = Compute;
  op.InferOutputShapeFn = InferShape;
  return op;
}

}  // namespace bivlm::ort
