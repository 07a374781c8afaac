// The attention of one task, for any instruction set: keys and values are read in blocks, once
// each, with a softmax that follows the largest score so far (Milakov, Gimelshein: Online
// normalizer calculation for softmax, 2018; Dao et al.: FlashAttention, 2022).
//
// `Isa` has, beside what vector_math.h asks for:
//   kTileRows, kTileVectors   rows and vectors of a product whose sums fit the registers
//   kDotRows           queries that share one reading of a key
//   Swap<h>(v)         lane i gets lane i ^ h, h = 1, 2, .. kLanes / 2
//   Lanes()            0, 1, 2, ..
//   Widen(halves)      kLanes of them as floats
#ifndef BIVLM_CPU_ATTENTION_BLOCKS_H_
#define BIVLM_CPU_ATTENTION_BLOCKS_H_

#include <cstring>
#include <limits>

#include "bivlm/attention.h"
#include "vector_math.h"

namespace bivlm {

// Keys of a block: with 64 features, keys and values of a block are 32 KiB.
static constexpr std::size_t kBlockKeys = 64;

// With more rows than this the keys are transposed, which costs about as much as the sums over
// lanes of 8 rows.
static constexpr std::size_t kDotTaskRows = 8;

template <typename Isa>
struct Attention : VectorMath<Isa> {
  using Math = VectorMath<Isa>;
  using Vec = typename Isa::Vec;
  using Bits = typename Isa::Bits;
  static constexpr std::size_t kLanes = Isa::kLanes;
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  static std::size_t Padded(std::size_t d) { return (d + kLanes - 1) / kLanes * kLanes; }
  static std::size_t Min(std::size_t a, std::size_t b) { return a < b ? a : b; }

  using Math::All;
  using Math::Exp;
  using Math::Load;
  using Math::Store;
  static Vec Load(const uint16_t* halves) { return Isa::Widen(halves); }
  static Vec Max(Vec a, Vec b) { return a > b ? a : b; }

  // Lane i: that of `with` where i has the bit h, else that of `without`.
  template <uint32_t h>
  static Vec Blend(Vec without, Vec with) {
    return (Isa::Lanes() & h) != 0 ? with : without;
  }

  // Every lane: the largest lane, or the sum of all.
  template <std::size_t h = kLanes / 2>
  static Vec AllMax(Vec v) {
    if constexpr (h == 0) {
      return v;
    } else {
      return AllMax<h / 2>(Max(v, Isa::template Swap<h>(v)));
    }
  }
  template <std::size_t h = kLanes / 2>
  static Vec AllSum(Vec v) {
    if constexpr (h == 0) {
      return v;
    } else {
      return AllSum<h / 2>(v + Isa::template Swap<h>(v));
    }
  }

  // c (rows, vectors) += a (rows, depth) * b (depth, vectors); strides in elements. Elements of b,
  // and of keys below, are floats or halves.
  template <std::size_t rows, std::size_t vectors, typename Element>
  static void Tile(const float* a, std::size_t a_stride, const Element* b, std::size_t b_stride,
                   std::size_t depth, float* c, std::size_t c_stride) {
    Vec sums[rows][vectors];
#pragma GCC unroll 8
    for (std::size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (std::size_t v = 0; v < vectors; ++v) sums[r][v] = Load(c + r * c_stride + v * kLanes);
    }
    for (std::size_t k = 0; k < depth; ++k) {
      Vec columns[vectors];
#pragma GCC unroll 8
      for (std::size_t v = 0; v < vectors; ++v) columns[v] = Load(b + k * b_stride + v * kLanes);
#pragma GCC unroll 8
      for (std::size_t r = 0; r < rows; ++r) {
        const Vec factor = All(a[r * a_stride + k]);
#pragma GCC unroll 8
        for (std::size_t v = 0; v < vectors; ++v) sums[r][v] += factor * columns[v];
      }
    }
#pragma GCC unroll 8
    for (std::size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (std::size_t v = 0; v < vectors; ++v) Store(c + r * c_stride + v * kLanes, sums[r][v]);
    }
  }

  // The same with `rows` <= kTileRows and any number of columns, a multiple of kLanes.
  template <std::size_t rows = Isa::kTileRows, typename Element>
  static void Product(std::size_t row_count, const float* a, std::size_t a_stride, const Element* b,
                      std::size_t b_stride, std::size_t depth, float* c, std::size_t c_stride,
                      std::size_t columns) {
    if constexpr (rows > 1) {
      if (row_count < rows) {
        return Product<rows - 1>(row_count, a, a_stride, b, b_stride, depth, c, c_stride, columns);
      }
    }
    constexpr std::size_t kColumns = Isa::kTileVectors * kLanes;
    std::size_t at = 0;
    for (; at + kColumns <= columns; at += kColumns) {
      Tile<rows, Isa::kTileVectors>(a, a_stride, b + at, b_stride, depth, c + at, c_stride);
    }
    for (; at < columns; at += kLanes) {
      Tile<rows, 1>(a, a_stride, b + at, b_stride, depth, c + at, c_stride);
    }
  }

