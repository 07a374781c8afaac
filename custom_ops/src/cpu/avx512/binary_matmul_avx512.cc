// BinaryMatMul with AVX-512 VNNI: int8 levels times int8 activations.
//
// A 32-bit lane is a row of the panel; its four bytes are four neighbouring columns of one
// vpdpbusd. The instruction wants one unsigned side: levels are stored with 128 added (single
// blocks: 1 added), and -128 (-1) times the sum of the activations starts the accumulators.
//
// With one token the vector ports are the limit, and each shift that is saved counts: hence the two
// tables of a codebook, and the eight accumulators of single blocks.
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || \
    !defined(__AVX512VL__) || !defined(__AVX512VNNI__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx512 kernels"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "int8_rows.h"

namespace bivlm {
namespace {

constexpr std::size_t kTileRows = 8;
constexpr std::size_t kPrefetchBytes = 2048;

// What a stream needs of a panel's coefficients, one row per 32-bit lane.
struct Codebook {
  __m512i by_row;   // pairs: byte 4 r + c of a quarter = level of code c in row r, + 128
  __m512i by_code;  // pairs: the same at byte 4 c + r
  __m512 scale;     // pairs: step; single planes: alpha
};

__m512 Coefficients(const uint8_t* coefficients, std::size_t slot) {
  return _mm512_cvtph_ps(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(coefficients + 2 * slot * kPanelRows)));
}

Codebook MakeCodebook(const BinaryMatMulStream& stream, const uint8_t* coefficients) {
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

__m512i BroadcastFour(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, sizeof(four));
  return _mm512_set1_epi32(four);
}

// (bits & mask) | rows
__m512i Index(__m512i bits, int8_t mask, __m512i rows) {
  return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi8(mask), rows, 0xEA);
}

// dots[t] = the dot products of a pair block with the chunk of each token, q[t].
template <std::size_t tokens>
void DotPair(const uint8_t* codes, const Codebook& codebook, const int8_t* const (&q)[tokens],
             const int32_t (&q_sums)[tokens], __m512i (&dots)[tokens]) {
  // With few tokens, several accumulators per token hide the latency of vpdpbusd.
  constexpr std::size_t kParts = tokens == 1 ? 4 : tokens <= 3 ? 2 : 1;
  // vpshufb looks up among the 16 bytes of 4 rows. Codes at bits 0 and 1 of a byte leave bits 2 and
  // 3 to the row; codes at bits 2 and 3 are looked up in the other table and need no shift.
  const __m512i row_high = _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0);
  const __m512i row_low = _mm512_set4_epi32(0x03030303, 0x02020202, 0x01010101, 0);
  __m512i parts[tokens][kParts];
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) {
    parts[t][0] = _mm512_set1_epi32(-128 * q_sums[t]);
#pragma GCC unroll 4
    for (std::size_t part = 1; part < kParts; ++part) parts[t][part] = _mm512_setzero_si512();
  }
#pragma GCC unroll 4
  for (std::size_t vector = 0; vector < 4; ++vector) {
    const __m512i low = _mm512_loadu_si512(codes + 64 * vector);
    const __m512i high = _mm512_srli_epi16(low, 4);
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i) {
      const __m512i bits = i < 2 ? low : high;
      const __m512i levels =
          i % 2 == 0 ? _mm512_shuffle_epi8(codebook.by_row, Index(bits, 0x03, row_high))
                     : _mm512_shuffle_epi8(codebook.by_code, Index(bits, 0x0C, row_low));
#pragma GCC unroll 8
      for (std::size_t t = 0; t < tokens; ++t) {
        parts[t][i % kParts] = _mm512_dpbusd_epi32(parts[t][i % kParts], levels,
                                                   BroadcastFour(q[t] + 16 * vector + 4 * i));
      }
    }
  }
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) {
    dots[t] = parts[t][0];
#pragma GCC unroll 4
    for (std::size_t part = 1; part < kParts; ++part) {
      dots[t] = _mm512_add_epi32(dots[t], parts[t][part]);
    }
  }
}

// The same for a single block: bits moved to bit 1 are levels + 1.
template <std::size_t tokens>
void DotSingle(const uint8_t* codes, const int8_t* const (&q)[tokens],
               const int32_t (&q_sums)[tokens], __m512i (&dots)[tokens]) {
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) dots[t] = _mm512_set1_epi32(-q_sums[t]);
#pragma GCC unroll 2
  for (std::size_t vector = 0; vector < 2; ++vector) {
    const __m512i bytes = _mm512_loadu_si512(codes + 64 * vector);
#pragma GCC unroll 8
    for (unsigned i = 0; i < 8; ++i) {
      const __m512i shifted =
          i == 0 ? _mm512_slli_epi16(bytes, 1) : _mm512_srli_epi16(bytes, i - 1);
      const __m512i levels = _mm512_and_si512(shifted, _mm512_set1_epi8(2));
#pragma GCC unroll 8
      for (std::size_t t = 0; t < tokens; ++t) {
        dots[t] = _mm512_dpbusd_epi32(dots[t], levels, BroadcastFour(q[t] + 32 * vector + 4 * i));
      }
    }
  }
}

// One token: bit i stays where it is and counts 2^i times in an accumulator of its own.
template <>
void DotSingle<1>(const uint8_t* codes, const int8_t* const (&q)[1], const int32_t (&q_sums)[1],
                  __m512i (&dots)[1]) {
  __m512i parts[8];
#pragma GCC unroll 2
  for (std::size_t vector = 0; vector < 2; ++vector) {
    const __m512i bytes = _mm512_loadu_si512(codes + 64 * vector);
#pragma GCC unroll 8
    for (std::size_t i = 0; i < 8; ++i) {
      const __m512i bit = _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(1U << i)));
      parts[i] = _mm512_dpbusd_epi32(vector == 0 ? _mm512_setzero_si512() : parts[i], bit,
                                     BroadcastFour(q[0] + 32 * vector + 4 * i));
    }
  }
  __m512i total = parts[0];
