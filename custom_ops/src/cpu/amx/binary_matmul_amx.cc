// BinaryMatMul with AMX-INT8 for many tokens. Up to 4 are left to the lookup kernel of avx512vbmi,
// which rounds by another rule, tasks of up to 8 to avx512, whose results equal these to the bit.
// Not measured on hardware yet: custom_ops/README.md.
//
// Levels of one chunk and panel, unpacked to [column / 4][16 rows][4], are one tile, the chunk of
// 16 tokens is another, and their product the dot products of 16 tokens and 16 rows. Scales differ
// from chunk to chunk: every product is stored and added to float sums, while the tiles of the next
// chunk are at work.
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || \
    !defined(__AVX512VL__) || !defined(__AMX_TILE__) || !defined(__AMX_INT8__)
#error "compile this file with the flags that CMakeLists.txt gives to the amx kernels"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "amx/tiles.h"
#include "avx512/binary_matmul_avx512.h"
#include "avx512vbmi/lookup_rows.h"

namespace bivlm {
namespace {

constexpr std::size_t kDecodeRows = 8;  // up to here avx512 is called
constexpr std::size_t kTileTokens = 16;
constexpr std::size_t kGroupRows = 256;   // rows that share an unpacked block
constexpr std::size_t kBlockChunks = 16;  // 16 KiB of levels
constexpr std::size_t kChunkLevels = kPanelRows * kChunkColumns;

// Tile registers. The last tokens of a task, fewer than 16, have their own.
constexpr int kLevelTile = 0;
constexpr int kDotTile = 1;
constexpr int kTokenTile = 2;
constexpr int kLastDotTile = 3;
constexpr int kLastTokenTile = 4;

TileConfig MakeTileConfig(std::size_t last_tokens) {
  TileConfig config;
  const auto set = [&config](int tile, std::size_t rows) {
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.row_bytes[tile] = rows == 0 ? 0 : 64;
  };
  set(kLevelTile, kChunkColumns / 4);
  set(kDotTile, kTileTokens);
  set(kTokenTile, kTileTokens);
  set(kLastDotTile, last_tokens);
  set(kLastTokenTile, last_tokens);
  return config;
}

// The tile product takes both sides signed: levels without the offset of avx512.
void UnpackPair(const uint8_t* codes, const Codebook& codebook, int8_t* unpacked) {
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
  for (std::size_t vector = 0; vector < 4; ++vector) {
    const __m512i low = _mm512_loadu_si512(codes + 64 * vector);
    const __m512i high = _mm512_srli_epi16(low, 4);
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i) {
      const __m512i levels = _mm512_xor_si512(PairLevels(codebook, low, high, i), offset);
      _mm512_store_si512(unpacked + 64 * (4 * vector + i), levels);
    }
  }
}

void UnpackSingle(const uint8_t* codes, int8_t* unpacked) {
  const __m512i offset = _mm512_set1_epi8(1);
  for (std::size_t vector = 0; vector < 2; ++vector) {
    const __m512i bytes = _mm512_loadu_si512(codes + 64 * vector);
#pragma GCC unroll 8
    for (unsigned i = 0; i < 8; ++i) {
      const __m512i levels = _mm512_sub_epi8(SingleLevels(bytes, i), offset);
      _mm512_store_si512(unpacked + 64 * (8 * vector + i), levels);
    }
  }
}

// A run of chunks of a stream, unpacked.
struct Block {
  alignas(64) int8_t levels[kBlockChunks * kChunkLevels];
  std::size_t chunk_begin;
  std::size_t chunks;
};

void Unpack(const BinaryMatMulStream& stream, const uint8_t* codes, const Codebook& codebook,
            Block* block) {
  for (std::size_t i = 0; i < block->chunks; ++i) {
    if (stream.is_pair) {
      UnpackPair(codes, codebook, block->levels + i * kChunkLevels);
    } else {
      UnpackSingle(codes, block->levels + i * kChunkLevels);
    }
    codes += stream.code_stride;
  }
}

// One row of the panel per lane.
struct alignas(64) TokenSums {
  float rows[kPanelRows];
};
struct alignas(64) Dots {
  int32_t rows[kTileTokens][kPanelRows];
};

template <bool is_last>
void StartProduct(const Block& block, std::size_t i, const int8_t* q, std::size_t row_bytes,
                  Dots* dots) {
  constexpr int kDots = is_last ? kLastDotTile : kDotTile;
  constexpr int kTokens = is_last ? kLastTokenTile : kTokenTile;
  ZeroTile<kDots>();
  LoadTile<kTokens>(q + (block.chunk_begin + i) * kChunkColumns, row_bytes);
  LoadTile<kLevelTile>(block.levels + i * kChunkLevels, 64);
  AddTileProduct<kDots, kTokens, kLevelTile>();
  StoreTile<kDots>(dots, sizeof(dots->rows[0]));
}

// Adds a block's part to the partial sums of `tokens` tokens, 16 or the last ones.
template <bool is_last>
void AddBlock(const Block& block, std::size_t tokens, std::size_t row_bytes, const Int8Row& first,
              TokenSums* partial) {
  __m512 sums[kTileTokens];
  const float* scales[kTileTokens];
#pragma GCC unroll 16
  for (std::size_t t = 0; t < kTileTokens; ++t) {
    // Tokens that do not exist repeat the last one; their sums are not stored.
    const std::size_t token = is_last ? std::min(t, tokens - 1) : t;
    sums[t] = _mm512_load_ps(partial[token].rows);
    const std::byte* scale = reinterpret_cast<const std::byte*>(first.scale) + token * row_bytes;
    scales[t] = reinterpret_cast<const float*>(scale) + block.chunk_begin;
  }
  Dots dots[2] = {};
  StartProduct<is_last>(block, 0, first.q, row_bytes, &dots[0]);
  for (std::size_t i = 0; i < block.chunks; ++i) {
    if (i + 1 < block.chunks) {
      StartProduct<is_last>(block, i + 1, first.q, row_bytes, &dots[(i + 1) % 2]);
    }
#pragma GCC unroll 16
    for (std::size_t t = 0; t < kTileTokens; ++t) {
      const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(dots[i % 2].rows[t]));
      sums[t] = _mm512_fmadd_ps(dot, _mm512_set1_ps(scales[t][i]), sums[t]);
    }
  }
#pragma GCC unroll 16
  for (std::size_t t = 0; t < kTileTokens; ++t) {
    if (t < tokens) _mm512_store_ps(partial[t].rows, sums[t]);
  }
}

