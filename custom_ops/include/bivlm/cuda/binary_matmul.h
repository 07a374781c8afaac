// BinaryMatMul on a GPU, by the int8 rule of export/OPS.md.
//
// The launch only enqueues kernels on a stream: it waits for nothing, allocates nothing, keeps no
// state, and can be captured in a CUDA graph. Any number of threads and streams may call it, each
// with scratch memory of its own.
#ifndef BIVLM_CUDA_BINARY_MATMUL_H_
#define BIVLM_CUDA_BINARY_MATMUL_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <string>

#include "bivlm/binary_matmul.h"

namespace bivlm::cuda {

// Multiples of this are what `codes` and `scratch` must start at (cudaMalloc gives 256 bytes).
// Other tensors need the alignment of their elements.
inline constexpr std::size_t kBinaryMatMulAlignment = 16;

// Bytes of scratch memory for m tokens; 0 for m = 0.
std::size_t BinaryMatMulScratchBytes(const BinaryMatMulWeight& weight, std::size_t m);

// Computes args.y on `stream`. `args` and the weight that it points to may be gone when this
// returns; the tensors (device memory, also those of the weight) must stay until the kernels have
// run. The contents of the weight are not looked at: `order` must be a permutation.
// Returns "" or what is wrong.
std::string LaunchBinaryMatMul(const BinaryMatMulArgs& args, void* scratch,
                               std::size_t scratch_bytes, cudaStream_t stream);

}  // namespace bivlm::cuda

#endif  // BIVLM_CUDA_BINARY_MATMUL_H_
