// From the lists of kernels to one kernel.
#include "bivlm/attention.h"
#include "bivlm/binary_matmul.h"
#include "bivlm/gated_silu.h"
#include "bivlm/group_matmul.h"
#include "bivlm/token_prune.h"

namespace bivlm {
namespace {

constexpr BinaryMatMulKernel kBinaryMatMulKernels[] = {
#define BIVLM_BINARY_MATMUL_KERNEL(needs, symbol, label) {label, needs, &(symbol)},
#include "bivlm/binary_matmul_kernels.inc"
#undef BIVLM_BINARY_MATMUL_KERNEL
};

constexpr AttentionKernel kAttentionKernels[] = {
#define BIVLM_ATTENTION_KERNEL(needs, symbol, label) {label, needs, &(symbol)},
#include "bivlm/attention_kernels.inc"
#undef BIVLM_ATTENTION_KERNEL
};

constexpr GatedSiluKernel kGatedSiluKernels[] = {
#define BIVLM_GATED_SILU_KERNEL(needs, symbol, label) {label, needs, &(symbol)},
#include "bivlm/gated_silu_kernels.inc"
#undef BIVLM_GATED_SILU_KERNEL
};

constexpr GroupMatMulKernel kGroupMatMulKernels[] = {
#define BIVLM_GROUP_MATMUL_KERNEL(needs, symbol, label) {label, needs, &(symbol)},
#include "bivlm/group_matmul_kernels.inc"
#undef BIVLM_GROUP_MATMUL_KERNEL
};

constexpr TokenPruneKernel kTokenPruneKernels[] = {
#define BIVLM_TOKEN_PRUNE_KERNEL(needs, symbol, label) {label, needs, &(symbol)},
#include "bivlm/token_prune_kernels.inc"
#undef BIVLM_TOKEN_PRUNE_KERNEL
};

template <typename List>
auto Select(const List& kernels, IsaSet supported, std::string_view forced) {
  for (const auto& kernel : kernels) {
    const bool wanted = forced.empty() || forced == kernel.name;
    if (wanted && (kernel.isa & supported) == kernel.isa) return &kernel;
  }
  return static_cast<decltype(kernels.begin())>(nullptr);
}

template <typename List>
std::string Names(const List& kernels, IsaSet supported) {
  std::string names;
  for (const auto& kernel : kernels) {
    if ((kernel.isa & supported) != kernel.isa) continue;
    if (!names.empty()) names += ", ";
    names += kernel.name;
  }
  return names;
}

}  // namespace

BinaryMatMulKernelList BinaryMatMulKernels() {
  return {kBinaryMatMulKernels, sizeof(kBinaryMatMulKernels) / sizeof(BinaryMatMulKernel)};
}

const BinaryMatMulKernel* SelectBinaryMatMul(IsaSet supported, std::string_view forced) {
  return Select(BinaryMatMulKernels(), supported, forced);
}

std::string AvailableBinaryMatMulNames(IsaSet supported) {
  return Names(BinaryMatMulKernels(), supported);
}

TokenPruneKernelList TokenPruneKernels() {
  return {kTokenPruneKernels, sizeof(kTokenPruneKernels) / sizeof(TokenPruneKernel)};
}

const TokenPruneKernel* SelectTokenPrune(IsaSet supported, std::string_view forced) {
  return Select(TokenPruneKernels(), supported, forced);
}

std::string AvailableTokenPruneNames(IsaSet supported) {
  return Names(TokenPruneKernels(), supported);
}

AttentionKernelList AttentionKernels() {
  return {kAttentionKernels, sizeof(kAttentionKernels) / sizeof(AttentionKernel)};
}

const AttentionKernel* SelectAttention(IsaSet supported, std::string_view forced) {
  return Select(AttentionKernels(), supported, forced);
}

std::string AvailableAttentionNames(IsaSet supported) {
  return Names(AttentionKernels(), supported);
}

GatedSiluKernelList GatedSiluKernels() {
  return {kGatedSiluKernels, sizeof(kGatedSiluKernels) / sizeof(GatedSiluKernel)};
}

const GatedSiluKernel* SelectGatedSilu(IsaSet supported, std::string_view forced) {
  return Select(GatedSiluKernels(), supported, forced);
}

std::string AvailableGatedSiluNames(IsaSet supported) {
  return Names(GatedSiluKernels(), supported);
}

GroupMatMulKernelList GroupMatMulKernels() {
  return {kGroupMatMulKernels, sizeof(kGroupMatMulKernels) / sizeof(GroupMatMulKernel)};
}

const GroupMatMulKernel* SelectGroupMatMul(IsaSet supported, std::string_view forced) {
  return Select(GroupMatMulKernels(), supported, forced);
}

std::string AvailableGroupMatMulNames(IsaSet supported) {
  return Names(GroupMatMulKernels(), supported);
}

}  // namespace bivlm
