// BinaryMatMulFunctions::multiply for int8 rows: everything but the dot products, which an
// instruction set gives as a type `Isa` (avx2, avxvnni, neon, dotprod and i8mm).
//
// For up to kDecodeTokens rows, codes are looked up as they are multiplied. For more, a block of a
// panel's codes is unpacked to bytes in the L1 cache and multiplied by one tile of kTileTokens
// tokens after the other. Both add the same floats in the same order.
//
// Isa has, a *part* being the rows of a panel that fit one vector:
//   Vec, kLanes, Ints, ..            a struct `Vectors` (vectors_<isa>.h)
//   kDecodeTokens, kTileTokens       tokens that share a look-up, an unpacked vector
//   struct Codebook                  what a stream needs of the coefficients of a part; has `scale`
//   Codebook MakeCodebook(stream, coefficients of the panel, part)
//   void Dot<is_pair, tokens>(codes of the part, codebook, q, q_sums, dots)
//       dots[t] = the products of one block with the chunk q[t], whose sum is q_sums[t]
//   kUnpackedBytes<is_pair>          bytes of one block when unpacked
//   void Unpack<is_pair>(codes of the panel, codebooks of its parts, unpacked)
//   void DotUnpacked<is_pair, tokens>(unpacked, codebooks, tile, chunk)
//       calls AddDots for all parts
//
// Isa belongs to the anonymous namespace of its file: then so do the instances of the templates
// here.
#ifndef BIVLM_CPU_MULTIPLY_INT8_H_
#define BIVLM_CPU_MULTIPLY_INT8_H_

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "int8_rows.h"

namespace bivlm {

inline constexpr std::size_t kGroupRows = 64;  // rows that share an unpacked block
inline constexpr std::size_t kBlockBytes = 16384;
inline constexpr std::size_t kPrefetchBytes = 2048;

// Parts of a panel.
template <typename Isa>
inline constexpr std::size_t kParts = kPanelRows / Isa::kLanes;

template <typename Isa>
using Codebooks = typename Isa::Codebook[kParts<Isa>];

template <typename Isa>
typename Isa::Vec LoadFloats(const float* floats) {
  typename Isa::Vec v;
  std::memcpy(&v, floats, sizeof(v));
  return v;
}

template <typename Isa>
typename Isa::Vec Coefficients(const uint8_t* coefficients, std::size_t slot, std::size_t part) {
  uint16_t halves[Isa::kLanes];
  std::memcpy(halves, coefficients + 2 * (slot * kPanelRows + part * Isa::kLanes), sizeof(halves));
  return Isa::Widen(halves);
}

// The levels of codes 1 and 3 of a pair block, one row per 32-bit lane. Those of codes 2 and 0 are
// their negatives.
template <typename Isa>
struct PairLevels {
  typename Isa::Ints q1;
  typename Isa::Ints q3;
  typename Isa::Vec step;

  PairLevels(const BinaryMatMulStream& stream, const uint8_t* coefficients, std::size_t part) {
    const Vec a = Coefficients<Isa>(coefficients, stream.coefficient_slot, part);
    const Vec b = Coefficients<Isa>(coefficients, stream.coefficient_slot + 1, part);
    const Vec l1 = a - b;
    const Vec l3 = a + b;
    step = Max(Max(l1, -l1), Max(l3, -l3)) / 127.0F;
    q1 = Rounded(l1);
    q3 = Rounded(l3);
  }

