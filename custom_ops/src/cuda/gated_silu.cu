// GatedSiLU: a thread per output, rows side by side.
#include <cstdint>

#include "bivlm/cuda/gated_silu.h"
#include "cuda/activation.h"
#include "cuda/launch.h"

namespace bivlm::cuda {
namespace {

constexpr unsigned kThreads = 256;

// Block i computes part i % blocks_per_row of row i / blocks_per_row.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    GatedSilu(const Element* x, Element* y, uint64_t width, unsigned blocks_per_row) {
  const uint64_t row = blockIdx.x / blocks_per_row;
  const uint64_t i = uint64_t{blockIdx.x % blocks_per_row} * kThreads + threadIdx.x;
  if (i >= width) return;
  const float gate = ToFloat(x[row * 2 * width + i]);
  const float up = ToFloat(x[row * 2 * width + width + i]);
  // e^-gate beyond float32 is infinite, and the quotient the 0 that silu has there.
  StoreAs(y + row * width + i, __fdiv_rn(gate, 1.0F + expf(-gate)) * up);
}

std::size_t BlocksPerRow(const GatedSiluArgs& args) {
  return args.width / kThreads + (args.width % kThreads != 0 ? 1 : 0);
}

template <typename Element>
cudaError_t LaunchAs(const GatedSiluArgs& args, cudaStream_t stream) {
  const std::size_t blocks_per_row = BlocksPerRow(args);
  return Launch(GatedSilu<Element>, dim3(static_cast<unsigned>(args.rows * blocks_per_row)),
                dim3(kThreads), 0, stream, static_cast<const Element*>(args.x),
                static_cast<Element*>(args.y), uint64_t{args.width},
                static_cast<unsigned>(blocks_per_row));
}

}  // namespace

std::string LaunchGatedSilu(const GatedSiluArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.width == 0) return "";
  const std::size_t most = kMaxBlocks / BlocksPerRow(args);
  if (args.rows > most) {
    return "X has " + std::to_string(args.rows) + " rows of " + std::to_string(2 * args.width) +
           ", at most " + std::to_string(most) + " of this size fit one launch; divide them";
  }
  const cudaError_t error = args.type == ElementType::kFloat32 ? LaunchAs<float>(args, stream)
                                                               : LaunchAs<uint16_t>(args, stream);
  if (error == cudaSuccess) return "";
  return "GatedSiLU of " + std::to_string(args.rows) + " x " + std::to_string(args.width) +
         " could not be launched: " + cudaGetErrorString(error);
}

}  // namespace bivlm::cuda
