// Which kernel a CPU gets, asked for CPUs that this one is not.
#include <string>

#include "bivlm/attention.h"
#include "bivlm/binary_matmul.h"
#include "bivlm/gated_silu.h"
#include "bivlm/group_matmul.h"
#include "bivlm/token_prune.h"
#include "check.h"

namespace bivlm::testing {
namespace {

template <typename Kernel>
std::string Name(const Kernel* kernel) {
  return kernel == nullptr ? "none" : kernel->name;
}

void ExpectName(Checker* check, IsaSet supported, const char* forced, const std::string& want) {
  const std::string matmul = Name(SelectBinaryMatMul(supported, forced));
  const std::string prune = Name(SelectTokenPrune(supported, forced));
  const std::string attention = Name(SelectAttention(supported, forced));
  const std::string gated_silu = Name(SelectGatedSilu(supported, forced));
  const std::string group = Name(SelectGroupMatMul(supported, forced));
  check->Expect(
      matmul == want && prune == want && attention == want && gated_silu == want && group == want,
      "features ", supported, " forced '", forced, "': got ", matmul, ", ", prune, ", ", attention,
      ", ", gated_silu, " and ", group, ", want ", want);
}

void ExpectAvailable(Checker* check, IsaSet supported, const std::string& want) {
  const std::string matmul = AvailableBinaryMatMulNames(supported);
  const std::string prune = AvailableTokenPruneNames(supported);
  const std::string attention = AvailableAttentionNames(supported);
  const std::string gated_silu = AvailableGatedSiluNames(supported);
  const std::string group = AvailableGroupMatMulNames(supported);
  check->Expect(
      matmul == want && prune == want && attention == want && gated_silu == want && group == want,
      "available with features ", supported, ": got ", matmul, ", ", prune, ", ", attention, ", ",
      gated_silu, " and ", group, ", want ", want);
}

void EveryBuild(Checker* check) {
  ExpectName(check, isa::kNone, "", "generic");
  ExpectName(check, isa::kNone, "generic", "generic");
  ExpectName(check, isa::kNone, "avx2", "none");
  ExpectName(check, ~isa::kNone, "generic", "generic");
  ExpectName(check, ~isa::kNone, "no such kernel", "none");
  ExpectName(check, ~isa::kNone, "AVX2", "none");
  ExpectAvailable(check, isa::kNone, "generic");
  const BinaryMatMulKernelList kernels = BinaryMatMulKernels();
  check->Expect(
      kernels.count == TokenPruneKernels().count && kernels.count == AttentionKernels().count &&
          kernels.count == GatedSiluKernels().count && kernels.count == GroupMatMulKernels().count,
      "the lists differ in length");
  for (std::size_t i = 0; i < kernels.count; ++i) {
    const std::string name = kernels.first[i].name;
    check->Expect(
        name == TokenPruneKernels().first[i].name && name == AttentionKernels().first[i].name &&
            name == GatedSiluKernels().first[i].name && name == GroupMatMulKernels().first[i].name,
        "the lists differ at ", name);
    check->Expect((kernels.first[i].isa == isa::kNone) == (i + 1 == kernels.count),
                  "generic must be last, and alone need nothing: ", name);
  }
}

#if defined(BIVLM_CPU_AVX2) && defined(BIVLM_CPU_AVXVNNI) && defined(BIVLM_CPU_AVX512) && \
    defined(BIVLM_CPU_AVX512VBMI) && defined(BIVLM_CPU_AMX)
#define BIVLM_TEST_X86_BUILD
void X86Build(Checker* check) {
  ExpectName(check, isa::kAvx2, "", "avx2");
  ExpectName(check, isa::kAvx2, "avx512", "none");
  ExpectName(check, isa::kAvx2 | isa::kAvx512, "", "avx512");
  ExpectName(check, isa::kAvx2 | isa::kAvx512, "avx2", "avx2");
  ExpectName(check, isa::kAvx2 | isa::kAvx512, "avxvnni", "none");
  ExpectName(check, isa::kAvx2 | isa::kAvx512, "amx", "none");
  ExpectName(check, isa::kAvx2 | isa::kAvx512, "avx512vbmi", "none");
  ExpectName(check, isa::kAvx2 | isa::kAvx512 | isa::kVbmiGfni, "", "avx512vbmi");
  ExpectName(check, isa::kAvx2 | isa::kAvx512 | isa::kVbmiGfni, "avx512", "avx512");
  ExpectName(check, isa::kAvx2 | isa::kAvx512 | isa::kAmxInt8, "", "avx512");
  ExpectName(check, isa::kAvx2 | isa::kAvx512 | isa::kVbmiGfni | isa::kAmxInt8, "", "amx");
  ExpectName(check, isa::kAvxVnni, "avxvnni", "none");
  ExpectName(check, isa::kAvx2 | isa::kAvxVnni, "", "avxvnni");
  ExpectName(check, isa::kAvx2 | isa::kAvxVnni | isa::kAvx512, "", "avx512");
  ExpectAvailable(check, isa::kAvx2, "avx2, generic");
  ExpectAvailable(check, isa::kAvx2 | isa::kAvx512, "avx512, avx2, generic");
  ExpectAvailable(check, isa::kAvx2 | isa::kAvx512 | isa::kVbmiGfni,
                  "avx512vbmi, avx512, avx2, generic");
  ExpectAvailable(check, isa::kAvx2 | isa::kAvxVnni, "avxvnni, avx2, generic");
}
#endif

#if defined(BIVLM_CPU_NEON) && defined(BIVLM_CPU_DOTPROD) && defined(BIVLM_CPU_I8MM)
#define BIVLM_TEST_ARM_BUILD
void ArmBuild(Checker* check) {
  ExpectName(check, isa::kNeon, "", "neon");
  ExpectName(check, isa::kNeon, "dotprod", "none");
  ExpectName(check, isa::kNeon | isa::kDotProd, "", "dotprod");
  ExpectName(check, isa::kNeon | isa::kDotProd, "neon", "neon");
  ExpectName(check, isa::kNeon | isa::kDotProd, "i8mm", "none");
  ExpectName(check, isa::kNeon | isa::kI8mm, "", "neon");
  ExpectName(check, isa::kNeon | isa::kDotProd | isa::kI8mm, "", "i8mm");
  ExpectName(check, isa::kNeon | isa::kDotProd | isa::kI8mm, "dotprod", "dotprod");
  ExpectName(check, isa::kNeon, "avx2", "none");
  ExpectAvailable(check, isa::kNeon, "neon, generic");
  ExpectAvailable(check, isa::kNeon | isa::kDotProd | isa::kI8mm, "i8mm, dotprod, neon, generic");
}
#endif

}  // namespace
}  // namespace bivlm::testing

int main() {
  bivlm::testing::Checker check;
  bivlm::testing::EveryBuild(&check);
#ifdef BIVLM_TEST_X86_BUILD
  bivlm::testing::X86Build(&check);
#endif
#ifdef BIVLM_TEST_ARM_BUILD
  bivlm::testing::ArmBuild(&check);
#endif
  return check.Finish("select_test");
}
