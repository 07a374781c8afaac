// Time and memory of one model in this process: the measurements of bivlm-bench.
#ifndef BIVLM_TOOLS_BENCH_H_
#define BIVLM_TOOLS_BENCH_H_

#include <string>

#include "arguments.h"
#include "ort_runtime.h"

namespace bivlm::device {

// The JSON of bivlm-bench for one model, on one line. Throws Error.
std::string Bench(const OrtRuntime& runtime, const Arguments& arguments);

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_BENCH_H_
