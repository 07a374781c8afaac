#include "fibres.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "context.h"

cuda_shim::Index3 threadIdx;
cuda_shim::Index3 blockIdx;
cuda_shim::Index3 blockDim;
cuda_shim::Index3 gridDim;

namespace cuda_shim {
namespace {

// One call of WarpOperation while lanes of it wait or read.
struct Operation {
  const char* name = nullptr;
  unsigned mask = 0;  // 0: free
  unsigned arrived = 0;
  unsigned read = 0;
  std::size_t bytes = 0;
  alignas(16) std::byte data[kWarpLanes][kLaneBytes];
};

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
};

struct Fibre {
  Context context;
  Index3 index = {};
  unsigned number = 0;  // in the block
  const char* waits_for = nullptr;
  bool is_done = false;
  std::deque<std::vector<Copy>> copies = {{}};  // groups; the last one is open
};

struct Block {
  Context main;
  std::vector<std::unique_ptr<Fibre>> fibres;  // kept for the next block
  std::deque<Fibre*> ready;
  Fibre* running = nullptr;
  const std::function<void()>* body = nullptr;
  unsigned threads = 0;
  unsigned live = 0;
  // SyncThreads
  std::vector<Fibre*> at_barrier;
  int true_predicates = 0;
  int barrier_result = 0;
  std::vector<std::deque<Operation>> operations;  // per warp; a deque keeps addresses
  std::vector<std::byte> shared;
  bool reverse = false;
};

Block block;

unsigned FullMask(unsigned warp) {
  const unsigned lanes = block.threads - warp * kWarpLanes;
  return lanes >= kWarpLanes ? ~0U : (1U << lanes) - 1U;
}

void Resume(Fibre* fibre) {
  fibre->waits_for = nullptr;
  if (block.reverse) {
    block.ready.push_front(fibre);
  } else {
    block.ready.push_back(fibre);
  }
}

[[noreturn]] void FailDeadlock() {
  std::string text;
  unsigned listed = 0;
  for (unsigned i = 0; i < block.threads && listed < 8; ++i) {
    const Fibre& fibre = *block.fibres[i];
    if (fibre.is_done) continue;
    text += "\n  thread " + std::to_string(i) + " waits for " + fibre.waits_for;
    ++listed;
  }
  Fail("divergent block (%u, %u, %u): %u of %u threads wait for threads that do not come%s",
       blockIdx.x, blockIdx.y, blockIdx.z, block.live, block.threads, text.c_str());
}

// Leaves the running fibre for the next one that can run.
void SwitchToNext(bool is_last) {
  Fibre* from = block.running;
  if (block.ready.empty()) {
    if (block.live > 0) FailDeadlock();
    Switch(&from->context, &block.main, is_last);
    return;
  }
  Fibre* to = block.ready.front();
  block.ready.pop_front();
  block.running = to;
  threadIdx = to->index;
  Switch(&from->context, &to->context, is_last);
}

void WaitFor(const char* what) {
  block.running->waits_for = what;
  SwitchToNext(false);
}

void FibreMain() {
  ContextEntered(&block.main);
  (*block.body)();
  for (const std::vector<Copy>& group : block.running->copies) {
    if (!group.empty()) Fail("thread %u ends without the copies it began", block.running->number);
  }
  block.running->is_done = true;
  --block.live;
  SwitchToNext(true);
}

void RunBlock() {
  block.ready.clear();
  block.at_barrier.clear();
  block.true_predicates = 0;
  block.operations.assign((block.threads + kWarpLanes - 1) / kWarpLanes, {});
  block.live = block.threads;
  std::fill(block.shared.begin(), block.shared.end(), std::byte{0xFF});
  while (block.fibres.size() < block.threads) {
    block.fibres.push_back(std::make_unique<Fibre>());
    AllocateStack(&block.fibres.back()->context);
  }
  for (unsigned i = 0; i < block.threads; ++i) {
    const unsigned number = block.reverse ? block.threads - 1 - i : i;
    Fibre& fibre = *block.fibres[number];
    fibre.number = number;
    fibre.index = {number % blockDim.x, number / blockDim.x % blockDim.y,
                   number / blockDim.x / blockDim.y};
    fibre.is_done = false;
    fibre.copies = {{}};
    Prepare(&fibre.context, FibreMain);
    Resume(&fibre);
  }
  Fibre* first = block.ready.front();
  block.ready.pop_front();
  block.running = first;
  threadIdx = first->index;
  Switch(&block.main, &first->context, false);
}

// The operation with this mask that still waits for the lane, or a new one.
Operation* Join(std::deque<Operation>* operations, unsigned mask, unsigned lane) {
  Operation* unused = nullptr;
  for (Operation& operation : *operations) {
    if (operation.mask == 0) {
      unused = &operation;
    } else if (operation.mask == mask && (operation.arrived >> lane & 1U) == 0) {
      return &operation;
    }
  }
  return unused != nullptr ? unused : &operations->emplace_back();
}

}  // namespace

