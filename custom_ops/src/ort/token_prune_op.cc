// TokenPrune as an operator on the CPU.
#include <algorithm>
#include <memory>

#include "adaptor.h"
#include "operators.h"
#include "token_prune_inputs.h"

namespace bivlm::ort {
namespace {

struct Kernel {
  const Api* api = nullptr;
  std::string label;
  const TokenPruneKernel* kernel = nullptr;
  TokenPruneOptions options;
};

Status* CreateKernel(const CustomOp*, const Api* api, const KernelInfo* info, void** out) noexcept {
  std::string label = "TokenPrune";
  return Guard(api, label, [&] {
    auto kernel = std::make_unique<Kernel>();
    kernel->api = api;
    kernel->label = NodeLabel(api, info, "TokenPrune");
    label = kernel->label;
    kernel->options = ReadTokenPruneOptions(api, info);
    const std::string forced = ForcedKernel();
    kernel->kernel = SelectTokenPrune(SupportedIsa(), forced);
    if (kernel->kernel == nullptr) {
      throw InvalidArgument(ForcedKernelProblem(forced, AvailableTokenPruneNames(SupportedIsa())));
    }
    *out = kernel.release();
  });
}

// Writes the four outputs.
void WriteOutputs(const Api* api, KernelContext* context, const TokenPruneArgs& args,
                  const TokenPruneSelection& selection, const Executor& executor) {
  const auto b = static_cast<int64_t>(args.b);
  const std::size_t longest = selection.Longest();
  const auto s_kept = static_cast<int64_t>(longest);
  void* pruned = Output(api, context, 0, {b, s_kept, static_cast<int64_t>(args.width)});
  if (pruned != nullptr) WritePruned(args, selection, pruned, executor);
  auto* indices = static_cast<int64_t*>(Output(api, context, 1, {b, s_kept}));
  auto* lengths = static_cast<int64_t*>(Output(api, context, 2, {b}));
  for (std::size_t row = 0; row < args.b; ++row) {
    const std::vector<int64_t>& tokens = selection.kept[row];
    if (lengths != nullptr) lengths[row] = static_cast<int64_t>(tokens.size());
    if (indices != nullptr) {
      int64_t* target = std::copy(tokens.begin(), tokens.end(), indices + row * longest);
      std::fill(target, indices + (row + 1) * longest, int64_t{0});
    }
  }
  auto* token_map =
      static_cast<int64_t*>(Output(api, context, 3, {b, static_cast<int64_t>(args.s)}));
  if (token_map != nullptr) WriteTokenMap(args, selection, token_map);
}

Status* Compute(void* state, KernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  return Guard(kernel.api, kernel.label, [&] {
    const TokenPruneArgs args = ReadTokenPruneArgs(kernel.api, context, kernel.options);
    SessionThreads threads(kernel.api, context);
    const Executor executor = threads.executor();
    WriteOutputs(kernel.api, context, args, RunTokenPrune(*kernel.kernel, args, executor),
                 executor);
  });
}

}  // namespace

Operator MakeTokenPruneOp(const Api* api, ElementType type, ElementType metric_type) {
  Operator op = TokenPruneSchema(api, type, metric_type);
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.CreateKernelV2 = CreateKernel;
  op.KernelComputeV2 = Compute;
  return op;
}

}  // namespace bivlm::ort
