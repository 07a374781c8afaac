// BinaryMatMulFunctions::multiply for 256-bit vectors: everything but the dot products, which an
// instruction set gives as a type `Isa` (avx2 and avxvnni).
//
// For up to kDecodeTokens rows, codes are looked up as they are multiplied. For more, a block of a
// panel's codes is unpacked to bytes in the L1 cache and multiplied by one tile of kTileTokens
// tokens after the other. Both add the same floats in the same order.
//
// Isa has, `half` being 8 rows of a panel:
//   struct Codebook                  what a stream needs of the coefficients of a half; has `scale`
//   Codebook MakeCodebook(stream, coefficients of the panel, half)
//   void Dot<is_pair, tokens>(codes of the half, codebook, q, q_sums, dots)
//       dots[t] = the products of one block with the chunk q[t], whose sum is q_sums[t]
//   kUnpackedBytes<is_pair>          bytes of one block when unpacked
//   void Unpack<is_pair>(codes of the panel, codebooks of its halves, unpacked)
//   void DotUnpacked<is_pair, tokens>(unpacked, codebooks, tile, chunk)
//       calls AddDots for both halves
//
// Isa belongs to the anonymous namespace of its file: then so do the instances of the templates
// here. The other functions are static for the reason given in bivlm/float16.h.
#ifndef BIVLM_CPU_AVX2_MULTIPLY_INT8_H_
#define BIVLM_CPU_AVX2_MULTIPLY_INT8_H_

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "int8_rows.h"

namespace bivlm {

inline constexpr std::size_t kHalfRows = 8;  // rows of a panel in one vector
inline constexpr std::size_t kHalves = kPanelRows / kHalfRows;

inline constexpr std::size_t kDecodeTokens = 4;  // tokens that share a look-up
inline constexpr std::size_t kTileTokens = 6;    // 12 accumulators
inline constexpr std::size_t kGroupRows = 64;    // rows that share an unpacked block
inline constexpr std::size_t kBlockBytes = 16384;
inline constexpr std::size_t kPrefetchBytes = 2048;

static inline __m256 Coefficients(const uint8_t* coefficients, std::size_t slot, std::size_t half) {
  return _mm256_cvtph_ps(_mm_loadu_si128(
      reinterpret_cast<const __m128i*>(coefficients + 2 * (slot * kPanelRows + half * kHalfRows))));
}

// round(l / step), 0 where step is 0.
static inline __m256i RoundLevel(__m256 l, __m256 step) {
  const __m256 nonzero = _mm256_cmp_ps(step, _mm256_setzero_ps(), _CMP_NEQ_UQ);
  return _mm256_cvtps_epi32(_mm256_and_ps(nonzero, _mm256_div_ps(l, step)));
}

// The levels of codes 1 and 3 of a pair block, one row per 32-bit lane. Those of codes 2 and 0 are
// their negatives.
struct PairLevels {
  __m256i q1;
  __m256i q3;
  __m256 step;
};

static inline PairLevels MakePairLevels(const BinaryMatMulStream& stream,
                                        const uint8_t* coefficients, std::size_t half) {
  const __m256 a = Coefficients(coefficients, stream.coefficient_slot, half);
  const __m256 b = Coefficients(coefficients, stream.coefficient_slot + 1, half);
  const __m256 minus_zero = _mm256_set1_ps(-0.0F);
  const __m256 l1 = _mm256_sub_ps(a, b);
  const __m256 l3 = _mm256_add_ps(a, b);
  const __m256 largest =
      _mm256_max_ps(_mm256_andnot_ps(minus_zero, l1), _mm256_andnot_ps(minus_zero, l3));
  const __m256 step = _mm256_div_ps(largest, _mm256_set1_ps(127.0F));
  return {RoundLevel(l1, step), RoundLevel(l3, step), step};
}

// Four neighbouring channels in every 32-bit lane.
static inline __m256i BroadcastFour(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, sizeof(four));
  return _mm256_set1_epi32(four);
}

