// The division of GroupQueryAttention into tasks, and the KV cache.
#include "bivlm/attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "scratch.h"

namespace bivlm {
namespace {

// Queries of a task: enough that the transposition of the keys is lost among their products.
constexpr std::size_t kTaskRows = 192;

// Products of queries with keys below which the work stays on one thread.
constexpr std::size_t kSerialProducts = 400000;

// Tasks that run at the same time: bounds the work space.
constexpr std::size_t kMaxWorkers = 64;

// Appends the new keys or values of one head, behind the old ones. `write(token, to)` writes those
// of a token of the batch.
template <typename Write>
void Append(const AttentionArgs& args, std::size_t row, std::size_t head, const void* past,
            void* present, const Write& write) {
  const std::size_t token_bytes = args.d * ElementBytes(args.cache_type);
  const std::size_t old_tokens = args.past(row);
  const std::size_t index = row * args.kv_heads + head;
  std::byte* target = static_cast<std::byte*>(present) + index * args.capacity * token_bytes;
  if (past != present) {
    if (old_tokens > 0) {
      std::memcpy(target,
                  static_cast<const std::byte*>(past) + index * args.past_capacity * token_bytes,
                  old_tokens * token_bytes);
    }
    const std::size_t tokens = old_tokens + args.s;
    std::memset(target + tokens * token_bytes, 0, (args.capacity - tokens) * token_bytes);
  }
  for (std::size_t token = 0; token < args.s; ++token) {
    write(row * args.s + token, target + (old_tokens + token) * token_bytes);
  }
}

}  // namespace

void RunAttention(const AttentionKernel& kernel, const AttentionArgs& args,
                  const Executor& executor) {
  if (args.b == 0) return;
  const std::size_t heads = args.b * args.kv_heads;
  std::size_t products = 0;
  for (std::size_t row = 0; row < args.b; ++row) {
    products += 2 * args.heads * args.s * (args.past(row) + args.s) * args.d;
  }
  const Executor used = products < kSerialProducts ? Executor() : executor;
  const std::size_t task_tokens =
      std::clamp<std::size_t>(kTaskRows / args.group(), 1, std::max<std::size_t>(args.s, 1));
  const std::size_t blocks = (args.s + task_tokens - 1) / task_tokens;
  const std::size_t tasks = heads * blocks;
  const std::size_t workers = used.run == nullptr ? 1 : std::min(tasks, kMaxWorkers);
  const std::size_t work_floats = kernel.functions->work_floats(args, task_tokens);
  const Scratch scratch(workers * work_floats * sizeof(float));
  auto* work = reinterpret_cast<float*>(scratch.data());

  auto append = [&](std::size_t head) {
    const std::size_t row = head / args.kv_heads;
    const std::size_t kv_head = head % args.kv_heads;
    Append(args, row, kv_head, args.past_key, args.present_key,
           [&](std::size_t token, std::byte* key) {
             kernel.functions->rotate_key(args, token, kv_head, key);
           });
    Append(args, row, kv_head, args.past_value, args.present_value,
           [&](std::size_t token, std::byte* value) {
             kernel.functions->write_value(args, token, kv_head, value);
           });
  };
  const auto attend = [&](std::size_t index, float* memory) {
    // Last tokens first: they have the most keys.
    const std::size_t block = blocks - 1 - index / heads;
    AttentionTask task;
    task.row = index % heads / args.kv_heads;
    task.kv_head = index % args.kv_heads;
    task.token_begin = block * task_tokens;
    task.token_end = std::min(task.token_begin + task_tokens, args.s);
    kernel.functions->attend(args, task, memory);
  };
  const bool appends_first = blocks != 1;
  if (appends_first) used.For(heads, append);
  std::atomic<std::size_t> next{0};
  used.For(workers, [&](std::size_t worker) {
    for (std::size_t index = next++; index < tasks; index = next++) {
      if (!appends_first) append(index);
      attend(index, work + worker * work_floats);
    }
  });
}

}  // namespace bivlm