  template <std::size_t rows>
  struct Sums {
    Vec of[rows];
  };

  // Products of `rows` queries with `count` keys from `key` on, a power of 2. Lane i of the result
  // has the key `key` + i % count, and the lanes of one key sum to its product. Keys behind `last`
  // are `last`.
  template <std::size_t rows, std::size_t count, typename Element>
  static inline __attribute__((always_inline)) Sums<rows> Dots(const float* query,
                                                               std::size_t padded,
                                                               const Element* keys,
                                                               std::size_t stride, std::size_t key,
                                                               std::size_t last) {
    Sums<rows> sums;
    if constexpr (count == 1) {
      const Element* features = keys + Min(key, last) * stride;
#pragma GCC unroll 8
      for (std::size_t r = 0; r < rows; ++r) sums.of[r] = Vec{};
#pragma GCC unroll 1
      for (std::size_t f = 0; f < padded; f += kLanes) {
        const Vec part = Load(features + f);
#pragma GCC unroll 8
        for (std::size_t r = 0; r < rows; ++r) sums.of[r] += part * Load(query + r * padded + f);
      }
    } else {
      constexpr std::size_t kHalf = count / 2;
      const Sums<rows> low = Dots<rows, kHalf>(query, padded, keys, stride, key, last);
      const Sums<rows> high = Dots<rows, kHalf>(query, padded, keys, stride, key + kHalf, last);
#pragma GCC unroll 8
      for (std::size_t r = 0; r < rows; ++r) {
        sums.of[r] = Blend<kHalf>(low.of[r], high.of[r]) +
                     Isa::template Swap<kHalf>(Blend<kHalf>(high.of[r], low.of[r]));
      }
    }
    return sums;
  }

  // Rows that will be read soon, fetched while the sums are computed: the values of the block and
  // the keys of the next one. On a Zen 5 server with other jobs beside it, attention_bench fell
  // from 38 to 26 us (avx2) and from 27 to 25 us (avx512) while a plain read took 23 us. On Zen 4
  // it falls from 44 to 36 us if they come into L2 alone.
  struct Ahead {
    bool into_l2 = false;
    const std::byte* values = nullptr;
    const std::byte* keys = nullptr;
    std::size_t value_bytes = 0;
    std::size_t key_bytes = 0;
    std::size_t row_bytes = 0;

    void Fetch(std::size_t rows) {
      FetchPart(rows * row_bytes, &values, &value_bytes);
      FetchPart(rows * row_bytes, &keys, &key_bytes);
    }
    void FetchPart(std::size_t bytes, const std::byte** from, std::size_t* left) const {
      constexpr std::size_t kLineBytes = 64;
      bytes = Min(bytes, *left);
      if (into_l2) {
        for (std::size_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(*from + i, 0, 2);
      } else {
        for (std::size_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(*from + i);
      }
      *from += bytes;
      *left -= bytes;
    }
  };

  // scores (row_count, kBlockKeys) of `row_count` <= kDotRows queries with `count` keys. The
  // scores of keys that there are not are some number.
  template <std::size_t rows = Isa::kDotRows, typename Element>
  static void DotScores(std::size_t row_count, const float* query, std::size_t padded,
                        const Element* keys, std::size_t stride, std::size_t count, float* scores,
                        Ahead ahead) {
    if constexpr (rows > 1) {
      if (row_count < rows) {
        return DotScores<rows - 1>(row_count, query, padded, keys, stride, count, scores, ahead);
      }
    }
    for (std::size_t key = 0; key < count; key += kLanes) {
      ahead.Fetch(kLanes);
      const Sums<rows> sums = Dots<rows, kLanes>(query, padded, keys, stride, key, count - 1);
      for (std::size_t r = 0; r < rows; ++r) Store(scores + r * kBlockKeys + key, sums.of[r]);
    }
  }

  // One step of a transposition of kLanes vectors: exchanges bit h of vector and lane numbers.
  template <uint32_t h>
  static void Exchange(Vec (&v)[kLanes]) {
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kLanes; ++i) {
      if ((i & h) != 0) continue;
      const Vec low = v[i];
      const Vec high = v[i + h];
      v[i] = Blend<h>(low, Isa::template Swap<h>(high));
      v[i + h] = Blend<h>(Isa::template Swap<h>(low), high);
    }
    if constexpr (2 * h < kLanes) Exchange<2 * h>(v);
  }

