// BinaryMatMul for many tokens: levels of two panels are unpacked to memory that stays in the L1
// cache, and multiplied with tiles of tokens whose sums stay in registers.
#include <algorithm>

#include "binary_matmul_avx512.h"

namespace bivlm {
namespace {

constexpr std::size_t kPanels = 2;
constexpr std::size_t kTileRows = 6;
constexpr std::size_t kBlockChunks = 8;  // 16 KiB of levels
constexpr std::size_t kMaxRows = 128;
constexpr std::size_t kSteps = kChunkColumns / 4;

// Levels of kPanels panels and a run of chunks, plus 128 (pairs) or 1 (single planes).
struct alignas(64) Levels {
  __m512i steps[kBlockChunks * kSteps][kPanels];
};

// What tokens have so far, for the two panels.
struct alignas(64) Sums {
  __m512 partial[kPanels];  // of the stream, without its coefficient
  __m512 total[kPanels];
};

void UnpackPair(const uint8_t* codes, const Codebook& codebook, std::size_t panel,
                __m512i (*steps)[kPanels]) {
#pragma GCC unroll 4
  for (std::size_t vector = 0; vector < 4; ++vector) {
    const __m512i low = _mm512_loadu_si512(codes + 64 * vector);
    const __m512i high = _mm512_srli_epi16(low, 4);
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i) {
      steps[4 * vector + i][panel] = PairLevels(codebook, low, high, i);
    }
  }
}

void UnpackSingle(const uint8_t* codes, std::size_t panel, __m512i (*steps)[kPanels]) {
#pragma GCC unroll 2
  for (std::size_t vector = 0; vector < 2; ++vector) {
    const __m512i bytes = _mm512_loadu_si512(codes + 64 * vector);
#pragma GCC unroll 8
    for (unsigned i = 0; i < 8; ++i) {
      steps[8 * vector + i][panel] = SingleLevels(bytes, i);
    }
  }
}

// Unpacks `chunks` chunks of a stream of panel `panel`.
void Unpack(const BinaryMatMulStream& stream, const uint8_t* codes, const Codebook& codebook,
            std::size_t chunks, std::size_t panel, Levels* levels) {
  const Codebook local = codebook;  // stays in registers
  for (std::size_t chunk = 0; chunk < chunks; ++chunk, codes += stream.code_stride) {
    if (stream.is_pair) {
      UnpackPair(codes, local, panel, levels->steps + chunk * kSteps);
    } else {
      UnpackSingle(codes, panel, levels->steps + chunk * kSteps);
    }
  }
}

void Prefetch(const void* line) { _mm_prefetch(static_cast<const char*>(line), _MM_HINT_T0); }

void PrefetchBlock(const BinaryMatMulStream& stream, const uint8_t* codes, std::size_t chunks) {
  const std::size_t bytes = (stream.is_pair ? 2 : 1) * kPlaneBlockBytes;
  for (std::size_t chunk = 0; chunk < chunks; ++chunk, codes += stream.code_stride) {
    for (std::size_t line = 0; line < bytes; line += 64) {
      Prefetch(codes + line);
    }
  }
}

// Adds chunks [chunk_begin, chunk_end) to the partial sums of `tokens` rows. The levels were
// unpacked with 2^bias_shift added.
template <std::size_t tokens>
void MultiplyLevels(const Levels& levels, unsigned bias_shift, std::size_t chunk_begin,
                    std::size_t chunk_end, const Int8Row& first, std::size_t row_bytes,
                    Sums* sums) {
  __m512 partial[tokens][kPanels];
  const int8_t* q[tokens];
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) {
    q[t] = first.q + t * row_bytes + chunk_begin * kChunkColumns;
#pragma GCC unroll 2
    for (std::size_t p = 0; p < kPanels; ++p) partial[t][p] = sums[t].partial[p];
  }
  const __m512i(*steps)[kPanels] = levels.steps;
  const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(bias_shift));
  const std::byte* scales = reinterpret_cast<const std::byte*>(first.scale);
  const std::byte* bias = reinterpret_cast<const std::byte*>(first.sum);
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) {  // for the next tile
    Prefetch(scales + (tokens + t) * row_bytes + 4 * chunk_begin);
    Prefetch(bias + (tokens + t) * row_bytes + 4 * chunk_begin);
  }
  for (std::size_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    __m512i dots[tokens][kPanels];
#pragma GCC unroll 8
    for (std::size_t t = 0; t < tokens; ++t) {
      int32_t q_sum;
      std::memcpy(&q_sum, bias + t * row_bytes + 4 * chunk, sizeof(q_sum));
      const __m512i start = _mm512_sub_epi32(_mm512_setzero_si512(),
                                             _mm512_sll_epi32(_mm512_set1_epi32(q_sum), shift));
#pragma GCC unroll 2
      for (std::size_t p = 0; p < kPanels; ++p) dots[t][p] = start;
    }
#pragma GCC unroll 16
    for (std::size_t step = 0; step < kSteps; ++step) {
      const __m512i l0 = steps[step][0];
      const __m512i l1 = steps[step][1];
#pragma GCC unroll 8
      for (std::size_t t = 0; t < tokens; ++t) {
        const __m512i four = BroadcastFour(q[t] + 4 * step);
        dots[t][0] = _mm512_dpbusd_epi32(dots[t][0], l0, four);
        dots[t][1] = _mm512_dpbusd_epi32(dots[t][1], l1, four);
      }
    }
#pragma GCC unroll 8
    for (std::size_t t = 0; t < tokens; ++t) {
      float value;
      std::memcpy(&value, scales + t * row_bytes + 4 * chunk, sizeof(value));
      const __m512 scale = _mm512_set1_ps(value);
      Prefetch(q[t] + tokens * row_bytes);
#pragma GCC unroll 2
      for (std::size_t p = 0; p < kPanels; ++p) {
        partial[t][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t][p]), scale, partial[t][p]);
      }
      q[t] += kChunkColumns;
    }
    steps += kSteps;
  }
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
    for (std::size_t p = 0; p < kPanels; ++p) sums[t].partial[p] = partial[t][p];
  }
}