static inline __m256i Load(const uint8_t* bytes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
}

static inline void Save(uint8_t* bytes, __m256i v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), v);
}

// Has `v` in a register here: without it, g++ 12 computes the products of a whole tile before it
// adds them, and spills the accumulators (avx2, m = 256: 112 instead of 200 GFLOP/s on a Zen 5).
static inline void KeepInRegister(__m256i& v) { asm volatile("" : "+x"(v)); }

// Rows of activations with the float sums of their outputs so far.
template <std::size_t tokens>
struct Tile {
  Int8Row rows[tokens];
  float* partial;  // (tokens, 16)
};

static inline void AddDots(__m256i dots, float scale, float* partial) {
  const __m256 sum = _mm256_loadu_ps(partial);
  _mm256_storeu_ps(partial, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), _mm256_set1_ps(scale), sum));
}

static inline void StoreHalf(const BinaryMatMulArgs& args, std::size_t row, std::size_t column,
                             __m256 sums) {
  const std::size_t n = args.weight->n;
  if (column >= n) return;
  const std::size_t count = std::min(kHalfRows, n - column);
  const std::size_t offset = row * n + column;
  if (args.type == ElementType::kFloat32) {
    float* y = static_cast<float*>(args.y) + offset;
    if (count == kHalfRows) {
      _mm256_storeu_ps(y, sums);
      return;
    }
    float values[kHalfRows];
    _mm256_storeu_ps(values, sums);
    std::memcpy(y, values, count * sizeof(float));
  } else {
    uint16_t values[kHalfRows];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(values),
                     _mm256_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT));
    std::memcpy(static_cast<uint16_t*>(args.y) + offset, values, count * sizeof(uint16_t));
  }
}

template <typename Isa>
struct Panel {
  typename Isa::Codebook codebooks[kMaxPlanes + 2][kHalves];
  const uint8_t* codes;
  std::size_t column;  // of y, of the first row
};

// Adds, for each token t, one stream's part of What * v to sums[t].
template <typename Isa, bool is_pair, std::size_t tokens>
void AddStream(const BinaryMatMulStream& stream, const typename Isa::Codebook (&codebooks)[kHalves],
               const uint8_t* codes, const Int8Row (&rows)[tokens],
               __m256 (&sums)[tokens][kHalves]) {
  __m256 partial[tokens][kHalves];
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) {
    partial[t][0] = _mm256_setzero_ps();
    partial[t][1] = _mm256_setzero_ps();
  }
  codes += stream.code_offset;
  for (std::size_t chunk = stream.chunk_begin; chunk < stream.chunk_end; ++chunk) {
    const int8_t* q[tokens];
    int32_t q_sums[tokens];
#pragma GCC unroll 8
    for (std::size_t t = 0; t < tokens; ++t) {
      q[t] = rows[t].q + chunk * kChunkColumns;
      q_sums[t] = rows[t].sum[chunk];
    }
    // All blocks of the chunk: the other stream of a class with 3 or 4 planes comes right after.
    for (std::size_t line = 0; line < stream.code_stride; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + line + kPrefetchBytes), _MM_HINT_T0);
    }
#pragma GCC unroll 2
    for (std::size_t half = 0; half < kHalves; ++half) {
      __m256i dots[tokens];
      Isa::template Dot<is_pair, tokens>(codes + 4 * kHalfRows * half, codebooks[half], q, q_sums,
                                         dots);
#pragma GCC unroll 8
      for (std::size_t t = 0; t < tokens; ++t) {
        partial[t][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[t]),
                                           _mm256_set1_ps(rows[t].scale[chunk]), partial[t][half]);
      }
    }
    codes += stream.code_stride;
  }
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) {
    for (std::size_t half = 0; half < kHalves; ++half) {
      sums[t][half] = _mm256_fmadd_ps(partial[t][half], codebooks[half].scale, sums[t][half]);
    }
  }
}

