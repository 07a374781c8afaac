// TokenPrune as an operator on a GPU: `segments` and `keep` come on the host, so that the sizes of
// the outputs are known before the GPU has chosen.
#include <memory>

#include "bivlm/cuda/token_prune.h"
#include "ort/token_prune_inputs.h"
#include "ort_cuda/gpu_call.h"
#include "ort_cuda/operators.h"
#include "ort_cuda/provider.h"

namespace bivlm::ort {
namespace {

struct Kernel {
  const Api* api = nullptr;
  std::string label;
  TokenPruneOptions options;
};

Status* CreateKernel(const CustomOp*, const Api* api, const KernelInfo* info, void** out) noexcept {
  std::string label = "TokenPrune";
  return Guard(api, label, [&] {
    label = NodeLabel(api, info, "TokenPrune");
    RequireOurKernels();
    *out = std::make_unique<Kernel>(Kernel{api, label, ReadTokenPruneOptions(api, info)}).release();
  });
}

Status* Compute(void* state, KernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  const Api* api = kernel.api;
  return Guard(api, kernel.label, [&] {
    const TokenPruneArgs args = ReadTokenPruneArgs(api, context, kernel.options);
    const cuda::TokenPrunePlan plan = cuda::PlanTokenPrune(args);
    const auto b = static_cast<int64_t>(args.b);
    const auto longest = static_cast<int64_t>(plan.Longest());
    cuda::TokenPruneOutputs outputs;
    outputs.pruned = Output(api, context, 0, {b, longest, static_cast<int64_t>(args.width)});
    outputs.kept_indices = static_cast<int64_t*>(Output(api, context, 1, {b, longest}));
    outputs.lengths = static_cast<int64_t*>(Output(api, context, 2, {b}));
    outputs.token_map =
        static_cast<int64_t*>(Output(api, context, 3, {b, static_cast<int64_t>(args.s)}));
    const std::size_t bytes = cuda::TokenPruneScratchBytes(args, plan);
    const GpuScratch scratch(api, context, bytes);
    RequireLaunch(kernel.label, cuda::LaunchTokenPrune(args, plan, scratch.data(), bytes, outputs,
                                                       StreamOf(api, context)));
  });
}

}  // namespace

Operator MakeCudaTokenPruneOp(const Api* api, ElementType type, ElementType metric_type) {
  Operator op = TokenPruneSchema(api, type, metric_type);
  op.GetExecutionProviderType = [](const CustomOp*) { return kProvider; };
  op.GetInputMemoryType = [](const CustomOp*, std::size_t index) {
    return index == kTokenPruneSegments || index == kTokenPruneKeep ? MemoryType::kCpuInput
                                                                    : MemoryType::kDefault;
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.CreateKernelV2 = CreateKernel;
  op.KernelComputeV2 = Compute;
  return op;
}

}  // namespace bivlm::ort