 private:
  using Vec = typename Isa::Vec;
  static Vec Max(Vec a, Vec b) { return a > b ? a : b; }
  // round(l / step), 0 where step is 0.
  typename Isa::Ints Rounded(Vec l) const { return Isa::Round(step != 0.0F ? l / step : Vec{}); }
};

// Rows of activations with the float sums of their outputs so far.
template <std::size_t tokens>
struct Tile {
  Int8Row rows[tokens];
  float* partial;  // (tokens, 16)
};

template <typename Isa>
void AddDots(typename Isa::Ints dots, float scale, float* partial) {
  const typename Isa::Vec sum =
      Isa::MultiplyAdd(Isa::ToFloats(dots), scale, LoadFloats<Isa>(partial));
  std::memcpy(partial, &sum, sizeof(sum));
}

template <typename Isa>
void StorePart(const BinaryMatMulArgs& args, std::size_t row, std::size_t column,
               typename Isa::Vec sums) {
  const std::size_t n = args.weight->n;
  if (column >= n) return;
  const std::size_t count = std::min(Isa::kLanes, n - column);
  const std::size_t offset = row * n + column;
  float values[Isa::kLanes];
  std::memcpy(values, &sums, sizeof(values));
  if (args.type == ElementType::kFloat16) {
    Isa::ToHalves(values, count, static_cast<uint16_t*>(args.y) + offset);
  } else if (count == Isa::kLanes) {
    std::memcpy(static_cast<float*>(args.y) + offset, values, sizeof(values));
  } else {
    std::memcpy(static_cast<float*>(args.y) + offset, values, count * sizeof(float));
  }
}

template <typename Isa>
struct Panel {
  Codebooks<Isa> codebooks[kMaxPlanes + 2];
  const uint8_t* codes;
  std::size_t column;  // of y, of the first row
};

// Adds, for each token t, one stream's part of What * v to sums[t].
template <typename Isa, bool is_pair, std::size_t tokens>
void AddStream(const BinaryMatMulStream& stream, const Codebooks<Isa>& codebooks,
               const uint8_t* codes, const Int8Row (&rows)[tokens],
               typename Isa::Vec (&sums)[tokens][kParts<Isa>]) {
  typename Isa::Vec partial[tokens][kParts<Isa>];
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
    for (std::size_t part = 0; part < kParts<Isa>; ++part) partial[t][part] = typename Isa::Vec{};
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
      __builtin_prefetch(codes + line + kPrefetchBytes);
    }
#pragma GCC unroll 4
    for (std::size_t part = 0; part < kParts<Isa>; ++part) {
      typename Isa::Ints dots[tokens];
      Isa::template Dot<is_pair, tokens>(codes + 4 * Isa::kLanes * part, codebooks[part], q, q_sums,
                                         dots);
#pragma GCC unroll 8
      for (std::size_t t = 0; t < tokens; ++t) {
        partial[t][part] =
            Isa::MultiplyAdd(Isa::ToFloats(dots[t]), rows[t].scale[chunk], partial[t][part]);
      }
    }
    codes += stream.code_stride;
  }
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
    for (std::size_t part = 0; part < kParts<Isa>; ++part) {
      sums[t][part] = Isa::MultiplyAdd(partial[t][part], codebooks[part].scale, sums[t][part]);
    }
  }
}

template <typename Isa, std::size_t tokens>
void MultiplyFew(const BinaryMatMulArgs& args, const Panel<Isa>& panel, std::size_t row,
                 std::byte* prepared) {
  const BinaryMatMulWeight& weight = *args.weight;
  Int8Row rows[tokens];
  typename Isa::Vec sums[tokens][kParts<Isa>];
  for (std::size_t t = 0; t < tokens; ++t) {
    rows[t] = Int8RowAt(weight, prepared + t * Int8RowBytes(weight));
    for (std::size_t part = 0; part < kParts<Isa>; ++part) sums[t][part] = typename Isa::Vec{};
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
    for (std::size_t part = 0; part < kParts<Isa>; ++part) {
      StorePart<Isa>(args, row + t, panel.column + part * Isa::kLanes, sums[t][part]);
    }
  }
}

// MultiplyFew for 1, 2, .. tokens.
template <typename Isa, std::size_t... before>
constexpr auto FewOf(std::index_sequence<before...> /*sizes*/) {
  return std::array{MultiplyFew<Isa, before + 1>...};
}

