// BinaryMatMul with AVX-512 VNNI: int8 levels times int8 activations.
//
// A 32-bit lane is a row of the panel; its four bytes are four neighbouring columns of one
// vpdpbusd. The instruction wants one unsigned side: levels are stored with 128 added (single
// blocks: 1 added), and -128 (-1) times the sum of the activations starts the accumulators.
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
  __m512i levels;  // pairs: byte c of lane r = level of code c + 128
  __m512 scale;    // pairs: step; single planes: alpha
};

__m512 Coefficients(const uint8_t* coefficients, std::size_t slot) {
  return _mm512_cvtph_ps(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(coefficients + 2 * slot * kPanelRows)));
}

Codebook MakeCodebook(const BinaryMatMulStream& stream, const uint8_t* coefficients) {
  const __m512 a = Coefficients(coefficients, stream.coefficient_slot);
  if (!stream.is_pair) return {_mm512_setzero_si512(), a};
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
  return {_mm512_or_si512(_mm512_or_si512(u0, u1), _mm512_or_si512(u2, u3)), step};
}

__m512i BroadcastFour(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, sizeof(four));
  return _mm512_set1_epi32(four);
}

// Adds, for each token t, one stream's part of What * v to sums[t].
template <std::size_t tokens, bool is_pair>
void AddStream(const BinaryMatMulStream& stream, const Codebook& codebook, const uint8_t* codes,
               const Int8Row (&rows)[tokens], __m512 (&sums)[tokens]) {
  // With few tokens, several accumulators per token hide the latency of vpdpbusd.
  constexpr std::size_t kParts = tokens == 1 ? 4 : tokens <= 3 ? 2 : 1;
  constexpr int kCodeBits = is_pair ? 2 : 1;
  constexpr int kCodesPerByte = 8 / kCodeBits;
  constexpr std::size_t kVectors = is_pair ? 4 : 2;
  constexpr int32_t kBias = is_pair ? 128 : 1;
  // vpshufb looks up among the 16 bytes of 4 rows: bits 2 and 3 of an index are the row.
  const __m512i row_bits = _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0);
  __m512 partial[tokens];
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) partial[t] = _mm512_setzero_ps();

  codes += stream.code_offset;
  for (std::size_t chunk = stream.chunk_begin; chunk < stream.chunk_end; ++chunk) {
    __m512i dots[tokens][kParts];
#pragma GCC unroll 8
    for (std::size_t t = 0; t < tokens; ++t) {
      dots[t][0] = _mm512_set1_epi32(-kBias * rows[t].sum[chunk]);
#pragma GCC unroll 4
      for (std::size_t part = 1; part < kParts; ++part) dots[t][part] = _mm512_setzero_si512();
    }
#pragma GCC unroll 4
    for (std::size_t vector = 0; vector < kVectors; ++vector) {
      const __m512i bytes = _mm512_loadu_si512(codes + 64 * vector);
      if constexpr (tokens == 1) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + 64 * vector + kPrefetchBytes),
                     _MM_HINT_T0);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kCodesPerByte; ++i) {
        __m512i levels;
        if constexpr (is_pair) {
          const __m512i shifted = _mm512_srli_epi16(bytes, static_cast<unsigned>(2 * i));
          // (shifted & 3) | row_bits
          const __m512i index =
              _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi8(3), row_bits, 0xEA);
          levels = _mm512_shuffle_epi8(codebook.levels, index);
        } else {
          const __m512i shifted = i == 0 ? _mm512_slli_epi16(bytes, 1)
                                         : _mm512_srli_epi16(bytes, static_cast<unsigned>(i - 1));
          levels = _mm512_and_si512(shifted, _mm512_set1_epi8(2));
        }
        const std::size_t column =
            chunk * kChunkColumns + 4 * (vector * kCodesPerByte + static_cast<std::size_t>(i));
        const std::size_t part = static_cast<std::size_t>(i) % kParts;
#pragma GCC unroll 8
        for (std::size_t t = 0; t < tokens; ++t) {
          dots[t][part] =
              _mm512_dpbusd_epi32(dots[t][part], levels, BroadcastFour(rows[t].q + column));
        }
      }
    }
#pragma GCC unroll 8
    for (std::size_t t = 0; t < tokens; ++t) {
      __m512i dot = dots[t][0];
#pragma GCC unroll 4
      for (std::size_t part = 1; part < kParts; ++part) {
        dot = _mm512_add_epi32(dot, dots[t][part]);
      }
      partial[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(rows[t].scale[chunk]),
                                   partial[t]);
    }
    codes += stream.code_stride;
  }
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) {
    sums[t] = _mm512_fmadd_ps(partial[t], codebook.scale, sums[t]);
  }
}

struct Panel {
  const uint8_t* codes;
  Codebook codebooks[kMaxPlanes + 2];
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
