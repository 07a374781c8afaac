// What the decode and the prefill kernel of BinaryMatMul with AVX-512 share: levels in int8.
//
// A 32-bit lane is a row of the panel; its four bytes are four neighbouring columns of one
// vpdpbusd. The instruction wants one unsigned side: levels are stored with 128 added (single
// blocks: 1 added), and -128 (-1) times the sum of the activations starts the accumulators.
//
// Everything here is in an anonymous namespace for the reason given in bivlm/float16.h.
#ifndef BIVLM_CPU_AVX512_BINARY_MATMUL_AVX512_H_
#define BIVLM_CPU_AVX512_BINARY_MATMUL_AVX512_H_

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || \
    !defined(__AVX512VL__) || !defined(__AVX512VNNI__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx512 kernels"
#endif

#include <immintrin.h>

#include <cstring>

#include "int8_rows.h"

namespace bivlm {

// Both are BinaryMatMulFunctions::multiply. Decode: unpacks the weight for every 8 rows. Prefill:
// once for 128 rows, through memory.
void DecodeAvx512(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                  std::size_t panel_begin, std::size_t panel_end, const std::byte* prepared);
void PrefillAvx512(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                   std::size_t panel_begin, std::size_t panel_end, const std::byte* prepared);

namespace {

constexpr std::size_t kMaxStreams = kMaxPlanes + 2;

// Decode fetches codes this far before they are multiplied.
constexpr std::size_t kPrefetchBytes = 8 << 10;
constexpr std::size_t kNearBytes = 1 << 10;

// Pages are touched this far ahead: their addresses would otherwise be translated when the codes
// are fetched, which costs a sixth of the bandwidth where pages have 4 KiB.
constexpr std::size_t kTouchBytes = 64 << 10;

// Fetches `bytes` at `next`, kPrefetchBytes ahead of the multiplication: straight into L1, or
// (HasSmallL1) into L2, and into L1 when they are near. 4096 x 4096 cold on Zen 4: 237 and 159 us.
template <bool through_l2, std::size_t bytes>
void PrefetchLines(const uint8_t* next) {
  const auto* far = reinterpret_cast<const char*>(next);
  const char* near = far - (kPrefetchBytes - kNearBytes);
#pragma GCC unroll 8
  for (std::size_t line = 0; line < bytes; line += 64) {
    if constexpr (through_l2) {
      _mm_prefetch(far + line, _MM_HINT_T1);
      _mm_prefetch(near + line, _MM_HINT_T0);
    } else {
      _mm_prefetch(far + line, _MM_HINT_T0);
    }
  }
}

// What a stream needs of a panel's coefficients, one row per 32-bit lane.
struct Codebook {
  __m512i by_row;   // pairs: byte 4 r + c of a quarter = level of code c in row r, + 128
  __m512i by_code;  // pairs: the same at byte 4 c + r
  __m512 scale;     // pairs: step; single planes: alpha
};

struct Panel {
  Codebook codebooks[kMaxStreams];
  const uint8_t* codes;
  std::size_t column;  // of y
};

inline __m512 Coefficients(const uint8_t* coefficients, std::size_t slot) {
  return _mm512_cvtph_ps(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(coefficients + 2 * slot * kPanelRows)));
}

inline Codebook MakeCodebook(const BinaryMatMulStream& stream, const uint8_t* coefficients) {
  const __m512 a = Coefficients(coefficients, stream.coefficient_slot);
  if (!stream.is_pair) return {_mm512_setzero_si512(), _mm512_setzero_si512(), a};
  const __m512 b = Coefficients(coefficients, stream.coefficient_slot + 1);
  const __m512 l1 = _mm512_sub_ps(a, b);
  const __m512 l3 = _mm512_add_ps(a, b);
  const __m512 largest = _mm512_max_ps(_mm512_abs_ps(l1), _mm512_abs_ps(l3));
  const __m512 step = _mm512_div_ps(largest, _mm512_set1_ps(127.0F));
  const __mmask16 nonzero = _mm512_cmp_ps_mask(step, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  const __m512i q1 = _mm512_maskz_cvtps_epi32(nonzero, _mm512_div_ps(l1, step));
  const __m512i q3 = _mm512_maskz_cvtps_epi32(nonzero, _mm512_div_ps(l3, step));
  // Levels 0 and 2 are the negatives of 3 and 1.
  const __m512i bias = _mm512_set1_epi32(128);
  const __m512i u0 = _mm512_sub_epi32(bias, q3);
  const __m512i u1 = _mm512_slli_epi32(_mm512_add_epi32(bias, q1), 8);
  const __m512i u2 = _mm512_slli_epi32(_mm512_sub_epi32(bias, q1), 16);
  const __m512i u3 = _mm512_slli_epi32(_mm512_add_epi32(bias, q3), 24);
  const __m512i by_row = _mm512_or_si512(_mm512_or_si512(u0, u1), _mm512_or_si512(u2, u3));
  const __m512i transpose = _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400);
  return {by_row, _mm512_shuffle_epi8(by_row, transpose), step};
}

inline void OpenPanel(const BinaryMatMulWeight& weight, std::size_t index, Panel* panel) {
  panel->codes = weight.codes + index * weight.panel_code_bytes;
  panel->column = index * kPanelRows;
  const uint8_t* coefficients =
      weight.coefficients + 2 * index * weight.coefficient_slots * kPanelRows;
#pragma GCC unroll 1
  for (std::size_t s = 0; s < weight.stream_count; ++s) {
    panel->codebooks[s] = MakeCodebook(weight.streams[s], coefficients);
  }
}

inline __m512i BroadcastFour(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, sizeof(four));
  return _mm512_set1_epi32(four);
}

// Holds the compiler to the order of the source: pinned values are made one after the other.
inline __m512i Pin(__m512i value) {
  __asm__ volatile("" : "+v"(value));
  return value;
}

// (bits & mask) | rows
inline __m512i Index(__m512i bits, int8_t mask, __m512i rows) {
  return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi8(mask), rows, 0xEA);
}