// Adds an unpacked block of `chunks` chunks, from `chunk` on, to the partial sums of a tile.
template <typename Isa, bool is_pair, std::size_t tokens>
void AddBlock(const Codebooks<Isa>& codebooks, const uint8_t* unpacked, std::size_t chunk,
              std::size_t chunks, const BinaryMatMulWeight& weight, std::byte* prepared,
              float* partial) {
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

// AddBlock for tiles of 1, 2, .. tokens.
template <typename Isa, bool is_pair, std::size_t... before>
constexpr auto TilesOf(std::index_sequence<before...> /*sizes*/) {
  return std::array{AddBlock<Isa, is_pair, before + 1>...};
}

// partial[r] = one stream's sum for each of `rows` rows and the 16 rows of a panel.
template <typename Isa, bool is_pair>
void MultiplyStream(const BinaryMatMulWeight& weight, const BinaryMatMulStream& stream,
                    const Codebooks<Isa>& codebooks, const uint8_t* codes, std::size_t rows,
                    std::byte* prepared, float* partial) {
  constexpr auto kTiles = TilesOf<Isa, is_pair>(std::make_index_sequence<Isa::kTileTokens>());
  constexpr std::size_t kChunkBytes = Isa::template kUnpackedBytes<is_pair>;
  constexpr std::size_t kBlockChunks = kBlockBytes / kChunkBytes;
  // Of equal size, or one less.
  const std::size_t tiles = (rows + Isa::kTileTokens - 1) / Isa::kTileTokens;
  alignas(64) uint8_t unpacked[kBlockBytes];
  std::fill(partial, partial + rows * kPanelRows, 0.0F);
  codes += stream.code_offset;
  for (std::size_t begin = stream.chunk_begin; begin < stream.chunk_end; begin += kBlockChunks) {
    const std::size_t chunks = std::min(kBlockChunks, stream.chunk_end - begin);
    for (std::size_t i = 0; i < chunks; ++i) {
      // What the next block needs, or the next stream or panel.
      for (std::size_t line = 0; line < stream.code_stride; line += 64) {
        __builtin_prefetch(codes + kBlockChunks * stream.code_stride + line);
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
    for (std::size_t i = 0; i < rows * kPanelRows; i += Isa::kLanes) {
      const typename Isa::Vec sum = Isa::MultiplyAdd(
          LoadFloats<Isa>(partial + i), panel.codebooks[s][i / Isa::kLanes % kParts<Isa>].scale,
          LoadFloats<Isa>(sums + i));
      std::memcpy(sums + i, &sum, sizeof(sum));
    }
  }
  for (std::size_t i = 0; i < rows * kPanelRows; i += Isa::kLanes) {
    StorePart<Isa>(args, row_begin + i / kPanelRows, panel.column + i % kPanelRows,
                   LoadFloats<Isa>(sums + i));
  }
}

template <typename Isa>
void MultiplyInt8(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                  std::size_t panel_begin, std::size_t panel_end, const std::byte* prepared) {
  constexpr auto kFew = FewOf<Isa>(std::make_index_sequence<Isa::kDecodeTokens>());
  const BinaryMatMulWeight& weight = *args.weight;
  std::byte* rows = const_cast<std::byte*>(prepared);
  for (std::size_t p = panel_begin; p < panel_end; ++p) {
    Panel<Isa> panel;
    panel.column = p * kPanelRows;
    panel.codes = weight.codes + p * weight.panel_code_bytes;
    const uint8_t* coefficients =
        weight.coefficients + 2 * p * weight.coefficient_slots * kPanelRows;
    for (std::size_t s = 0; s < weight.stream_count; ++s) {
      for (std::size_t part = 0; part < kParts<Isa>; ++part) {
        panel.codebooks[s][part] = Isa::MakeCodebook(weight.streams[s], coefficients, part);
      }
    }
    if (row_end - row_begin <= Isa::kDecodeTokens) {
      kFew[row_end - row_begin - 1](args, panel, row_begin, rows);
      continue;
    }
    for (std::size_t row = row_begin; row < row_end; row += kGroupRows) {
      MultiplyGroup<Isa>(args, panel, row, std::min(kGroupRows, row_end - row),
                         rows + (row - row_begin) * Int8RowBytes(weight));
    }
  }
}

}  // namespace bivlm

#endif  // BIVLM_CPU_MULTIPLY_INT8_H_
