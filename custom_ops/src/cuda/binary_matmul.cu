// BinaryMatMul on a GPU: checks, the division of the scratch memory, the choice of kernels.
#include "bivlm/cuda/binary_matmul.h"
#include "cuda/binary_matmul_kernels.h"
#include "cuda/launch.h"

namespace bivlm::cuda {
namespace {

// More tokens than this, and enough tiles of 128 rows and 64 tokens for a middling GPU: the tokens
// go through shared memory. Estimated; no GPU has measured it.
constexpr std::size_t kDecodeTokens = 32;
constexpr std::size_t kPrefillTiles = 48;

std::size_t CeilDivide(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

std::size_t PaddedTokens(std::size_t m) { return CeilDivide(m, kGroupTokens) * kGroupTokens; }

bool IsTransformedApart(const BinaryMatMulWeight& weight) {
  return weight.hadamard_block > 0 && weight.order != nullptr && !weight.order_has_chunks;
}

// Sizes of the parts of the scratch memory, multiples of 16 bytes.
struct ScratchParts {
  std::size_t q;
  std::size_t factors;
  std::size_t transformed;

  ScratchParts(const BinaryMatMulWeight& weight, std::size_t m)
      : q(PaddedTokens(m) * weight.k_padded),
        factors(PaddedTokens(m) * weight.chunks() * sizeof(ChunkFactors)),
        transformed(IsTransformedApart(weight) ? m * weight.k_padded * sizeof(float) : 0) {}
};

bool IsAligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

std::string CheckTensor(const char* name, const void* pointer, std::size_t alignment) {
  if (pointer == nullptr) return std::string(name) + " is null";
  if (IsAligned(pointer, alignment)) return "";
  return std::string(name) + " does not start at a multiple of " + std::to_string(alignment) +
         " bytes";
}

std::string Check(const BinaryMatMulArgs& args, const void* scratch, std::size_t scratch_bytes) {
  const BinaryMatMulWeight& weight = *args.weight;
  const struct {
    const char* name;
    const void* pointer;
    std::size_t alignment;
    bool is_needed;
  } tensors[] = {
      {"codes", weight.codes, kBinaryMatMulAlignment, true},
      {"coefficients", weight.coefficients, sizeof(uint16_t), true},
      {"order", weight.order, sizeof(uint16_t), weight.order != nullptr},
      {"X", args.x, ElementBytes(args.type), true},
      {"Y", args.y, ElementBytes(args.type), true},
      {"scratch memory", scratch, kBinaryMatMulAlignment, true},
  };
  for (const auto& tensor : tensors) {
    if (!tensor.is_needed) continue;
    std::string problem = CheckTensor(tensor.name, tensor.pointer, tensor.alignment);
    if (!problem.empty()) return problem;
  }
  const std::size_t needed = BinaryMatMulScratchBytes(weight, args.m);
  if (scratch_bytes < needed) {
    return "scratch memory has " + std::to_string(scratch_bytes) + " bytes, " +
           std::to_string(needed) + " are needed";
  }
  const std::size_t most_chunks = kMaxBlocks / weight.chunks();
  const std::size_t most_tiles = kMaxBlocks / CeilDivide(weight.panels, 2);
  const std::size_t most = most_chunks < most_tiles ? most_chunks : most_tiles;
  if (PaddedTokens(args.m) <= most) return "";
  return "X has " + std::to_string(args.m) + " tokens, at most " +
         std::to_string(most / kGroupTokens * kGroupTokens) +
         " of this size fit one launch; divide them";
}

DeviceWeight MakeDeviceWeight(const BinaryMatMulWeight& weight) {
  DeviceWeight result = {};
  result.codes = weight.codes;
  result.coefficients = reinterpret_cast<const uint16_t*>(weight.coefficients);
  result.signs = weight.signs;
  result.order = reinterpret_cast<const uint16_t*>(weight.order);
  result.panel_code_bytes = weight.panel_code_bytes;
  result.n = weight.n;
  result.k = weight.k;
  result.panels = static_cast<unsigned>(weight.panels);
  result.chunks = static_cast<unsigned>(weight.chunks());
  result.coefficient_slots = static_cast<unsigned>(weight.coefficient_slots);
  result.hadamard_block = static_cast<unsigned>(weight.hadamard_block);
  result.stream_count = static_cast<unsigned>(weight.stream_count);
  result.order_has_chunks = weight.order_has_chunks;
  for (std::size_t i = 0; i < weight.class_count; ++i) {
    if (weight.classes[i].planes < 2) continue;
    result.paired_chunks = static_cast<unsigned>(weight.classes[i].chunk_end);
  }
  for (std::size_t i = 0; i < weight.stream_count; ++i) {
    const BinaryMatMulStream& from = weight.streams[i];
    DeviceStream& to = result.streams[i];
    to.code_offset = from.code_offset;
    to.code_stride = static_cast<unsigned>(from.code_stride);
    to.chunk_begin = static_cast<unsigned>(from.chunk_begin);
    to.chunk_end = static_cast<unsigned>(from.chunk_end);
    to.coefficient_slot = static_cast<unsigned>(from.coefficient_slot);
    to.is_pair = from.is_pair;
    to.is_behind_pair = !from.is_pair && from.chunk_end <= result.paired_chunks;
  }
  return result;
}

}  // namespace

std::size_t BinaryMatMulScratchBytes(const BinaryMatMulWeight& weight, std::size_t m) {
  const ScratchParts parts(weight, m);
  return parts.q + parts.factors + parts.transformed;
}

Path ChoosePath(const BinaryMatMulWeight& weight, std::size_t m) {
  const bool is_large = CeilDivide(weight.n, 128) * CeilDivide(m, 64) >= kPrefillTiles;
  return m > kDecodeTokens && is_large ? Path::kPrefill : Path::kDecode;
}

std::string LaunchBy(Path path, const BinaryMatMulArgs& args, void* scratch,
                     std::size_t scratch_bytes, cudaStream_t stream) {
  if (args.m == 0) return "";
  if (std::string problem = Check(args, scratch, scratch_bytes); !problem.empty()) return problem;
  const DeviceWeight weight = MakeDeviceWeight(*args.weight);
  const ScratchParts parts(*args.weight, args.m);
  std::byte* memory = static_cast<std::byte*>(scratch);
  Prepared prepared = {};
  prepared.q = reinterpret_cast<uint4*>(memory);
  prepared.factors = reinterpret_cast<ChunkFactors*>(memory + parts.q);
  if (parts.transformed > 0) {
    prepared.transformed = reinterpret_cast<float*>(memory + parts.q + parts.factors);
  }
  prepared.tokens = static_cast<unsigned>(PaddedTokens(args.m));
  cudaError_t error = LaunchPrepare(weight, args, prepared, stream);
  if (error == cudaSuccess) {
    error = path == Path::kPrefill ? LaunchPrefill(weight, args, prepared, stream)
                                   : LaunchDecode(weight, args, prepared, stream);
  }
  if (error == cudaSuccess) return "";
  return "launch failed for " + std::to_string(args.m) +
         " tokens, N = " + std::to_string(weight.n) + ", K = " + std::to_string(weight.k) + ": " +
         cudaGetErrorString(error);
}

std::string LaunchBinaryMatMul(const BinaryMatMulArgs& args, void* scratch,
                               std::size_t scratch_bytes, cudaStream_t stream) {
  return LaunchBy(ChoosePath(*args.weight, args.m), args, scratch, scratch_bytes, stream);
}

}  // namespace bivlm::cuda
