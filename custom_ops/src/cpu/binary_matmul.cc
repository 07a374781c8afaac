// The division of a packed weight into classes and streams, and of a product into tasks.
#include "bivlm/binary_matmul.h"

#include <algorithm>

#include "scratch.h"

namespace bivlm {
namespace {

// Rows that are prepared together: bounds the memory for prepared rows, while the weight is still
// read only once per 256 tokens.
constexpr std::size_t kPassRows = 256;

// Rows of one multiply task. With k = 4096, 128 int8 rows are half of an L2 cache of 1 MiB, in
// which they stay while the panels of the task go by. 64 rows were 1 to 3 % slower (more
// unpacking), 256 as fast.
constexpr std::size_t kTaskRows = 128;

// Channels that one task prepares at least, 2 to 8 us, and the most tasks, which bounds their work
// space.
constexpr std::size_t kPrepareTaskChannels = 8192;
constexpr std::size_t kMaxPrepareTasks = 16;

// A product of fewer tasks stays on one thread. At m = 1 on 2 idle Zen 5 cores, two threads took 2
// tasks from 8.6 to 6.2 us and 4.5 tasks from 15.7 to 9.7 us, while 2.75 tasks at m = 8 rose from
// 7.4 to 9.3 us (ONNX Runtime 1.31.1, avx512).
constexpr std::size_t kSerialTasks = 4;

std::string ListOf(const BinaryMatMulShape& shape) {
  std::string text = "(";
  for (std::size_t p = 0; p < shape.plane_count; ++p) {
    if (p > 0) text += ", ";
    text += std::to_string(shape.plane_columns[p]);
  }
  return text + ")";
}

std::string CheckShape(const BinaryMatMulShape& shape) {
  // Larger sizes would overflow the byte counts, long before any memory could hold such a weight.
  constexpr int64_t kMaxFeatures = int64_t{1} << 31;
  if (shape.format != 1) {
    return "format is " + std::to_string(shape.format) +
           ", this library reads format 1; export the model again or install a newer bivlm-edge";
  }
  if (shape.k < 1 || shape.n < 1 || shape.k > kMaxFeatures || shape.n > kMaxFeatures) {
    return "K is " + std::to_string(shape.k) + " and N is " + std::to_string(shape.n) +
           ", both must be 1 to 2^31";
  }
  const int64_t chunk = static_cast<int64_t>(kChunkColumns);
  const int64_t k_padded = (shape.k + chunk - 1) / chunk * chunk;
  if (shape.plane_count < 1 || shape.plane_count > kMaxPlanes) {
    return "plane_columns has " + std::to_string(shape.plane_count) +
           " numbers, 1 to 4 are allowed";
  }
  int64_t limit = k_padded;
  for (std::size_t p = 0; p < shape.plane_count; ++p) {
    const int64_t columns = shape.plane_columns[p];
    if (columns < chunk || columns % chunk != 0 || columns > limit ||
        (p == 0 && columns != k_padded)) {
      return "plane_columns is " + ListOf(shape) + ", expected multiples of 64 that start with " +
             std::to_string(k_padded) + " (K = " + std::to_string(shape.k) +
             " rounded up) and do not rise";
    }
    limit = columns;
  }
  const int64_t block = shape.hadamard_block;
  if ((block != 0 && block != 64 && block != 128) || (block != 0 && k_padded % block != 0)) {
    return "hadamard_block is " + std::to_string(block) +
           ", expected 0, 64 or 128, and a divisor of the padded K = " + std::to_string(k_padded);
  }
  return "";
}

}  // namespace

std::string MakeBinaryMatMulWeight(const BinaryMatMulShape& shape, BinaryMatMulWeight* weight) {
  if (std::string problem = CheckShape(shape); !problem.empty()) return problem;
  *weight = BinaryMatMulWeight();
  weight->k = static_cast<std::size_t>(shape.k);
  weight->n = static_cast<std::size_t>(shape.n);
  weight->k_padded = static_cast<std::size_t>(shape.plane_columns[0]);
  weight->panels = CeilDivide(weight->n, kPanelRows);
  weight->hadamard_block = static_cast<std::size_t>(shape.hadamard_block);

  std::size_t chunk = 0;
  for (std::size_t planes = shape.plane_count; planes > 0; --planes) {
    const std::size_t end =
        static_cast<std::size_t>(shape.plane_columns[planes - 1]) / kChunkColumns;
    if (end == chunk) continue;
    BinaryMatMulClass& c = weight->classes[weight->class_count++];
    c.planes = planes;
    c.chunk_begin = chunk;
    c.chunk_end = end;
    c.code_offset = weight->panel_code_bytes;
    c.coefficient_slot = weight->coefficient_slots;
    for (std::size_t plane = 0; plane < planes; plane += 2) {
      BinaryMatMulStream& stream = weight->streams[weight->stream_count++];
      stream.is_pair = plane + 1 < planes;
      stream.chunk_begin = chunk;
      stream.chunk_end = end;
      stream.code_offset = c.code_offset + plane * kPlaneBlockBytes;
      stream.code_stride = planes * kPlaneBlockBytes;
      stream.coefficient_slot = c.coefficient_slot + plane;
    }
    weight->panel_code_bytes += (end - chunk) * planes * kPlaneBlockBytes;
    weight->coefficient_slots += planes;
    chunk = end;
  }
  return "";
}

void RunBinaryMatMul(const BinaryMatMulKernel& kernel, const BinaryMatMulArgs& args,
                     const Executor& executor) {
  if (args.m == 0) return;
  const BinaryMatMulWeight& weight = *args.weight;
  const bool few = args.m <= kernel.functions->few_tokens;
  const BinaryMatMulFunctions& functions = few ? *kernel.functions->few : *kernel.functions;
  const std::size_t row_bytes = functions.row_bytes(weight);
  const std::size_t pass_rows = std::min(args.m, kPassRows);
  const std::size_t row_products = weight.panels * kPanelRows * weight.k_padded;
  const bool serial = pass_rows * row_products < kSerialTasks * functions.task_products;

  const std::size_t prepare_tasks =
      serial ? 1
             : std::clamp<std::size_t>(pass_rows * weight.k_padded / kPrepareTaskChannels, 1,
                                       std::min(pass_rows, kMaxPrepareTasks));
  const std::size_t work_bytes = weight.k_padded * sizeof(float);
  const Scratch scratch(pass_rows * row_bytes + prepare_tasks * work_bytes);
  std::byte* prepared = scratch.data();
  std::byte* work = prepared + pass_rows * row_bytes;

  for (std::size_t pass = 0; pass < args.m; pass += pass_rows) {
    const std::size_t rows = std::min(pass_rows, args.m - pass);
    executor.For(prepare_tasks, [&](std::size_t task) {
      const std::size_t begin = rows * task / prepare_tasks;
      const std::size_t end = rows * (task + 1) / prepare_tasks;
      functions.prepare(args, pass + begin, pass + end, prepared + begin * row_bytes,
                        reinterpret_cast<float*>(work + task * work_bytes));
    });

    const std::size_t row_blocks = CeilDivide(rows, kTaskRows);
    const std::size_t block_products = std::min(rows, kTaskRows) * row_products;
    const std::size_t unit_panels = functions.unit_panels;
    const std::size_t units = CeilDivide(weight.panels, unit_panels);
    const std::size_t groups =
        serial ? 1 : std::clamp<std::size_t>(block_products / functions.task_products, 1, units);
    executor.For(row_blocks * groups, [&](std::size_t task) {
      const std::size_t begin = task / groups * kTaskRows;
      const std::size_t end = std::min(begin + kTaskRows, rows);
      const std::size_t group = task % groups;
      functions.multiply(args, pass + begin, pass + end, units * group / groups * unit_panels,
                         std::min(units * (group + 1) / groups * unit_panels, weight.panels),
                         prepared + begin * row_bytes);
    });
  }
}

}  // namespace bivlm
