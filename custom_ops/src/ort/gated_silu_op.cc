// GatedSiLU as an operator on the CPU.
#include <memory>

#include "adaptor.h"
#include "gated_silu_inputs.h"
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

Status* Compute(void* state, KernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  return Guard(kernel.api, kernel.label, [&] {
    const GatedSiluArgs args = ReadGatedSiluArgs(kernel.api, context);
    SessionThreads threads(kernel.api, context);
    RunGatedSilu(*kernel.kernel, args, threads.executor());
  });
}

}  // namespace

Operator MakeGatedSiluOp(const Api* api, ElementType type) {
  Operator op = GatedSiluSchema(api, type);
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.CreateKernelV2 = CreateKernel;
  op.KernelComputeV2 = Compute;
  return op;
}

}  // namespace bivlm::ort