  // transposed (padded, kBlockKeys) of `count` keys (count, padded); further columns repeat the
  // last key.
  template <typename Element>
  static void Transpose(const Element* keys, std::size_t stride, std::size_t count,
                        std::size_t padded, float* transposed) {
    for (std::size_t key = 0; key < kBlockKeys; key += kLanes) {
      for (std::size_t f = 0; f < padded; f += kLanes) {
        Vec v[kLanes];
#pragma GCC unroll 16
        for (std::size_t i = 0; i < kLanes; ++i) {
          v[i] = Load(keys + Min(key + i, count - 1) * stride + f);
        }
        Exchange<1>(v);
#pragma GCC unroll 16
        for (std::size_t i = 0; i < kLanes; ++i) {
          Store(transposed + (f + i) * kBlockKeys + key, v[i]);
        }
      }
    }
  }

  // Turns the first `visible` scores (kBlockKeys) into weights e^(score - largest so far), the
  // others into 0, and scales what earlier blocks gave. `sums` (kLanes) adds up to the sum of all
  // weights.
  static void Weigh(float* scores, std::size_t visible, float* largest, float* sums, float* output,
                    std::size_t padded) {
    constexpr std::size_t kVectors = kBlockKeys / kLanes;
    Vec v[kVectors];
    for (std::size_t i = 0; i < kVectors; ++i) v[i] = Load(scores + i * kLanes);
    if (visible < kBlockKeys) {
      for (std::size_t i = 0; i < kVectors; ++i) {
        const Bits key = Isa::Lanes() + static_cast<uint32_t>(i * kLanes);
        v[i] = key < static_cast<uint32_t>(visible) ? v[i] : All(-kInfinity);
      }
    }
    Vec top = v[0];
    for (std::size_t i = 1; i < kVectors; ++i) top = Max(top, v[i]);
    const Vec before = All(*largest);
    const Vec now = Max(AllMax(top), before);
    Vec total = Load(sums);
    if (now[0] != *largest) {
      const Vec shrink = Exp(before - now);
      total *= shrink;
      for (std::size_t f = 0; f < padded; f += kLanes) Store(output + f, Load(output + f) * shrink);
      *largest = now[0];
    }
    for (std::size_t i = 0; i < kVectors; ++i) {
      const Vec weight = Exp(v[i] - now);
      Store(scores + i * kLanes, weight);
      total += weight;
    }
    Store(sums, total);
  }

  // Offsets in the work space, in floats.
  struct Layout {
    std::size_t padded, query, output, largest, sums, scores, transposed, keys, values, end;
    Layout(const AttentionArgs& args, std::size_t tokens) {
      const std::size_t rows = tokens * args.group();
      const bool copies = Copies(args, rows);
      padded = Padded(args.d);
      query = 0;
      output = query + RoundUp(rows * padded);
      sums = output + RoundUp(rows * padded);
      largest = sums + RoundUp(rows * kLanes);
      scores = largest + RoundUp(rows);
      transposed = scores + RoundUp(Isa::kTileRows * kBlockKeys);
      keys = transposed + (rows > kDotTaskRows ? RoundUp(padded * kBlockKeys) : 0);
      values = keys + (copies ? RoundUp(padded * kBlockKeys) : 0);
      end = values + (copies ? RoundUp(padded * kBlockKeys) : 0);
    }
    static std::size_t RoundUp(std::size_t floats) { return (floats + 15) / 16 * 16; }
  };

  // Whether keys and values are copied to rows of whole vectors of floats for a task of `rows`:
  // halves that many rows share are widened once.
  static bool Copies(const AttentionArgs& args, std::size_t rows) {
    const bool shares = args.cache_type != ElementType::kFloat32 && rows > kDotTaskRows;
    return shares || args.d % kLanes != 0;
  }

  // Elements [at, at + count) of a tensor as floats: where they are, or in `copy`.
  static const float* Floats(ElementType type, const void* tensor, std::size_t at,
                             std::size_t count, float* copy) {
    if (type == ElementType::kFloat32) return static_cast<const float*>(tensor) + at;
    Isa::FromHalves(static_cast<const uint16_t*>(tensor) + at, count, copy);
    return copy;
  }

