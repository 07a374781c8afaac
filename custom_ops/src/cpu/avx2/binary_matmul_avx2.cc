// BinaryMatMul with AVX2: int8 levels times int8 activations.
//
// A 32-bit lane is a row of the panel; its four bytes are four neighbouring columns. vpmaddubsw
// multiplies |level| by the activation with the level's sign; both are at most 127, so that the sum
// of two products fits 16 bits.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx2 kernels"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "int8_rows.h"

namespace bivlm {
namespace {

constexpr std::size_t kTileRows = 4;
constexpr std::size_t kHalfRows = 8;  // rows of a panel in one vector
constexpr std::size_t kPrefetchBytes = 2048;

// What a stream needs of the coefficients of half a panel, one row per 32-bit lane.
struct Codebook {
  __m256i levels;  // pairs: byte c of lane r = level of code c
  __m256 scale;    // pairs: step; single planes: alpha
};

__m256 Coefficients(const uint8_t* coefficients, std::size_t slot, std::size_t half) {
  return _mm256_cvtph_ps(_mm_loadu_si128(
      reinterpret_cast<const __m128i*>(coefficients + 2 * (slot * kPanelRows + half * kHalfRows))));
}

// round(l / step), 0 where step is 0.
__m256i Round(__m256 l, __m256 step) {
  const __m256 nonzero = _mm256_cmp_ps(step, _mm256_setzero_ps(), _CMP_NEQ_UQ);
  return _mm256_cvtps_epi32(_mm256_and_ps(nonzero, _mm256_div_ps(l, step)));
}

// The low byte of each lane, at byte `position`.
template <int position>
__m256i ByteAt(__m256i q) {
  return _mm256_slli_epi32(_mm256_and_si256(q, _mm256_set1_epi32(0xFF)), 8 * position);
}

Codebook MakeCodebook(const BinaryMatMulStream& stream, const uint8_t* coefficients,
                      std::size_t half) {
  const __m256 a = Coefficients(coefficients, stream.coefficient_slot, half);
  if (!stream.is_pair) return {_mm256_setzero_si256(), a};
  const __m256 b = Coefficients(coefficients, stream.coefficient_slot + 1, half);
  const __m256 minus_zero = _mm256_set1_ps(-0.0F);
  const __m256 l1 = _mm256_sub_ps(a, b);
  const __m256 l3 = _mm256_add_ps(a, b);
  const __m256 largest =
      _mm256_max_ps(_mm256_andnot_ps(minus_zero, l1), _mm256_andnot_ps(minus_zero, l3));
  const __m256 step = _mm256_div_ps(largest, _mm256_set1_ps(127.0F));
  const __m256i q1 = Round(l1, step);
  const __m256i q3 = Round(l3, step);
  // Levels 0 and 2 are the negatives of 3 and 1.
  const __m256i zero = _mm256_setzero_si256();
  const __m256i low = _mm256_or_si256(ByteAt<0>(_mm256_sub_epi32(zero, q3)), ByteAt<1>(q1));
  const __m256i high = _mm256_or_si256(ByteAt<2>(_mm256_sub_epi32(zero, q1)), ByteAt<3>(q3));
  return {_mm256_or_si256(low, high), step};
}

__m256i BroadcastFour(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, sizeof(four));
  return _mm256_set1_epi32(four);
}

__m256i LoadCodes(const uint8_t* codes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
}

// dots[t] = the dot products of one pair block's half with the chunk of each token.
template <std::size_t tokens>
void DotPair(const uint8_t* codes, __m256i levels, const int8_t* const (&q)[tokens],
             __m256i (&dots)[tokens]) {
  // vpshufb looks up among the 16 bytes of 4 rows: bits 2 and 3 of an index are the row.
  const __m256i row_bits = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C, 0, 0x04040404,
                                             0x08080808, 0x0C0C0C0C);
  const __m256i ones = _mm256_set1_epi16(1);
  for (std::size_t vector = 0; vector < 4; ++vector) {
    const __m256i bytes = LoadCodes(codes + 64 * vector);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256i code = _mm256_and_si256(_mm256_srli_epi16(bytes, 2 * i), _mm256_set1_epi8(3));
      const __m256i level = _mm256_shuffle_epi8(levels, _mm256_or_si256(code, row_bits));
      const __m256i magnitude = _mm256_abs_epi8(level);
#pragma GCC unroll 4
      for (std::size_t t = 0; t < tokens; ++t) {
        const __m256i x = BroadcastFour(q[t] + 16 * vector + 4 * static_cast<std::size_t>(i));
        const __m256i products = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, level));
        dots[t] = _mm256_add_epi32(dots[t], _mm256_madd_epi16(products, ones));
      }
    }
  }
}

// The same for a single block, whose levels are +-1: a whole chunk of sums fits 16 bits.
template <std::size_t tokens>
void DotSingle(const uint8_t* codes, const int8_t* const (&q)[tokens], __m256i (&dots)[tokens]) {
  const __m256i ones = _mm256_set1_epi8(1);
  __m256i sums[tokens];
#pragma GCC unroll 4
  for (std::size_t t = 0; t < tokens; ++t) sums[t] = _mm256_setzero_si256();
  for (std::size_t vector = 0; vector < 2; ++vector) {
    // A 1 bit means +1: inverted and moved to the top of its byte, it is the sign; the lowest bit
    // makes the byte nonzero.
    const __m256i inverted = _mm256_xor_si256(LoadCodes(codes + 64 * vector), _mm256_set1_epi8(-1));
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m256i sign = _mm256_or_si256(_mm256_slli_epi16(inverted, 7 - i), ones);
#pragma GCC unroll 4
      for (std::size_t t = 0; t < tokens; ++t) {
        const __m256i x = BroadcastFour(q[t] + 32 * vector + 4 * static_cast<std::size_t>(i));
        sums[t] = _mm256_add_epi16(sums[t], _mm256_maddubs_epi16(ones, _mm256_sign_epi8(x, sign)));
      }
    }
  }
