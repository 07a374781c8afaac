// Device functions of the shim: barriers, operations of a warp, and intrinsics as the CUDA C++
// programming guide and the PTX manual define them.
#ifndef BIVLM_TESTS_CUDA_SHIM_DEVICE_FUNCTIONS_H_
#define BIVLM_TESTS_CUDA_SHIM_DEVICE_FUNCTIONS_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fibres.h"

// ---- Barriers and votes ----

inline void __syncthreads() { cuda_shim::SyncThreads(); }
inline int __syncthreads_count(int predicate) {
  return cuda_shim::SyncThreadsCount(predicate != 0);
}
inline int __syncthreads_or(int predicate) {
  return cuda_shim::SyncThreadsCount(predicate != 0) > 0;
}
inline int __syncthreads_and(int predicate) {
  return cuda_shim::SyncThreadsCount(predicate == 0) == 0;
}

namespace cuda_shim {

// Calls `read(lanes)` with what the lanes of `mask` gave.
template <typename T, typename Read>
void Exchange(unsigned mask, const char* name, const T& given, Read read) {
  static_assert(std::is_trivially_copyable_v<T>);
  WarpOperation(
      mask, name, &given, sizeof(given),
      [](const LaneData& lanes, void* context) { (*static_cast<Read*>(context))(lanes); }, &read);
}

template <typename T>
T ValueOf(const void* lane) {
  T value;
  std::memcpy(&value, lane, sizeof(value));
  return value;
}

// What the lane `source(own lane)` gave.
template <typename T, typename Source>
T Shuffle(unsigned mask, const char* name, T value, int width, Source source) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) Fail("%s: width %d", name, width);
  T result = value;
  Exchange(mask, name, value, [&](const LaneData& lanes) {
    const int from = source(static_cast<int>(LaneIndex()));
    if (lanes[from] == nullptr) Fail("%s reads lane %d, which is not in its mask", name, from);
    result = ValueOf<T>(lanes[from]);
  });
  return result;
}

template <typename T, typename Combine>
T Reduce(unsigned mask, const char* name, T value, Combine combine) {
  bool is_first = true;
  T result = value;
  Exchange(mask, name, value, [&](const LaneData& lanes) {
    for (const void* lane : lanes) {
      if (lane == nullptr) continue;
      result = is_first ? ValueOf<T>(lane) : combine(result, ValueOf<T>(lane));
      is_first = false;
    }
  });
  return result;
}

}  // namespace cuda_shim

inline void __syncwarp(unsigned mask = 0xFFFFFFFFU) {
  cuda_shim::Exchange(mask, "__syncwarp", 0, [](const cuda_shim::LaneData&) {});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return cuda_shim::Shuffle(mask, "__shfl_sync", value, width,
                            [=](int own) { return (own & ~(width - 1)) | (lane & (width - 1)); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return cuda_shim::Shuffle(mask, "__shfl_xor_sync", value, width, [=](int own) {
    const int from = own ^ lane_mask;
    return from < (own & ~(width - 1)) + width ? from : own;
  });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_shim::Shuffle(mask, "__shfl_up_sync", value, width, [=](int own) {
    const int from = own - static_cast<int>(delta);
    return from >= (own & ~(width - 1)) ? from : own;
  });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_shim::Shuffle(mask, "__shfl_down_sync", value, width, [=](int own) {
    const int from = own + static_cast<int>(delta);
    return from < (own & ~(width - 1)) + width ? from : own;
  });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned result = 0;
  cuda_shim::Exchange(mask, "__ballot_sync", predicate, [&](const cuda_shim::LaneData& lanes) {
    for (unsigned lane = 0; lane < cuda_shim::kWarpLanes; ++lane) {
      if (lanes[lane] != nullptr && cuda_shim::ValueOf<int>(lanes[lane]) != 0) {
        result |= 1U << lane;
      }
    }
  });
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// ---- Integers ----

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) {
    const int product = static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
    c = static_cast<int>(static_cast<unsigned>(c) + static_cast<unsigned>(product));
  }
  return c;
}

// PRMT: byte i of the result is byte (s >> 4 i & 7) of b:a, or its sign in all bits where
// s >> 4 i & 8.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned selector = s >> 4 * i & 15U;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (selector & 7U)) & 0xFFU;
    if (selector > 7) byte = (byte & 0x80U) != 0 ? 0xFFU : 0;
    result |= byte << 8 * i;
  }
  return result;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) {
  return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value));
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31U));
}

// ---- Floating point ----

namespace cuda_shim {
template <typename To, typename From>
To Bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
}  // namespace cuda_shim

inline float __int_as_float(int bits) { return cuda_shim::Bits<float>(bits); }
inline float __uint_as_float(unsigned bits) { return cuda_shim::Bits<float>(bits); }
inline int __float_as_int(float value) { return cuda_shim::Bits<int>(value); }
inline unsigned __float_as_uint(float value) { return cuda_shim::Bits<unsigned>(value); }
inline long long __double_as_longlong(double value) { return cuda_shim::Bits<long long>(value); }
inline double __longlong_as_double(long long bits) { return cuda_shim::Bits<double>(bits); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __double2float_rn(double value) { return static_cast<float>(value); }
// To the nearest, ties to even; what does not fit saturates, NaN gives 0.
inline int __float2int_rn(float value) {
  if (std::isnan(value)) return 0;
  const double rounded = std::nearbyint(static_cast<double>(value));
  if (rounded >= 2147483647.0) return 2147483647;
  return rounded <= -2147483648.0 ? -2147483647 - 1 : static_cast<int>(rounded);
}

// ---- Memory ----

template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Fibres do not run at the same time: what is not interrupted is atomic.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = static_cast<T>(old + value);
  return old;
}
template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = old < value ? value : old;
  return old;
}
template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  *address = value < old ? value : old;
  return old;
}
template <typename T>
T atomicOr(T* address, T value) {
  const T old = *address;
  *address = static_cast<T>(old | value);
  return old;
}
template <typename T>
T atomicExch(T* address, T value) {
  const T old = *address;
  *address = value;
  return old;
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

#endif  // BIVLM_TESTS_CUDA_SHIM_DEVICE_FUNCTIONS_H_
