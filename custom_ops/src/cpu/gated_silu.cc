// The division of GatedSiLU into tasks.
#include "bivlm/gated_silu.h"

#include <algorithm>

namespace bivlm {
namespace {

// Features of the output that are worth a task.
constexpr std::size_t kTaskFeatures = 16384;

}  // namespace

void RunGatedSilu(const GatedSiluKernel& kernel, const GatedSiluArgs& args,
                  const Executor& executor) {
  if (args.width == 0) return;
  const std::size_t task_rows = std::max<std::size_t>(kTaskFeatures / args.width, 1);
  executor.For((args.rows + task_rows - 1) / task_rows, [&](std::size_t task) {
    const std::size_t begin = task * task_rows;
    kernel.functions->rows(args, begin, std::min(begin + task_rows, args.rows));
  });
}

}  // namespace bivlm
