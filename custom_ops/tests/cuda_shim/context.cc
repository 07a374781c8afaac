#include "context.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

#include "fibres.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves what the System V ABI says a function keeps, stores the stack pointer to *rdi and goes on
// at the stack pointer rsi. (swapcontext does the same with a system call each time.)
extern "C" void cuda_shim_switch(void** save, void* to);
asm(R"(
.text
.globl cuda_shim_switch
.hidden cuda_shim_switch
.type cuda_shim_switch, @function
cuda_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_shim_switch, .-cuda_shim_switch
)");
#endif

namespace cuda_shim {

void AllocateStack(Context* context) {
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    Fail("no memory for the stack of a thread");
  }
  context->stack = static_cast<std::byte*>(memory) + page;
  context->stack_bytes = kStackBytes;
}

void Prepare(Context* context, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  // What ran here before has not returned, and left its variables marked.
  __asan_unpoison_memory_region(context->stack, context->stack_bytes);
#endif
#if defined(__x86_64__)
  // What cuda_shim_switch pops: six registers and an address; the one above it aligns the stack.
  void** top =
      reinterpret_cast<void**>(static_cast<std::byte*>(context->stack) + context->stack_bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context->stack_pointer = top;
#else
  if (getcontext(&context->registers) != 0) Fail("getcontext");
  context->registers.uc_stack.ss_sp = context->stack;
  context->registers.uc_stack.ss_size = context->stack_bytes;
  context->registers.uc_link = nullptr;
  makecontext(&context->registers, entry, 0);
#endif
}

void Switch(Context* from, Context* to, bool is_last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(is_last ? nullptr : &from->fake_stack, to->stack, to->stack_bytes);
#else
  (void)is_last;
#endif
#if defined(__x86_64__)
  cuda_shim_switch(&from->stack_pointer, to->stack_pointer);
#else
  if (swapcontext(&from->registers, &to->registers) != 0) Fail("swapcontext");
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

void ContextEntered(Context* main) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (main->stack == nullptr) {
    main->stack = const_cast<void*>(bottom);
    main->stack_bytes = bytes;
  }
#else
  (void)main;
#endif
}

}  // namespace cuda_shim