void Fail(const char* format, ...) {
  std::fprintf(stderr, "CUDA shim: ");
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::abort();
}

void SetReverse(bool reverse) { block.reverse = reverse; }

void RunGrid(Index3 grid, Index3 size, std::size_t shared_bytes,
             const std::function<void()>& body) {
  block.body = &body;
  block.threads = size.x * size.y * size.z;
  block.shared.assign(shared_bytes, std::byte{0});
  blockDim = size;
  gridDim = grid;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t number = block.reverse ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(number % grid.x),
                static_cast<unsigned>(number / grid.x % grid.y),
                static_cast<unsigned>(number / grid.x / grid.y)};
    RunBlock();
  }
}

void* DynamicShared() { return block.shared.data(); }

unsigned LaneIndex() { return block.running->number % kWarpLanes; }

void SyncThreads() { SyncThreadsCount(false); }

int SyncThreadsCount(bool predicate) {
  block.true_predicates += predicate ? 1 : 0;
  if (block.at_barrier.size() + 1 < block.threads) {
    block.at_barrier.push_back(block.running);
    WaitFor("__syncthreads");
    return block.barrier_result;
  }
  block.barrier_result = block.true_predicates;
  block.true_predicates = 0;
  for (Fibre* fibre : block.at_barrier) Resume(fibre);
  block.at_barrier.clear();
  return block.barrier_result;
}

void CopyLater(void* to, const void* from, std::size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 ||
      reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    Fail("a copy of %zu bytes from %p to %p, which are not aligned to it", bytes, from, to);
  }
  if (block.reverse) {
    std::memcpy(to, from, bytes);
  } else {
    block.running->copies.back().push_back({to, from, bytes});
  }
}

void CommitCopies() { block.running->copies.emplace_back(); }

void WaitForCopies(std::size_t pending) {
  std::deque<std::vector<Copy>>& groups = block.running->copies;
  for (; groups.size() > pending + 1; groups.pop_front()) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

void WarpOperation(unsigned mask, const char* name, const void* given, std::size_t bytes,
                   void (*read)(const LaneData& lanes, void* context), void* context) {
  const unsigned warp = block.running->number / kWarpLanes;
  const unsigned lane = LaneIndex();
  if ((mask >> lane & 1U) == 0 || (mask & ~FullMask(warp)) != 0) {
    Fail("thread %u calls %s with the mask %08x, which lacks it or has lanes that do not exist",
         block.running->number, name, mask);
  }
  if (bytes > kLaneBytes) Fail("%s gives %zu bytes, at most %zu fit", name, bytes, kLaneBytes);
  Operation* operation = Join(&block.operations[warp], mask, lane);
  if (operation->mask == 0) {
    operation->name = name;
    operation->mask = mask;
    operation->bytes = bytes;
  } else if (std::strcmp(operation->name, name) != 0 || operation->bytes != bytes) {
    Fail("thread %u calls %s while other lanes of its warp wait in %s", block.running->number, name,
         operation->name);
  }
  std::memcpy(operation->data[lane], given, bytes);
  operation->arrived |= 1U << lane;
  if (operation->arrived != mask) {
    WaitFor(name);
  } else {
    for (unsigned other = 0; other < kWarpLanes; ++other) {
      if (other == lane || (mask >> other & 1U) == 0) continue;
      Resume(block.fibres[warp * kWarpLanes + other].get());
    }
  }
  LaneData lanes;
  for (unsigned other = 0; other < kWarpLanes; ++other) {
    lanes[other] = (mask >> other & 1U) != 0 ? operation->data[other] : nullptr;
  }
  read(lanes, context);
  operation->read |= 1U << lane;
  if (operation->read == mask) operation->mask = operation->arrived = operation->read = 0;
}

}  // namespace cuda_shim
