// GatedSiLU on a GPU, within the bound of export/OPS.md.
#ifndef BIVLM_CUDA_GATED_SILU_H_
#define BIVLM_CUDA_GATED_SILU_H_

#include <cuda_runtime.h>

#include <string>

#include "bivlm/gated_silu.h"

namespace bivlm::cuda {

// Computes args.y, device memory as args.x is, on `stream`: enqueues a kernel, which a CUDA graph
// can capture, and returns. Returns "" or what is wrong.
std::string LaunchGatedSilu(const GatedSiluArgs& args, cudaStream_t stream);

}  // namespace bivlm::cuda

#endif  // BIVLM_CUDA_GATED_SILU_H_
