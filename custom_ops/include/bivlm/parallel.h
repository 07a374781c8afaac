// How the drivers ask for threads without knowing whose threads they are.
#ifndef BIVLM_PARALLEL_H_
#define BIVLM_PARALLEL_H_

#include <cstddef>
#include <type_traits>

namespace bivlm {

inline std::size_t CeilDivide(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

struct Executor {
  // Calls body(context, i) once for every i in [0, total), in any order, on any threads, and
  // returns when all calls have returned. Null: one after the other on this thread.
  void (*run)(void* pool, std::size_t total, void (*body)(void* context, std::size_t index),
              void* context) = nullptr;
  void* pool = nullptr;

  // body(i), which must not throw, for every i in [0, total).
  template <typename Body>
  void For(std::size_t total, Body&& body) const {
    if (run == nullptr || total < 2) {
      for (std::size_t i = 0; i < total; ++i) body(i);
      return;
    }
    run(
        pool, total,
        [](void* context, std::size_t index) {
          (*static_cast<std::remove_reference_t<Body>*>(context))(index);
        },
        &body);
  }
};

}  // namespace bivlm

#endif  // BIVLM_PARALLEL_H_