template <typename Isa, std::size_t tokens>
void MultiplyFew(const BinaryMatMulArgs& args, const Panel<Isa>& panel, std::size_t row,
                 std::byte* prepared) {
  const BinaryMatMulWeight& weight = *args.weight;
  Int8Row rows[tokens];
  __m256 sums[tokens][kHalves];
  for (std::size_t t = 0; t < tokens; ++t) {
    rows[t] = Int8RowAt(weight, prepared + t * Int8RowBytes(weight));
    sums[t][0] = _mm256_setzero_ps();
    sums[t][1] = _mm256_setzero_ps();
  }
  for (std::size_t s = 0; s < weight.stream_count; ++s) {
    const BinaryMatMulStream& stream = weight.streams[s];
    if (stream.is_pair) {
      AddStream<Isa, true>(stream, panel.codebooks[s], panel.codes, rows, sums);
    } else {
      AddStream<Isa, false>(stream, panel.codebooks[s], panel.codes, rows, sums);
    }
  }
  for (std::size_t t = 0; t < tokens; ++t) {
    for (std::size_t half = 0; half < kHalves; ++half) {
      StoreHalf(args, row + t, panel.column + half * kHalfRows, sums[t][half]);
    }
  }
}

// 1 to kDecodeTokens rows.
template <typename Isa>
void MultiplyFewRows(const BinaryMatMulArgs& args, const Panel<Isa>& panel, std::size_t row,
                     std::size_t rows, std::byte* prepared) {
  constexpr auto kFew = std::array{MultiplyFew<Isa, 1>, MultiplyFew<Isa, 2>, MultiplyFew<Isa, 3>,
                                   MultiplyFew<Isa, 4>};
  static_assert(kFew.size() == kDecodeTokens);
  kFew[rows - 1](args, panel, row, prepared);
}

// Adds an unpacked block of `chunks` chunks, from `chunk` on, to the partial sums of a tile.
template <typename Isa, bool is_pair, std::size_t tokens>
void AddBlock(const typename Isa::Codebook (&codebooks)[kHalves], const uint8_t* unpacked,
              std::size_t chunk, std::size_t chunks, const BinaryMatMulWeight& weight,
              std::byte* prepared, float* partial) {
  Tile<tokens> tile;
  tile.partial = partial;
  for (std::size_t t = 0; t < tokens; ++t) {
    tile.rows[t] = Int8RowAt(weight, prepared + t * Int8RowBytes(weight));
  }
  for (std::size_t i = 0; i < chunks; ++i) {
    Isa::template DotUnpacked<is_pair, tokens>(unpacked, codebooks, tile, chunk + i);
    unpacked += Isa::template kUnpackedBytes<is_pair>;
  }
}

// partial[r] = one stream's sum for each of `rows` rows and the 16 rows of a panel.
template <typename Isa, bool is_pair>
void MultiplyStream(const BinaryMatMulWeight& weight, const BinaryMatMulStream& stream,
                    const typename Isa::Codebook (&codebooks)[kHalves], const uint8_t* codes,
                    std::size_t rows, std::byte* prepared, float* partial) {
  constexpr auto kTiles =
      std::array{AddBlock<Isa, is_pair, 1>, AddBlock<Isa, is_pair, 2>, AddBlock<Isa, is_pair, 3>,
                 AddBlock<Isa, is_pair, 4>, AddBlock<Isa, is_pair, 5>, AddBlock<Isa, is_pair, 6>};
  static_assert(kTiles.size() == kTileTokens);
  constexpr std::size_t kChunkBytes = Isa::template kUnpackedBytes<is_pair>;
  constexpr std::size_t kBlockChunks = kBlockBytes / kChunkBytes;
  const std::size_t tiles = (rows + kTileTokens - 1) / kTileTokens;  // of equal size, or one less
  alignas(64) uint8_t unpacked[kBlockBytes];
  std::fill(partial, partial + rows * kPanelRows, 0.0F);
  codes += stream.code_offset;
  for (std::size_t begin = stream.chunk_begin; begin < stream.chunk_end; begin += kBlockChunks) {
    const std::size_t chunks = std::min(kBlockChunks, stream.chunk_end - begin);
    for (std::size_t i = 0; i < chunks; ++i) {
      // What the next block needs, or the next stream or panel.
      for (std::size_t line = 0; line < stream.code_stride; line += 64) {
        const uint8_t* next = codes + kBlockChunks * stream.code_stride + line;
        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
      }
      Isa::template Unpack<is_pair>(codes, codebooks, unpacked + i * kChunkBytes);
      codes += stream.code_stride;
    }
    for (std::size_t tile = 0; tile < tiles; ++tile) {
      const std::size_t row = rows * tile / tiles;
      const std::size_t tokens = rows * (tile + 1) / tiles - row;
      kTiles[tokens - 1](codebooks, unpacked, begin, chunks, weight,
                         prepared + row * Int8RowBytes(weight), partial + row * kPanelRows);
    }
  }
}

