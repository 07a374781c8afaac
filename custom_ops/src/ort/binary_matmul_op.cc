// BinaryMatMul as an operator on the CPU.
#include <memory>

#include "adaptor.h"
#include "binary_matmul_inputs.h"
#include "huge_pages.h"
#include "operators.h"

namespace bivlm::ort {
namespace {

struct Kernel {
  const Api* api = nullptr;
  std::string label;
  const BinaryMatMulKernel* kernel = nullptr;
  BinaryMatMulWeight weight;  // with the pointers of the constant inputs, which are checked
  const uint8_t* constant_codes = nullptr;    // as ONNX Runtime has them
  std::shared_ptr<const uint8_t> huge_codes;  // weight.codes, if they were copied
};

void SetChecked(const WeightTensors& tensors, BinaryMatMulWeight* weight) {
  SetWeightTensors(tensors, weight);
  if (!tensors.order) return;
  CheckOrder(weight->order, static_cast<std::size_t>(tensors.order.dims[0]));
}

Status* CreateKernel(const CustomOp*, const Api* api, const KernelInfo* info, void** out) noexcept {
  std::string label = "BinaryMatMul";
  return Guard(api, label, [&] {
    auto kernel = std::make_unique<Kernel>();
    kernel->api = api;
    kernel->label = NodeLabel(api, info, "BinaryMatMul");
    label = kernel->label;
    kernel->weight = ReadBinaryMatMulWeight(api, info);
    const WeightTensors tensors = ConstantWeightTensors(api, info);
    SetChecked(tensors, &kernel->weight);
    kernel->constant_codes = kernel->weight.codes;
    if (HugePagesWanted() && tensors.codes) {
      kernel->huge_codes = CopyToHugePages(kernel->weight.codes,
                                           kernel->weight.panels * kernel->weight.panel_code_bytes);
      kernel->weight.codes = kernel->huge_codes.get();
    }

    const std::string forced = ForcedKernel();
    kernel->kernel = SelectBinaryMatMul(SupportedIsa(), forced);
    if (kernel->kernel == nullptr) {
      throw InvalidArgument(
          ForcedKernelProblem(forced, AvailableBinaryMatMulNames(SupportedIsa())));
    }
    *out = kernel.release();
  });
}

Status* Compute(void* state, KernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  return Guard(kernel.api, kernel.label, [&] {
    // Constant inputs were checked at creation; others are checked now.
    BinaryMatMulWeight weight = kernel.weight;
    const WeightPointers checked = {kernel.constant_codes, weight.coefficients, weight.signs,
                                    weight.order};
    SetChecked(WeightTensorsOfCall(kernel.api, context, checked), &weight);
    const BinaryMatMulArgs args = ReadBinaryMatMulArgs(kernel.api, context, weight);
    SessionThreads threads(kernel.api, context);
    RunBinaryMatMul(*kernel.kernel, args, threads.executor());
  });
}

}  // namespace

Operator MakeBinaryMatMulOp(const Api* api) {
  Operator op = BinaryMatMulSchema(api);
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.CreateKernelV2 = CreateKernel;
  op.KernelComputeV2 = Compute;
  return op;
}

}  // namespace bivlm::ort