// The levels, + 128, of columns 4 i + (0..3) of a vector of a pair block; low holds its codes, high
// the same shifted right by 4 bits.
//
// vpshufb looks up among the 16 bytes of 4 rows. Codes at bits 0 and 1 of a byte leave bits 2 and 3
// to the row; codes at bits 2 and 3 are looked up in the other table and need no shift.
inline __m512i PairIndex(__m512i low, __m512i high, std::size_t i) {
  const __m512i row_high = _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0);
  const __m512i row_low = _mm512_set4_epi32(0x03030303, 0x02020202, 0x01010101, 0);
  const __m512i bits = i < 2 ? low : high;
  return i % 2 == 0 ? Index(bits, 0x03, row_high) : Index(bits, 0x0C, row_low);
}

inline __m512i LookUp(const Codebook& codebook, __m512i index, std::size_t i) {
  return _mm512_shuffle_epi8(i % 2 == 0 ? codebook.by_row : codebook.by_code, index);
}

inline __m512i PairLevels(const Codebook& codebook, __m512i low, __m512i high, std::size_t i) {
  return LookUp(codebook, PairIndex(low, high, i), i);
}

// The levels, + 1, of columns 4 i + (0..3) of a vector of a single block: its bits at bit 1.
inline __m512i SingleLevels(__m512i bytes, unsigned i) {
  const __m512i shifted = i == 0 ? _mm512_slli_epi16(bytes, 1) : _mm512_srli_epi16(bytes, i - 1);
  return _mm512_and_si512(shifted, _mm512_set1_epi8(2));
}

inline void Store(const BinaryMatMulArgs& args, std::size_t row, std::size_t column, __m512 sums) {
  const std::size_t n = args.weight->n;
  const std::size_t count = kPanelRows < n - column ? kPanelRows : n - column;
  const __mmask16 mask = static_cast<__mmask16>((1U << count) - 1U);
  const std::size_t offset = row * n + column;
  if (args.type == ElementType::kFloat32) {
    _mm512_mask_storeu_ps(static_cast<float*>(args.y) + offset, mask, sums);
  } else {
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(args.y) + offset, mask,
                             _mm512_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT));
  }
}

}  // namespace
}  // namespace bivlm

#endif  // BIVLM_CPU_AVX512_BINARY_MATMUL_AVX512_H_
