// BinaryMatMul for a few tokens: levels go from the codes to vpdpbusd in registers.
#include <algorithm>

#include "binary_matmul_avx512.h"

namespace bivlm {
namespace {

constexpr std::size_t kTileRows = 8;

// Panels ahead for coefficients, which lie apart from the codes.
constexpr std::size_t kPrefetchPanels = 4;

// Panels that are multiplied together share the activations in registers.
constexpr std::size_t PanelsOf(std::size_t tokens) { return tokens <= 4 ? 2 : 1; }

// vpdpbusd has a latency of 4 cycles and two start per cycle.
constexpr std::size_t PartsOf(std::size_t accumulators) {
  return accumulators == 1 ? 4 : accumulators < 4 ? 2 : 1;
}

// dots[p][t] = the dot products of a pair block of panel p with the chunk of token t, q[t].
template <std::size_t tokens, std::size_t panels>
void DotPair(const uint8_t* const (&codes)[panels], const Codebook (&codebooks)[panels],
             const int8_t* const (&q)[tokens], const int32_t (&q_sums)[tokens],
             __m512i (&dots)[panels][tokens]) {
  constexpr std::size_t kParts = PartsOf(tokens * panels);
  __m512i parts[panels][tokens][kParts];
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) {
    const __m512i start = _mm512_set1_epi32(-128 * q_sums[t]);
#pragma GCC unroll 2
    for (std::size_t p = 0; p < panels; ++p) {
#pragma GCC unroll 4
      for (std::size_t part = 0; part < kParts; ++part) {
        parts[p][t][part] = part == 0 ? start : _mm512_setzero_si512();
      }
    }
  }
#pragma GCC unroll 4
  for (std::size_t vector = 0; vector < 4; ++vector) {
    __m512i low[panels];
    __m512i high[panels];
#pragma GCC unroll 2
    for (std::size_t p = 0; p < panels; ++p) {
      low[p] = _mm512_loadu_si512(codes[p] + 64 * vector);
      high[p] = _mm512_srli_epi16(low[p], 4);
    }
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i) {
      __m512i levels[panels];
#pragma GCC unroll 2
      for (std::size_t p = 0; p < panels; ++p) {
        levels[p] = PairLevels(codebooks[p], low[p], high[p], i);
      }
#pragma GCC unroll 8
      for (std::size_t t = 0; t < tokens; ++t) {
        const __m512i four = BroadcastFour(q[t] + 16 * vector + 4 * i);
#pragma GCC unroll 2
        for (std::size_t p = 0; p < panels; ++p) {
          __m512i& part = parts[p][t][i % kParts];
          part = _mm512_dpbusd_epi32(part, levels[p], four);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
    for (std::size_t p = 0; p < panels; ++p) {
      dots[p][t] = parts[p][t][0];
#pragma GCC unroll 4
      for (std::size_t part = 1; part < kParts; ++part) {
        dots[p][t] = _mm512_add_epi32(dots[p][t], parts[p][t][part]);
      }
    }
  }
}

// One token, two panels. The loop is limited by how well the vector ports are filled, and that by
// the distance between an instruction and the one that waits for it: indices, levels and products
// of three consecutive groups go on side by side, a group being half of a vector of each panel.
inline void DotPairAlone(const uint8_t* const (&codes)[2], const Codebook (&codebooks)[2],
                         const int8_t* q, int32_t q_sum, __m512i (&dots)[2]) {
  constexpr std::size_t kGroups = 8;
  __m512i parts[2][2];
  const __m512i start = _mm512_set1_epi32(-128 * q_sum);
#pragma GCC unroll 2
  for (std::size_t p = 0; p < 2; ++p) {
#pragma GCC unroll 4
    for (std::size_t part = 0; part < 2; ++part) {
      parts[p][part] = part == 0 ? start : _mm512_setzero_si512();
    }
  }
  __m512i low[2];
  __m512i high[2];
  __m512i indices[2][2][2];  // of an even and an odd group
  __m512i levels[2][2][2];
#pragma GCC unroll 16
  for (std::size_t step = 0; step < kGroups + 2; ++step) {
    if (step < kGroups) {
#pragma GCC unroll 2
      for (std::size_t i = 0; i < 2; ++i) {
#pragma GCC unroll 2
        for (std::size_t p = 0; p < 2; ++p) {
          if (step % 2 == 0 && i == 0) {
            low[p] = Pin(_mm512_loadu_si512(codes[p] + 32 * step));
            high[p] = Pin(_mm512_srli_epi16(low[p], 4));
          }
          indices[step % 2][p][i] = Pin(PairIndex(low[p], high[p], 2 * (step % 2) + i));
        }
      }
    }
    if (step >= 1 && step <= kGroups) {
      const std::size_t group = (step - 1) % 2;
#pragma GCC unroll 2
      for (std::size_t i = 0; i < 2; ++i) {
#pragma GCC unroll 2
        for (std::size_t p = 0; p < 2; ++p) {
          levels[group][p][i] = Pin(LookUp(codebooks[p], indices[group][p][i], i));
        }
      }
    }
    if (step >= 2) {
      const std::size_t group = (step - 2) % 2;
#pragma GCC unroll 2
      for (std::size_t i = 0; i < 2; ++i) {
        const __m512i four = BroadcastFour(q + 8 * (step - 2) + 4 * i);
#pragma GCC unroll 2
        for (std::size_t p = 0; p < 2; ++p) {
          __m512i& part = parts[p][i];
          part = Pin(_mm512_dpbusd_epi32(part, levels[group][p][i], four));
        }
      }
    }
  }
#pragma GCC unroll 2
  for (std::size_t p = 0; p < 2; ++p) {
    dots[p] = _mm512_add_epi32(parts[p][0], parts[p][1]);
  }
}

// The same for a single block.
template <std::size_t tokens, std::size_t panels>
void DotSingle(const uint8_t* const (&codes)[panels], const int8_t* const (&q)[tokens],
               const int32_t (&q_sums)[tokens], __m512i (&dots)[panels][tokens]) {
#pragma GCC unroll 8
  for (std::size_t t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
    for (std::size_t p = 0; p < panels; ++p) dots[p][t] = _mm512_set1_epi32(-q_sums[t]);
  }
#pragma GCC unroll 2
  for (std::size_t vector = 0; vector < 2; ++vector) {
    __m512i bytes[panels];
#pragma GCC unroll 2
    for (std::size_t p = 0; p < panels; ++p) bytes[p] = _mm512_loadu_si512(codes[p] + 64 * vector);
#pragma GCC unroll 8
    for (unsigned i = 0; i < 8; ++i) {
      __m512i levels[panels];
#pragma GCC unroll 2
      for (std::size_t p = 0; p < panels; ++p) levels[p] = SingleLevels(bytes[p], i);
#pragma GCC unroll 8
      for (std::size_t t = 0; t < tokens; ++t) {
        const __m512i four = BroadcastFour(q[t] + 32 * vector + 4 * i);
#pragma GCC unroll 2
        for (std::size_t p = 0; p < panels; ++p) {
          dots[p][t] = _mm512_dpbusd_epi32(dots[p][t], levels[p], four);
        }
      }
    }
  }
}

// One token: bits stay where they are. Bit i counts 2^i times, so that the sums of lower bits are
// doubled on the way: 8 times the sum of bits 0 to 3, 128 times that of bits 4 to 7.
template <std::size_t panels>
void DotSingleAlone(const uint8_t* const (&codes)[panels], const int8_t* q, int32_t q_sum,
                    __m512i (&dots)[panels]) {
  __m512i bytes[panels][2];
  __m512i parts[panels][2];
#pragma GCC unroll 2
  for (std::size_t p = 0; p < panels; ++p) {
    bytes[p][0] = _mm512_loadu_si512(codes[p]);
    bytes[p][1] = _mm512_loadu_si512(codes[p] + 64);
    parts[p][0] = _mm512_setzero_si512();
    parts[p][1] = _mm512_setzero_si512();
  }
#pragma GCC unroll 4
  for (unsigned i = 0; i < 4; ++i) {
#pragma GCC unroll 2
    for (unsigned half = 0; half < 2; ++half) {
      const __m512i mask = _mm512_set1_epi8(static_cast<char>(1U << (4 * half + i)));
#pragma GCC unroll 2
      for (std::size_t p = 0; p < panels; ++p) {
        if (i > 0) parts[p][half] = _mm512_add_epi32(parts[p][half], parts[p][half]);
      }
#pragma GCC unroll 2
      for (std::size_t vector = 0; vector < 2; ++vector) {
        const __m512i four = BroadcastFour(q + 32 * vector + 16 * half + 4 * i);
#pragma GCC unroll 2
        for (std::size_t p = 0; p < panels; ++p) {
          parts[p][half] =
              _mm512_dpbusd_epi32(parts[p][half], _mm512_and_si512(bytes[p][vector], mask), four);
        }
      }
    }
  }
  const __m512i sum = _mm512_set1_epi32(q_sum);
#pragma GCC unroll 2
  for (std::size_t p = 0; p < panels; ++p) {
    const __m512i total = _mm512_add_epi32(_mm512_slli_epi32(parts[p][0], 4), parts[p][1]);
    dots[p] = _mm512_sub_epi32(_mm512_srai_epi32(total, 6), sum);
  }
}

// Fetches the next codes, in the order of memory; *next is ahead of the multiplication.
template <bool through_l2, std::size_t bytes>
void PrefetchCodes(const uint8_t** next) {
  PrefetchLines<through_l2, bytes>(*next);
  _mm_prefetch(reinterpret_cast<const char*>(*next + kTouchBytes), _MM_HINT_T1);
  *next += bytes;
}

// Adds stream s of What * v to sums.
template <bool through_l2, std::size_t tokens, std::size_t panels, bool is_pair>
void AddStream(const BinaryMatMulStream& stream, std::size_t s, const Panel* const (&tile)[panels],
               const Int8Row (&rows)[tokens], const uint8_t** prefetch,
               __m512 (&sums)[panels][tokens]) {
  Codebook codebooks[panels];
  const uint8_t* codes[panels];
  __m512 partial[panels][tokens];
#pragma GCC unroll 2
  for (std::size_t p = 0; p < panels; ++p) {
    codebooks[p] = tile[p]->codebooks[s];
    codes[p] = tile[p]->codes + stream.code_offset;
#pragma GCC unroll 8
    for (std::size_t t = 0; t < tokens; ++t) partial[p][t] = _mm512_setzero_ps();
  }
  const uint8_t* next = *prefetch;
  for (std::size_t chunk = stream.chunk_begin; chunk < stream.chunk_end; ++chunk) {
    const int8_t* q[tokens];
    int32_t q_sums[tokens];
    __m512i dots[panels][tokens];
#pragma GCC unroll 8
    for (std::size_t t = 0; t < tokens; ++t) {
      q[t] = rows[t].q + chunk * kChunkColumns;
      q_sums[t] = rows[t].sum[chunk];
    }
    PrefetchCodes<through_l2, panels*(is_pair ? 2 : 1) * kPlaneBlockBytes>(&next);
    if constexpr (is_pair && tokens == 1 && panels == 2) {
      __m512i alone[2];
      DotPairAlone(codes, codebooks, q[0], q_sums[0], alone);
      dots[0][0] = alone[0];
      dots[1][0] = alone[1];
    } else if constexpr (is_pair) {
      DotPair(codes, codebooks, q, q_sums, dots);
    } else if constexpr (tokens == 1) {
      __m512i alone[panels];
      DotSingleAlone(codes, q[0], q_sums[0], alone);
#pragma GCC unroll 2
      for (std::size_t p = 0; p < panels; ++p) dots[p][0] = alone[p];
    } else {
      DotSingle(codes, q, q_sums, dots);
    }
#pragma GCC unroll 8
    for (std::size_t t = 0; t < tokens; ++t) {
      const __m512 scale = _mm512_set1_ps(rows[t].scale[chunk]);
#pragma GCC unroll 2
      for (std::size_t p = 0; p < panels; ++p) {
        partial[p][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[p][t]), scale, partial[p][t]);
      }
    }
#pragma GCC unroll 2
    for (std::size_t p = 0; p < panels; ++p) codes[p] += stream.code_stride;
  }
  *prefetch = next;
#pragma GCC unroll 2
  for (std::size_t p = 0; p < panels; ++p) {
#pragma GCC unroll 8
    for (std::size_t t = 0; t < tokens; ++t) {
      sums[p][t] = _mm512_fmadd_ps(partial[p][t], codebooks[p].scale, sums[p][t]);
    }
  }
}

template <bool through_l2, std::size_t tokens, std::size_t panels>
void MultiplyPanels(const BinaryMatMulArgs& args, std::size_t row, const Int8Row (&rows)[tokens],
                    const Panel* const (&tile)[panels]) {
  const BinaryMatMulWeight& weight = *args.weight;
  __m512 sums[panels][tokens] = {};
  // The codes of the last panel must be there when its first is multiplied.
  const uint8_t* prefetch =
      tile[0]->codes + (panels - 1) * weight.panel_code_bytes + kPrefetchBytes;
  for (std::size_t s = 0; s < weight.stream_count; ++s) {
    if (weight.streams[s].is_pair) {
      AddStream<through_l2, tokens, panels, true>(weight.streams[s], s, tile, rows, &prefetch,
                                                  sums);
    } else {
      AddStream<through_l2, tokens, panels, false>(weight.streams[s], s, tile, rows, &prefetch,
                                                   sums);
    }
  }
  for (std::size_t p = 0; p < panels; ++p) {
    for (std::size_t t = 0; t < tokens; ++t) Store(args, row + t, tile[p]->column, sums[p][t]);
  }
}

void PrefetchCoefficients(const BinaryMatMulWeight& weight, std::size_t panel) {
  if (panel >= weight.panels) return;
  const std::size_t bytes = 2 * weight.coefficient_slots * kPanelRows;
  const uint8_t* coefficients = weight.coefficients + panel * bytes;
  for (std::size_t line = 0; line < bytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(coefficients + line), _MM_HINT_T0);
  }
}

template <bool through_l2, std::size_t tokens>
void MultiplyTile(const BinaryMatMulArgs& args, std::size_t row, std::size_t panel_begin,
                  std::size_t panel_end, std::byte* prepared) {
  const BinaryMatMulWeight& weight = *args.weight;
  Int8Row rows[tokens];
  for (std::size_t t = 0; t < tokens; ++t) {
    rows[t] = Int8RowAt(weight, prepared + t * Int8RowBytes(weight));
  }
  constexpr std::size_t kPanels = PanelsOf(tokens);
  // The codebooks of a tile, a chain of slow instructions, are made while the one before it is
  // multiplied.
  Panel panels[2][kPanels];
  const auto open = [&](std::size_t first, Panel* tile) {
    for (std::size_t i = 0; i < kPanels && first + i < panel_end; ++i) {
      PrefetchCoefficients(weight, first + i + kPrefetchPanels);
      OpenPanel(weight, first + i, &tile[i]);
    }
  };
  open(panel_begin, panels[0]);
  std::size_t p = panel_begin;
  for (std::size_t turn = 0; p < panel_end; p += kPanels, turn ^= 1U) {
    open(p + kPanels, panels[turn ^ 1U]);
    if (kPanels == 1 || p + 1 == panel_end) {
      const Panel* const tile[1] = {&panels[turn][0]};
      MultiplyPanels<through_l2>(args, row, rows, tile);
    } else {
      const Panel* const tile[2] = {&panels[turn][0], &panels[turn][kPanels - 1]};
      MultiplyPanels<through_l2>(args, row, rows, tile);
    }
  }
}

using TileFunction = void (*)(const BinaryMatMulArgs&, std::size_t, std::size_t, std::size_t,
                              std::byte*);
template <bool through_l2>
constexpr TileFunction kTiles[kTileRows] = {
    MultiplyTile<through_l2, 1>, MultiplyTile<through_l2, 2>, MultiplyTile<through_l2, 3>,
    // Bound by arithmetic; the second prefetch cost 5 to 13 %.
    MultiplyTile<false, 4>, MultiplyTile<false, 5>, MultiplyTile<false, 6>, MultiplyTile<false, 7>,
    MultiplyTile<false, 8>};

}  // namespace

void DecodeAvx512(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                  std::size_t panel_begin, std::size_t panel_end, const std::byte* prepared) {
  std::byte* rows = const_cast<std::byte*>(prepared);
  const TileFunction* tiles = HasSmallL1() ? kTiles<true> : kTiles<false>;
  for (std::size_t row = row_begin; row < row_end; row += kTileRows) {
    tiles[std::min(kTileRows, row_end - row) - 1](args, row, panel_begin, panel_end, rows);
    rows += kTileRows * Int8RowBytes(*args.weight);
  }
}

}  // namespace bivlm