using LevelsFunction = void (*)(const Levels&, unsigned, std::size_t, std::size_t, const Int8Row&,
                                std::size_t, Sums*);
constexpr LevelsFunction kMultiplyLevels[] = {MultiplyLevels<1>, MultiplyLevels<2>,
                                              MultiplyLevels<3>, MultiplyLevels<4>,
                                              MultiplyLevels<5>, MultiplyLevels<6>};

// A run of chunks of one stream, unpacked and multiplied together.
struct Block {
  std::size_t stream;
  std::size_t chunk_begin;
  std::size_t chunk_end;
  bool starts_stream;
  bool ends_stream;
  bool ends_weight;
};

// The blocks of a weight, one after the other.
class Blocks {
 public:
  explicit Blocks(const BinaryMatMulWeight& weight) : weight_(weight) {}

  bool Next(Block* block) {
    if (stream_ == weight_.stream_count) return false;
    const BinaryMatMulStream& stream = weight_.streams[stream_];
    block->stream = stream_;
    block->chunk_begin = stream.chunk_begin + done_;
    block->chunk_end = std::min(block->chunk_begin + kBlockChunks, stream.chunk_end);
    block->starts_stream = done_ == 0;
    block->ends_stream = block->chunk_end == stream.chunk_end;
    block->ends_weight = block->ends_stream && stream_ + 1 == weight_.stream_count;
    done_ = block->ends_stream ? 0 : block->chunk_end - stream.chunk_begin;
    stream_ += block->ends_stream ? 1 : 0;
    return true;
  }

 private:
  const BinaryMatMulWeight& weight_;
  std::size_t stream_ = 0;
  std::size_t done_ = 0;  // chunks of it
};

const uint8_t* CodesOf(const BinaryMatMulWeight& weight, const Block& block, const Panel& panel) {
  const BinaryMatMulStream& stream = weight.streams[block.stream];
  return panel.codes + stream.code_offset +
         (block.chunk_begin - stream.chunk_begin) * stream.code_stride;
}

