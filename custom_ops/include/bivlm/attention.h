// GroupQueryAttention: causal attention of grouped heads behind a KV cache. export/OPS.md says what
// the operator computes.
//
// Letters: b rows of the batch, s new tokens per row, d features of a head (even), p positions of
// the past. `heads / kv_heads` query heads, a group, share the keys and values of one kv head. A
// *row* of a task is one query: one token and one head of the group.
#ifndef BIVLM_ATTENTION_H_
#define BIVLM_ATTENTION_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "bivlm/cpu_features.h"
#include "bivlm/float16.h"
#include "bivlm/parallel.h"

namespace bivlm {

struct AttentionArgs {
  ElementType type = ElementType::kFloat32;        // of qkv, cos, sin and output
  ElementType cache_type = ElementType::kFloat32;  // of past and present: `type`, or float16
  std::size_t b = 0;
  std::size_t s = 0;
  std::size_t heads = 0;
  std::size_t kv_heads = 0;
  std::size_t d = 0;
  std::size_t past_capacity = 0;        // p
  std::size_t capacity = 0;             // positions of present
  float scale = 0.0F;                   // factor on the scores
  const int32_t* last_index = nullptr;  // (b): of the last token in present, >= s - 1
  const void* qkv = nullptr;            // (b, s, (heads + 2 * kv_heads) * d): query, key, value
  const void* cos = nullptr;            // (b, s, d / 2): rotations of the queries and keys
  const void* sin = nullptr;            // (b, s, d / 2)
  const void* past_key = nullptr;       // (b, kv_heads, past_capacity, d)
  const void* past_value = nullptr;     // (b, kv_heads, past_capacity, d)
  void* output = nullptr;               // (b, s, heads * d), overwritten
  void* present_key = nullptr;          // (b, kv_heads, capacity, d); may be past_key
  void* present_value = nullptr;        // (b, kv_heads, capacity, d); may be past_value

  std::size_t group() const { return heads / kv_heads; }
  // Elements of qkv before head `head` of token `token`; the heads of keys stand behind those of
  // queries, and those of values behind both.
  std::size_t state(std::size_t token, std::size_t head) const {
    return (token * (heads + 2 * kv_heads) + head) * d;
  }
  // Tokens of a row before this run.
  std::size_t past(std::size_t row) const {
    return static_cast<std::size_t>(last_index[row]) + 1 - s;
  }
};

// The queries of one kv head and some tokens of a row of the batch.
struct AttentionTask {
  std::size_t row = 0;
  std::size_t kv_head = 0;
  std::size_t token_begin = 0;
  std::size_t token_end = 0;
};

// One instruction set's implementation.
struct AttentionFunctions {
  // Writes the key of head `kv_head` and token `token`, 0 .. b * s - 1, rotated (d).
  void (*rotate_key)(const AttentionArgs& args, std::size_t token, std::size_t kv_head, void* key);
  // Writes the value of the same (d).
  void (*write_value)(const AttentionArgs& args, std::size_t token, std::size_t kv_head,
                      void* value);
  // Floats of work space for a task of `tokens` tokens: a multiple of 16.
  std::size_t (*work_floats)(const AttentionArgs& args, std::size_t tokens);
  // Writes the task's part of the output. The keys and values are those of present, new ones
  // included. `work` starts at a multiple of 64 bytes.
  void (*attend)(const AttentionArgs& args, const AttentionTask& task, float* work);
};

struct AttentionKernel {
  const char* name;
  IsaSet isa;  // what it needs
  const AttentionFunctions* functions;
};

#define BIVLM_ATTENTION_KERNEL(needs, symbol, label) extern const AttentionFunctions symbol;
#include "bivlm/attention_kernels.inc"
#undef BIVLM_ATTENTION_KERNEL

struct AttentionKernelList {
  const AttentionKernel* first;
  std::size_t count;
  const AttentionKernel* begin() const { return first; }
  const AttentionKernel* end() const { return first + count; }
};

// All kernels of this build, best first.
AttentionKernelList AttentionKernels();

// As SelectBinaryMatMul.
const AttentionKernel* SelectAttention(IsaSet supported, std::string_view forced);
std::string AvailableAttentionNames(IsaSet supported);

// Writes present, copying past only where it is other memory, then the output. Positions of present
// behind the last token stay as they are in place and become 0 elsewhere. Throws std::bad_alloc.
void RunAttention(const AttentionKernel& kernel, const AttentionArgs& args,
                  const Executor& executor);

}  // namespace bivlm

#endif  // BIVLM_ATTENTION_H_