#pragma GCC unroll 4
  for (std::size_t t = 0; t < tokens; ++t) {
    dots[t] = _mm256_madd_epi16(sums[t], _mm256_set1_epi16(1));
  }
}

// Adds, for each token t, one stream's part of What * v to sums[t], for half a panel.
template <std::size_t tokens, bool is_pair>
void AddStream(const BinaryMatMulStream& stream, const Codebook& codebook, const uint8_t* codes,
               const Int8Row (&rows)[tokens], __m256 (&sums)[tokens]) {
  __m256 partial[tokens];
#pragma GCC unroll 4
  for (std::size_t t = 0; t < tokens; ++t) partial[t] = _mm256_setzero_ps();
  codes += stream.code_offset;
  for (std::size_t chunk = stream.chunk_begin; chunk < stream.chunk_end; ++chunk) {
    const int8_t* q[tokens];
    __m256i dots[tokens];
#pragma GCC unroll 4
    for (std::size_t t = 0; t < tokens; ++t) {
      q[t] = rows[t].q + chunk * kChunkColumns;
      dots[t] = _mm256_setzero_si256();
    }
    if constexpr (tokens == 1) {
      for (std::size_t line = 0; line < stream.code_stride; line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + line + kPrefetchBytes), _MM_HINT_T0);
      }
    }
    if constexpr (is_pair) {
      DotPair<tokens>(codes, codebook.levels, q, dots);
    } else {
      DotSingle<tokens>(codes, q, dots);
    }
#pragma GCC unroll 4
    for (std::size_t t = 0; t < tokens; ++t) {
      partial[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[t]),
                                   _mm256_set1_ps(rows[t].scale[chunk]), partial[t]);
    }
    codes += stream.code_stride;
  }
#pragma GCC unroll 4
  for (std::size_t t = 0; t < tokens; ++t) {
    sums[t] = _mm256_fmadd_ps(partial[t], codebook.scale, sums[t]);
  }
}

struct HalfPanel {
  Codebook codebooks[kMaxPlanes + 2];
  const uint8_t* codes;
  std::size_t column;  // of y, of the first row
};

void Store(const BinaryMatMulArgs& args, std::size_t row, std::size_t column, __m256 sums) {
  const std::size_t n = args.weight->n;
  const std::size_t count = std::min(kHalfRows, n - column);
  const std::size_t offset = row * n + column;
  if (args.type == ElementType::kFloat32) {
    float values[kHalfRows];
    _mm256_storeu_ps(values, sums);
    std::memcpy(static_cast<float*>(args.y) + offset, values, count * sizeof(float));
  } else {
    uint16_t values[kHalfRows];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(values),
                     _mm256_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT));
    std::memcpy(static_cast<uint16_t*>(args.y) + offset, values, count * sizeof(uint16_t));
  }
}

template <std::size_t tokens>
void MultiplyTile(const BinaryMatMulArgs& args, const HalfPanel& panel, std::size_t row,
                  std::byte* prepared) {
  const BinaryMatMulWeight& weight = *args.weight;
  Int8Row rows[tokens];
  __m256 sums[tokens];
  for (std::size_t t = 0; t < tokens; ++t) {
    rows[t] = Int8RowAt(weight, prepared + t * Int8RowBytes(weight));
    sums[t] = _mm256_setzero_ps();
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

using TileFunction = void (*)(const BinaryMatMulArgs&, const HalfPanel&, std::size_t, std::byte*);
constexpr TileFunction kTiles[kTileRows] = {MultiplyTile<1>, MultiplyTile<2>, MultiplyTile<3>,
                                            MultiplyTile<4>};

void Multiply(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
              std::size_t panel_begin, std::size_t panel_end, const std::byte* prepared) {
  const BinaryMatMulWeight& weight = *args.weight;
  for (std::size_t half = 2 * panel_begin; half < 2 * panel_end; ++half) {
    HalfPanel panel;
    panel.column = half * kHalfRows;
    if (panel.column >= weight.n) break;
    panel.codes = weight.codes + half / 2 * weight.panel_code_bytes + half % 2 * 4 * kHalfRows;
    const uint8_t* coefficients =
        weight.coefficients + 2 * (half / 2) * weight.coefficient_slots * kPanelRows;
    for (std::size_t s = 0; s < weight.stream_count; ++s) {
      panel.codebooks[s] = MakeCodebook(weight.streams[s], coefficients, half % 2);
    }
    std::byte* rows = const_cast<std::byte*>(prepared);
    for (std::size_t row = row_begin; row < row_end; row += kTileRows) {
      kTiles[std::min(kTileRows, row_end - row) - 1](args, panel, row, rows);
      rows += kTileRows * Int8RowBytes(weight);
    }
  }
}

}  // namespace

const BinaryMatMulFunctions BinaryMatMulAvx2 = {1U << 18, Int8RowBytes, PrepareInt8Avx2, Multiply};

}  // namespace bivlm