  // Turns features i and i + d / 2 of the head at element `at` of qkv by the angle i of the token.
  static void Rotate(const AttentionArgs& args, std::size_t token, std::size_t at, ElementType type,
                     void* rotated) {
    constexpr std::size_t kPart = 64;
    float copies[4][kPart];
    const std::size_t half = args.d / 2;
    for (std::size_t f = 0; f < half; f += kPart) {
      const std::size_t count = Min(kPart, half - f);
      const float* low = Floats(args.type, args.qkv, at + f, count, copies[0]);
      const float* high = Floats(args.type, args.qkv, at + half + f, count, copies[1]);
      const float* cos = Floats(args.type, args.cos, token * half + f, count, copies[2]);
      const float* sin = Floats(args.type, args.sin, token * half + f, count, copies[3]);
      const bool is_float = type == ElementType::kFloat32;
      float* low_out = is_float ? static_cast<float*>(rotated) + f : copies[0];
      float* high_out = is_float ? static_cast<float*>(rotated) + half + f : copies[1];
      std::size_t i = 0;
      for (; i + kLanes <= count; i += kLanes) {
        const Vec a = Load(low + i);
        const Vec b = Load(high + i);
        const Vec c = Load(cos + i);
        const Vec s = Load(sin + i);
        Store(low_out + i, a * c - b * s);
        Store(high_out + i, b * c + a * s);
      }
      for (; i < count; ++i) {
        const float a = low[i];
        const float b = high[i];
        low_out[i] = a * cos[i] - b * sin[i];
        high_out[i] = b * cos[i] + a * sin[i];
      }
      if (!is_float) {
        Isa::ToHalves(low_out, count, static_cast<uint16_t*>(rotated) + f);
        Isa::ToHalves(high_out, count, static_cast<uint16_t*>(rotated) + half + f);
      }
    }
  }

  static void RotateKey(const AttentionArgs& args, std::size_t token, std::size_t kv_head,
                        void* key) {
    Rotate(args, token, args.state(token, args.heads + kv_head), args.cache_type, key);
  }

  static void WriteValue(const AttentionArgs& args, std::size_t token, std::size_t kv_head,
                         void* value) {
    const std::size_t bytes = ElementBytes(args.type);
    const std::size_t at = args.state(token, args.heads + args.kv_heads + kv_head);
    const std::byte* from = static_cast<const std::byte*>(args.qkv) + at * bytes;
    if (args.cache_type == args.type) {
      std::memcpy(value, from, args.d * bytes);
    } else {
      Isa::ToHalves(reinterpret_cast<const float*>(from), args.d, static_cast<uint16_t*>(value));
    }
  }

  // Copies `count` rows of d elements from element `at` of a tensor on, padded with 0.
  static const float* CopiedRows(const AttentionArgs& args, const void* tensor, std::size_t at,
                                 std::size_t count, std::size_t padded, float* copy) {
    for (std::size_t i = 0; i < count; ++i) {
      float* row = copy + i * padded;
      const float* floats = Floats(args.cache_type, tensor, at + i * args.d, args.d, row);
      if (floats != row) std::memcpy(row, floats, args.d * sizeof(float));
      for (std::size_t f = args.d; f < padded; ++f) row[f] = 0.0F;
    }
    return copy;
  }

  static std::size_t WorkFloats(const AttentionArgs& args, std::size_t tokens) {
    return Layout(args, tokens).end;
  }

  // Token of the batch and head of a row of a task.
  static std::size_t TokenOf(const AttentionArgs& args, const AttentionTask& task,
                             std::size_t row) {
    return task.row * args.s + task.token_begin + row / args.group();
  }
  static std::size_t HeadOf(const AttentionArgs& args, const AttentionTask& task, std::size_t row) {
    return task.kv_head * args.group() + row % args.group();
  }

  // What to fetch during the scores of the `count` keys from element `at` of present on; `left`
  // tokens of the row follow from there on. Values that are copied were read with their keys.
  static Ahead Following(const AttentionArgs& args, std::size_t at, std::size_t count,
                         std::size_t left, bool copies) {
    const std::size_t element = ElementBytes(args.cache_type);
    const std::byte* keys = static_cast<const std::byte*>(args.present_key) + at * element;
    const std::byte* values = static_cast<const std::byte*>(args.present_value) + at * element;
    Ahead ahead;
    ahead.into_l2 = HasSmallL1();
    ahead.row_bytes = args.d * element;
    ahead.keys = keys + count * ahead.row_bytes;
    ahead.key_bytes = Min(kBlockKeys, left - count) * ahead.row_bytes;
    ahead.values = copies ? values + count * ahead.row_bytes : values;
    ahead.value_bytes = copies ? ahead.key_bytes : count * ahead.row_bytes;
    return ahead;
  }