// y is far apart from row to row: without this, each line waits for the cache when it is written.
void PrefetchOutputs(const BinaryMatMulArgs& args, std::size_t row, std::size_t count,
                     std::size_t column) {
  const std::size_t size = args.type == ElementType::kFloat32 ? 4 : 2;
  for (std::size_t i = 0; i < count; ++i) {
    const char* y = static_cast<const char*>(args.y) + size * ((row + i) * args.weight->n + column);
    __builtin_prefetch(y, 1);
    __builtin_prefetch(y + kPanelRows * size, 1);
  }
}

// The product of rows [row, row + row_count) with two panels.
void MultiplyPanels(const BinaryMatMulArgs& args, const Panel (&panels)[kPanels], std::size_t row,
                    std::size_t row_count, std::byte* prepared, Levels* levels, Sums* sums) {
  const BinaryMatMulWeight& weight = *args.weight;
  const std::size_t row_bytes = Int8RowBytes(weight);
  const std::size_t tiles = (row_count + kTileRows - 1) / kTileRows;
  Blocks blocks(weight);
  Block block;
  for (bool more = blocks.Next(&block); more;) {
    const BinaryMatMulStream& stream = weight.streams[block.stream];
    for (std::size_t p = 0; p < kPanels; ++p) {
      Unpack(stream, CodesOf(weight, block, panels[p]), panels[p].codebooks[block.stream],
             block.chunk_end - block.chunk_begin, p, levels);
    }
    const Block now = block;
    more = blocks.Next(&block);
    for (std::size_t p = 0; more && p < kPanels; ++p) {
      PrefetchBlock(weight.streams[block.stream], CodesOf(weight, block, panels[p]),
                    block.chunk_end - block.chunk_begin);
    }
    for (std::size_t tile = 0; tile < tiles; ++tile) {
      const std::size_t begin = row_count * tile / tiles;
      const std::size_t count = row_count * (tile + 1) / tiles - begin;
      if (now.ends_weight) PrefetchOutputs(args, row + begin, count, panels[0].column);
      for (std::size_t i = begin; now.starts_stream && i < begin + count; ++i) {
        for (__m512& partial : sums[i].partial) partial = _mm512_setzero_ps();
      }
      kMultiplyLevels[count - 1](*levels, stream.is_pair ? 7 : 0, now.chunk_begin, now.chunk_end,
                                 Int8RowAt(weight, prepared + begin * row_bytes), row_bytes,
                                 sums + begin);
      for (std::size_t i = begin; now.ends_stream && i < begin + count; ++i) {
        for (std::size_t p = 0; p < kPanels; ++p) {
          const __m512 total = now.stream == 0 ? _mm512_setzero_ps() : sums[i].total[p];
          sums[i].total[p] =
              _mm512_fmadd_ps(sums[i].partial[p], panels[p].codebooks[now.stream].scale, total);
          if (now.ends_weight) Store(args, row + i, panels[p].column, sums[i].total[p]);
        }
      }
    }
  }
}

}  // namespace

void PrefillAvx512(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                   std::size_t panel_begin, std::size_t panel_end, const std::byte* prepared) {
  const BinaryMatMulWeight& weight = *args.weight;
  std::byte* rows = const_cast<std::byte*>(prepared);
  Levels levels;
  Sums sums[kMaxRows];
  for (std::size_t row = row_begin; row < row_end; row += kMaxRows) {
    const std::size_t count = std::min(kMaxRows, row_end - row);
    for (std::size_t p = panel_begin; p < panel_end; p += kPanels) {
      if (p + 1 == panel_end) {
        DecodeAvx512(args, row, row + count, p, panel_end, rows);
        break;
      }
      Panel panels[kPanels];
      for (std::size_t i = 0; i < kPanels; ++i) OpenPanel(weight, p + i, &panels[i]);
      MultiplyPanels(args, panels, row, count, rows, &levels, sums);
    }
    rows += count * Int8RowBytes(weight);
  }
}

}  // namespace bivlm
