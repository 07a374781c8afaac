// Whether this library can run on the GPU at hand.
#ifndef BIVLM_CUDA_DEVICE_H_
#define BIVLM_CUDA_DEVICE_H_

#include <string>

namespace bivlm::cuda {

// "", or why no kernel of this library runs on the current GPU: it was built for others, its CUDA
// is newer than the driver, or CUDA does not start. Waits for nothing that runs there.
std::string DeviceProblem();

}  // namespace bivlm::cuda

#endif  // BIVLM_CUDA_DEVICE_H_
