// The threads of one CUDA block as fibres of one CPU thread.
//
// A fibre runs until it waits for others: at a barrier of the block, or at an operation of its
// warp. The next one that can run is chosen by a fixed rule, so that a run repeats exactly;
// `SetReverse` turns the order of blocks and threads round, which shows missing barriers. What
// hardware leaves undefined ends the program with a sentence: a barrier that not all threads
// reach, lanes of a warp in different operations, a stack overflow.
#ifndef BIVLM_TESTS_CUDA_SHIM_FIBRES_H_
#define BIVLM_TESTS_CUDA_SHIM_FIBRES_H_

#include <cstddef>
#include <cstdint>
#include <functional>

namespace cuda_shim {

struct Index3 {
  unsigned x, y, z;
};

}  // namespace cuda_shim

// Of the fibre that runs.
extern cuda_shim::Index3 threadIdx;
extern cuda_shim::Index3 blockIdx;
extern cuda_shim::Index3 blockDim;
extern cuda_shim::Index3 gridDim;

namespace cuda_shim {

inline constexpr unsigned kWarpLanes = 32;
inline constexpr unsigned kMaxThreads = 1024;
// Bytes that a lane can give to an operation of its warp.
inline constexpr std::size_t kLaneBytes = 64;

// The other order of everything: blocks and threads from the last to the first, a warp as far as it
// gets instead of all by turns, asynchronous copies at once instead of as late as they may be.
void SetReverse(bool reverse);

// Runs `body` once per thread of every block. `shared_bytes` is the dynamic shared memory.
void RunGrid(Index3 grid, Index3 block, std::size_t shared_bytes,
             const std::function<void()>& body);

// ---- Called by a thread ----

// The dynamic shared memory of the block: filled with 0xFF (NaN, -1) when a block starts.
void* DynamicShared();

unsigned LaneIndex();

// Waits for all threads of the block.
void SyncThreads();

// Counts the threads of the block with a true predicate; a barrier as well.
int SyncThreadsCount(bool predicate);

// One operation of the lanes in `mask`, which all give `bytes` bytes and the same `name`. Calls
// `read(lanes, context)` for each lane when all have come: lanes[i] is what lane i gave, null for
// lanes outside the mask.
using LaneData = const void* [kWarpLanes];
void WarpOperation(unsigned mask, const char* name, const void* given, std::size_t bytes,
                   void (*read)(const LaneData& lanes, void* context), void* context);

// Asynchronous copies of a thread, in groups that CommitCopies closes: made when WaitForCopies
// leaves no more than `pending` groups. None may be left when the thread ends.
void CopyLater(void* to, const void* from, std::size_t bytes);
void CommitCopies();
void WaitForCopies(std::size_t pending);

// Ends the program.
[[noreturn]] void Fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace cuda_shim

#endif  // BIVLM_TESTS_CUDA_SHIM_FIBRES_H_
