// GatedSiLU as an operator on a GPU.
#include <memory>

#include "bivlm/cuda/gated_silu.h"
#include "ort/gated_silu_inputs.h"
#include "ort_cuda/gpu_call.h"
#include "ort_cuda/operators.h"
#include "ort_cuda/provider.h"

namespace bivlm::ort {
namespace {

struct Kernel {
  const Api* api = nullptr;
  std::string label;
};

Status* CreateKernel(const CustomOp*, const Api* api, const KernelInfo* info, void** out) noexcept {
  std::string label = "GatedSiLU";
  return Guard(api, label, [&] {
    label = NodeLabel(api, info, "GatedSiLU");
    RequireOurKernels();
    *out = std::make_unique<Kernel>(Kernel{api, label}).release();
  });
}

Status* Compute(void* state, KernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  return Guard(kernel.api, kernel.label, [&] {
    const GatedSiluArgs args = ReadGatedSiluArgs(kernel.api, context);
    RequireLaunch(kernel.label, cuda::LaunchGatedSilu(args, StreamOf(kernel.api, context)));
  });
}

}  // namespace

Operator MakeCudaGatedSiluOp(const Api* api, ElementType type) {
  Operator op = GatedSiluSchema(api, type);
  op.GetExecutionProviderType = [](const CustomOp*) { return kProvider; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.CreateKernelV2 = CreateKernel;
  op.KernelComputeV2 = Compute;
  return op;
}

}  // namespace bivlm::ort