// At most kGroupRows rows.
template <typename Isa>
void MultiplyGroup(const BinaryMatMulArgs& args, const Panel<Isa>& panel, std::size_t row_begin,
                   std::size_t rows, std::byte* prepared) {
  const BinaryMatMulWeight& weight = *args.weight;
  alignas(64) float partial[kGroupRows * kPanelRows];
  alignas(64) float sums[kGroupRows * kPanelRows];
  std::fill(sums, sums + rows * kPanelRows, 0.0F);
  for (std::size_t s = 0; s < weight.stream_count; ++s) {
    const auto multiply =
        weight.streams[s].is_pair ? MultiplyStream<Isa, true> : MultiplyStream<Isa, false>;
    multiply(weight, weight.streams[s], panel.codebooks[s], panel.codes, rows, prepared, partial);
    for (std::size_t i = 0; i < rows * kPanelRows; i += kHalfRows) {
      const __m256 scale = panel.codebooks[s][i / kHalfRows % kHalves].scale;
      _mm256_store_ps(
          sums + i, _mm256_fmadd_ps(_mm256_load_ps(partial + i), scale, _mm256_load_ps(sums + i)));
    }
  }
  for (std::size_t i = 0; i < rows * kPanelRows; i += kHalfRows) {
    StoreHalf(args, row_begin + i / kPanelRows, panel.column + i % kPanelRows,
              _mm256_load_ps(sums + i));
  }
}

template <typename Isa>
void MultiplyInt8(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                  std::size_t panel_begin, std::size_t panel_end, const std::byte* prepared) {
  const BinaryMatMulWeight& weight = *args.weight;
  std::byte* rows = const_cast<std::byte*>(prepared);
  for (std::size_t p = panel_begin; p < panel_end; ++p) {
    Panel<Isa> panel;
    panel.column = p * kPanelRows;
    panel.codes = weight.codes + p * weight.panel_code_bytes;
    const uint8_t* coefficients =
        weight.coefficients + 2 * p * weight.coefficient_slots * kPanelRows;
    for (std::size_t s = 0; s < weight.stream_count; ++s) {
      for (std::size_t half = 0; half < kHalves; ++half) {
        panel.codebooks[s][half] = Isa::MakeCodebook(weight.streams[s], coefficients, half);
      }
    }
    if (row_end - row_begin <= kDecodeTokens) {
      MultiplyFewRows<Isa>(args, panel, row_begin, row_end - row_begin, rows);
      continue;
    }
    for (std::size_t row = row_begin; row < row_end; row += kGroupRows) {
      MultiplyGroup<Isa>(args, panel, row, std::min(kGroupRows, row_end - row),
                         rows + (row - row_begin) * Int8RowBytes(weight));
    }
  }
}

}  // namespace bivlm

#endif  // BIVLM_CPU_AVX2_MULTIPLY_INT8_H_
