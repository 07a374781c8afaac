// Switching between stacks, with the annotations that AddressSanitizer needs.
#ifndef BIVLM_TESTS_CUDA_SHIM_CONTEXT_H_
#define BIVLM_TESTS_CUDA_SHIM_CONTEXT_H_

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_shim {

// A stack and where on it execution stopped. The default is the stack that called first.
struct Context {
  void* stack = nullptr;  // lowest byte
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // of AddressSanitizer
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers = {};
#endif
};

inline constexpr std::size_t kStackBytes = std::size_t{256} << 10;

// Gives `context` a stack, which stays with it; a write below it ends the program.
void AllocateStack(Context* context);

// The next switch to `context` calls `entry`, which must call ContextEntered first and never
// return.
void Prepare(Context* context, void (*entry)());

// Goes on in `to`; returns when another switch comes back to `from`. `is_last`: nothing will.
void Switch(Context* from, Context* to, bool is_last);

// Tells AddressSanitizer that a new stack runs; `main` gets the bounds of the stack before, if it
// has none yet.
void ContextEntered(Context* main);

}  // namespace cuda_shim

#endif  // BIVLM_TESTS_CUDA_SHIM_CONTEXT_H_
