// BinaryMatMul: Y[m, i] = sum_j What[i, j] v[m, j], v = transform(X).
//
// export/OPS.md says what the operator computes, bivlm_edge/quant/FORMAT.md how the weight lies in
// memory. Names here: m tokens, n output features, k input features; a chunk is 64 columns, a panel
// 16 rows. A *block* is the 128 or 256 bytes that hold one plane or a pair of planes of one panel
// and chunk; the blocks of the same planes, over all chunks of a class, form a BinaryMatMulStream.
//
// A product has two steps. `prepare` turns rows of X into what the kernel multiplies (padding,
// Hadamard transform, column order, perhaps int8); `multiply` does the panels. Kernels do not
// allocate, start no threads and check nothing: MakeBinaryMatMulWeight and the caller have.
#ifndef BIVLM_BINARY_MATMUL_H_
#define BIVLM_BINARY_MATMUL_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "bivlm/cpu_features.h"
#include "bivlm/float16.h"
#include "bivlm/parallel.h"

namespace bivlm {

inline constexpr std::size_t kChunkColumns = 64;
inline constexpr std::size_t kPanelRows = 16;
inline constexpr std::size_t kMaxPlanes = 4;
inline constexpr std::size_t kPlaneBlockBytes = kPanelRows * kChunkColumns / 8;  // 128 per plane

// Columns with the same number of planes.
struct BinaryMatMulClass {
  std::size_t planes = 0;  // 1..4
  std::size_t chunk_begin = 0;
  std::size_t chunk_end = 0;
  std::size_t code_offset = 0;       // bytes from the start of a panel to chunk_begin
  std::size_t coefficient_slot = 0;  // of the first plane
};

// One plane or a pair of planes over the chunks of a class.
struct BinaryMatMulStream {
  bool is_pair = false;
  std::size_t chunk_begin = 0;
  std::size_t chunk_end = 0;
  std::size_t code_offset = 0;  // bytes from the start of a panel to the block of chunk_begin
  std::size_t code_stride = 0;  // bytes from a block to the one of the next chunk
  std::size_t coefficient_slot = 0;
};

// Attributes of the operator.
struct BinaryMatMulShape {
  int64_t k = 0;
  int64_t n = 0;
  const int64_t* plane_columns = nullptr;
  std::size_t plane_count = 0;
  int64_t hadamard_block = 0;
  int64_t format = 1;
};

// A weight in packed format 1. The tensors may start at any address.
struct BinaryMatMulWeight {
  std::size_t k = 0;
  std::size_t n = 0;
  std::size_t k_padded = 0;
  std::size_t panels = 0;
  std::size_t hadamard_block = 0;    // 0, 64 or 128
  std::size_t panel_code_bytes = 0;  // from a panel to the next
  std::size_t coefficient_slots = 0;
  std::size_t class_count = 0;
  std::size_t stream_count = 0;
  BinaryMatMulClass classes[kMaxPlanes];
  BinaryMatMulStream streams[kMaxPlanes + 2];

  const uint8_t* codes = nullptr;         // (panels, panel_code_bytes)
  const uint8_t* coefficients = nullptr;  // float16 (panels, coefficient_slots, 16)
  const uint8_t* signs = nullptr;         // (k_padded / 8), or null: all +1
  const uint8_t* order = nullptr;         // uint16 (k_padded) or (k_padded / 64), or null: identity
  bool order_has_chunks = false;          // `order` permutes chunks, not columns

  std::size_t chunks() const { return k_padded / kChunkColumns; }
};

// Sets the sizes and the division into classes and streams; leaves the tensors null. Returns "" or
// what is wrong with `shape`.
std::string MakeBinaryMatMulWeight(const BinaryMatMulShape& shape, BinaryMatMulWeight* weight);

struct BinaryMatMulArgs {
  const BinaryMatMulWeight* weight = nullptr;
  ElementType type = ElementType::kFloat32;  // of x and y
  std::size_t m = 0;
  const void* x = nullptr;  // (m, k) row-major
  void* y = nullptr;        // (m, n) row-major, overwritten
};

// One instruction set's implementation.
struct BinaryMatMulFunctions {
  // Products of a weight with an activation that take about 5 us: the size of a task.
  std::size_t task_products;
  // Bytes of one row after `prepare`: a multiple of 64.
  std::size_t (*row_bytes)(const BinaryMatMulWeight& weight);
  // Writes rows [row_begin, row_end) of x to `prepared`, which starts at row_begin and at a
  // multiple of 64 bytes. `work` has room for k_padded floats.
  void (*prepare)(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                  std::byte* prepared, float* work);
  // Writes y for rows [row_begin, row_end), columns of the panels [panel_begin, panel_end).
  // `prepared` starts at row_begin.
  void (*multiply)(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                   std::size_t panel_begin, std::size_t panel_end, const std::byte* prepared);
  // Products of at most few_tokens tokens are left to `few`, which may round by another rule.
  std::size_t few_tokens = 0;
  const BinaryMatMulFunctions* few = nullptr;
  // Panels that the kernel multiplies together; those of a task are a multiple of it.
  std::size_t unit_panels = 2;
};

struct BinaryMatMulKernel {
  const char* name;
  IsaSet isa;  // what it needs
  const BinaryMatMulFunctions* functions;
};

#define BIVLM_BINARY_MATMUL_KERNEL(needs, symbol, label) extern const BinaryMatMulFunctions symbol;
#include "bivlm/binary_matmul_kernels.inc"
#undef BIVLM_BINARY_MATMUL_KERNEL

struct BinaryMatMulKernelList {
  const BinaryMatMulKernel* first;
  std::size_t count;
  const BinaryMatMulKernel* begin() const { return first; }
  const BinaryMatMulKernel* end() const { return first + count; }
};

// All kernels of this build, best first.
BinaryMatMulKernelList BinaryMatMulKernels();

// The best kernel that `supported` allows, or the one named `forced` if that is not empty. Null if
// this build has none of that name or `supported` does not suffice for it.
const BinaryMatMulKernel* SelectBinaryMatMul(IsaSet supported, std::string_view forced);

// The names that SelectBinaryMatMul accepts, as "avx2, generic".
std::string AvailableBinaryMatMulNames(IsaSet supported);

// Computes y. Throws std::bad_alloc if there is no memory for the prepared rows.
void RunBinaryMatMul(const BinaryMatMulKernel& kernel, const BinaryMatMulArgs& args,
                     const Executor& executor);

}  // namespace bivlm

#endif  // BIVLM_BINARY_MATMUL_H_