  static void Attend(const AttentionArgs& args, const AttentionTask& task, float* work) {
    const Layout layout(args, task.token_end - task.token_begin);
    const std::size_t group = args.group();
    const std::size_t rows = (task.token_end - task.token_begin) * group;
    const std::size_t padded = layout.padded;
    const bool transposes = rows > kDotTaskRows;
    const bool copies = Copies(args, rows);
    const std::size_t tile_rows = transposes ? Isa::kTileRows : Isa::kDotRows;
    const std::size_t first =
        args.past(task.row) + task.token_begin;  // position of the first token
    const std::size_t total = first + task.token_end - task.token_begin;

    for (std::size_t row = 0; row < rows; ++row) {
      float* query = work + layout.query + row * padded;
      const std::size_t token = TokenOf(args, task, row);
      Rotate(args, token, args.state(token, HeadOf(args, task, row)), ElementType::kFloat32, query);
      for (std::size_t f = 0; f < args.d; ++f) query[f] *= args.scale;
      for (std::size_t f = args.d; f < padded; ++f) query[f] = 0.0F;
      work[layout.largest + row] = -kInfinity;
    }
    std::memset(work + layout.output, 0, rows * padded * sizeof(float));
    std::memset(work + layout.sums, 0, rows * kLanes * sizeof(float));

    float* scores = work + layout.scores;
    const std::size_t head_at = (task.row * args.kv_heads + task.kv_head) * args.capacity * args.d;
    const auto attend_block = [&](std::size_t block, const auto* keys, const auto* values) {
      const std::size_t count = Min(kBlockKeys, total - block);
      if (transposes) Transpose(keys, padded, count, padded, work + layout.transposed);
      // Queries before the block see nothing of it.
      const std::size_t skipped = block > first ? (block - first) * group : 0;
      for (std::size_t row = skipped; row < rows; row += tile_rows) {
        const std::size_t n = Min(tile_rows, rows - row);
        const float* query = work + layout.query + row * padded;
        float* output = work + layout.output + row * padded;
        if (transposes) {
          std::memset(scores, 0, n * kBlockKeys * sizeof(float));
          Product(n, query, padded, work + layout.transposed, kBlockKeys, args.d, scores,
                  kBlockKeys, kBlockKeys);
        } else {
          Ahead ahead;
          if (row == skipped) {
            ahead = Following(args, head_at + block * args.d, count, total - block, copies);
          }
          DotScores(n, query, padded, keys, padded, count, scores, ahead);
        }
        std::size_t visible = 0;
        for (std::size_t r = 0; r < n; ++r) {
          visible = Min(kBlockKeys, first + (row + r) / group + 1 - block);
          Weigh(scores + r * kBlockKeys, visible, work + layout.largest + row + r,
                work + layout.sums + (row + r) * kLanes, output + r * padded, padded);
        }
        Product(n, scores, kBlockKeys, values, padded, visible, output, padded, padded);
      }
    };
    for (std::size_t block = 0; block < total; block += kBlockKeys) {
      const std::size_t at = head_at + block * args.d;
      if (copies) {
        const std::size_t count = Min(kBlockKeys, total - block);
        attend_block(block,
                     CopiedRows(args, args.present_key, at, count, padded, work + layout.keys),
                     CopiedRows(args, args.present_value, at, count, padded, work + layout.values));
      } else if (args.cache_type == ElementType::kFloat32) {
        attend_block(block, static_cast<const float*>(args.present_key) + at,
                     static_cast<const float*>(args.present_value) + at);
      } else {
        attend_block(block, static_cast<const uint16_t*>(args.present_key) + at,
                     static_cast<const uint16_t*>(args.present_value) + at);
      }
    }
    for (std::size_t row = 0; row < rows; ++row) {
      float* output = work + layout.output + row * padded;
      const Vec inverse = 1.0F / AllSum(Load(work + layout.sums + row * kLanes));
      for (std::size_t f = 0; f < padded; f += kLanes)
        Store(output + f, Load(output + f) * inverse);
      const std::size_t to =
          (TokenOf(args, task, row) * args.heads + HeadOf(args, task, row)) * args.d;
      if (args.type == ElementType::kFloat32) {
        std::memcpy(static_cast<float*>(args.output) + to, output, args.d * sizeof(float));
      } else {
        Isa::ToHalves(output, args.d, static_cast<uint16_t*>(args.output) + to);
      }
    }
  }
};

}  // namespace bivlm

#endif  // BIVLM_CPU_ATTENTION_BLOCKS_H_