// partial[r] = one stream's sum for each of `rows` rows of activations.
void MultiplyStream(const BinaryMatMulWeight& weight, const BinaryMatMulStream& stream,
                    const Codebook& codebook, const uint8_t* codes, std::size_t rows,
                    std::byte* prepared, TokenSums* partial) {
  const std::size_t row_bytes = Int8RowBytes(weight);
  std::memset(partial, 0, rows * sizeof(*partial));
  codes += stream.code_offset;
  Block block;
  for (std::size_t begin = stream.chunk_begin; begin < stream.chunk_end; begin += kBlockChunks) {
    block.chunk_begin = begin;
    block.chunks = std::min(kBlockChunks, stream.chunk_end - begin);
    Unpack(stream, codes, codebook, &block);
    codes += block.chunks * stream.code_stride;
    for (std::size_t row = 0; row < rows; row += kTileTokens) {
      const std::size_t tokens = std::min(kTileTokens, rows - row);
      const auto add = tokens == kTileTokens ? AddBlock<false> : AddBlock<true>;
      add(block, tokens, row_bytes, Int8RowAt(weight, prepared + row * row_bytes), partial + row);
    }
  }
}

// At most kGroupRows rows with one panel.
void MultiplyGroup(const BinaryMatMulArgs& args, std::size_t panel, std::size_t row_begin,
                   std::size_t rows, std::byte* prepared) {
  const BinaryMatMulWeight& weight = *args.weight;
  Panel opened;
  OpenPanel(weight, panel, &opened);
  TokenSums partial[kGroupRows];
  TokenSums sums[kGroupRows];
  std::memset(sums, 0, rows * sizeof(*sums));
  for (std::size_t s = 0; s < weight.stream_count; ++s) {
    const Codebook& codebook = opened.codebooks[s];
    MultiplyStream(weight, weight.streams[s], codebook, opened.codes, rows, prepared, partial);
    for (std::size_t r = 0; r < rows; ++r) {
      const __m512 sum = _mm512_load_ps(sums[r].rows);
      _mm512_store_ps(sums[r].rows,
                      _mm512_fmadd_ps(_mm512_load_ps(partial[r].rows), codebook.scale, sum));
    }
  }
  for (std::size_t r = 0; r < rows; ++r) {
    Store(args, row_begin + r, opened.column, _mm512_load_ps(sums[r].rows));
  }
}

void Multiply(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
              std::size_t panel_begin, std::size_t panel_end, const std::byte* prepared) {
  if (row_end - row_begin <= kDecodeRows) {
    BinaryMatMulAvx512.multiply(args, row_begin, row_end, panel_begin, panel_end, prepared);
    return;
  }
  std::byte* rows = const_cast<std::byte*>(prepared);
  LoadTileConfig(MakeTileConfig((row_end - row_begin) % kTileTokens));
  for (std::size_t row = row_begin; row < row_end; row += kGroupRows) {
    const std::size_t count = std::min(kGroupRows, row_end - row);
    for (std::size_t panel = panel_begin; panel < panel_end; ++panel) {
      MultiplyGroup(args, panel, row, count, rows);
    }
    rows += count * Int8RowBytes(*args.weight);
  }
  ReleaseTiles();
}

}  // namespace

const BinaryMatMulFunctions BinaryMatMulAmx = {1U << 19, Int8RowBytes,     PrepareInt8Avx512,
                                               Multiply, kMaxLookupTokens, &BinaryMatMulLookup};

}  // namespace bivlm