#pragma GCC unroll 8
  for (unsigned i = 1; i < 8; ++i) {
    total = _mm512_add_epi32(total, _mm512_srai_epi32(parts[i], i));
  }
  dots[0] = _mm512_sub_epi32(_mm512_slli_epi32(total, 1), _mm512_set1_epi32(q_sums[0]));
}

// Adds, for each token t, one stream's part of What * v to sums[t].
template <std::size_t tokens, bool is_pair>
void AddStream(const BinaryMatMulStream& stream, const Codebook& codebook, const uint8_t* codes,
               const Int8Row (&rows)[tokens], __m512 (&sums)[tokens]) {
  __m512 partial[tokens];
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) partial[t] = _mm512_setzero_ps();
  codes += stream.code_offset;
  for (std::size_t chunk = stream.chunk_begin; chunk < stream.chunk_end; ++chunk) {
    const int8_t* q[tokens];
    int32_t q_sums[tokens];
    __m512i dots[tokens];
#pragma GCC unroll 8
    for (std::size_t t = 0; t < tokens; ++t) {
      q[t] = rows[t].q + chunk * kChunkColumns;
      q_sums[t] = rows[t].sum[chunk];
    }
    if constexpr (tokens == 1) {
#pragma GCC unroll 4
      for (std::size_t line = 0; line < (is_pair ? 256 : 128); line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + line + kPrefetchBytes), _MM_HINT_T0);
      }
    }
    if constexpr (is_pair) {
      DotPair<tokens>(codes, codebook, q, q_sums, dots);
    } else {
      DotSingle<tokens>(codes, q, q_sums, dots);
    }
#pragma GCC unroll 8
    for (std::size_t t = 0; t < tokens; ++t) {
      partial[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t]),
                                   _mm512_set1_ps(rows[t].scale[chunk]), partial[t]);
    }
    codes += stream.code_stride;
  }
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) {
    sums[t] = _mm512_fmadd_ps(partial[t], codebook.scale, sums[t]);
  }
}

struct Panel {
  Codebook codebooks[kMaxPlanes + 2];
  const uint8_t* codes;
  std::size_t column;  // of y
};

void Store(const BinaryMatMulArgs& args, std::size_t row, std::size_t column, __m512 sums) {
  const std::size_t n = args.weight->n;
  const std::size_t count = std::min(kPanelRows, n - column);
  const __mmask16 mask = static_cast<__mmask16>((1U << count) - 1U);
  const std::size_t offset = row * n + column;
  if (args.type == ElementType::kFloat32) {
    _mm512_mask_storeu_ps(static_cast<float*>(args.y) + offset, mask, sums);
  } else {
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(args.y) + offset, mask,
                             _mm512_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT));
  }
}

template <std::size_t tokens>
void MultiplyTile(const BinaryMatMulArgs& args, const Panel& panel, std::size_t row,
                  std::byte* prepared) {
  const BinaryMatMulWeight& weight = *args.weight;
  Int8Row rows[tokens];
  __m512 sums[tokens];
  for (std::size_t t = 0; t < tokens; ++t) {
    rows[t] = Int8RowAt(weight, prepared + t * Int8RowBytes(weight));
    sums[t] = _mm512_setzero_ps();
  }
  for (std::size_t s = 0; s < weight.stream_count; ++s) {
    if (weight.streams[s].is_pair) {
      AddStream<tokens, true>(weight.streams[s], panel.codebooks[s], panel.codes, rows, sums);
    } else {
      AddStream<tokens, false>(weight.streams[s], panel.codebooks[s], panel.codes, rows, sums);
    }
  }
  for (std::size_t t = 0; t < tokens; ++t) Store(args, row + t, panel.column, sums[t]);
}

using TileFunction = void (*)(const BinaryMatMulArgs&, const Panel&, std::size_t, std::byte*);
constexpr TileFunction kTiles[kTileRows] = {MultiplyTile<1>, MultiplyTile<2>, MultiplyTile<3>,
                                            MultiplyTile<4>, MultiplyTile<5>, MultiplyTile<6>,
                                            MultiplyTile<7>, MultiplyTile<8>};

void Multiply(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
              std::size_t panel_begin, std::size_t panel_end, const std::byte* prepared) {
  const BinaryMatMulWeight& weight = *args.weight;
  for (std::size_t p = panel_begin; p < panel_end; ++p) {
    Panel panel;
    panel.codes = weight.codes + p * weight.panel_code_bytes;
    panel.column = p * kPanelRows;
    const uint8_t* coefficients =
        weight.coefficients + 2 * p * weight.coefficient_slots * kPanelRows;
    for (std::size_t s = 0; s < weight.stream_count; ++s) {
      panel.codebooks[s] = MakeCodebook(weight.streams[s], coefficients);
    }
    std::byte* rows = const_cast<std::byte*>(prepared);
    for (std::size_t row = row_begin; row < row_end; row += kTileRows) {
      kTiles[std::min(kTileRows, row_end - row) - 1](args, panel, row, rows);
      rows += kTileRows * Int8RowBytes(weight);
    }
  }
}

}  // namespace

const BinaryMatMulFunctions BinaryMatMulAvx512 = {1U << 19, Int8RowBytes, PrepareInt8Avx512,
                                                  Multiply};

}  // namespace bivlm
