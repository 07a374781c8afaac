// GroupMatMulFunctions::multiply by int8 tokens, for any instruction set.
//
// A 32-bit lane of a vector of codes holds four bytes: 4 columns, or 8 at 4 bits. A lane's products
// are exact integers; times the scale of its block they are added in float, lane by lane. `Isa` has
//   Vec, kLanes, Widen, ToHalves, ..    a struct `Vectors` (vectors_<isa>.h)
//   kStreams                            rows side by side for one or two tokens, as registers allow
//   Ints, ToFloats, MultiplyAdd         integers of the lanes, to floats, a * b + sum
//   struct Levels<bits>, Load<bits>(codes)    a vector of codes, ready for Dot
//   Ints Dot<bits>(levels, q, start)    the products of a lane: with codes as they are, from start
//                                       on (group_tokens.h), or with levels and without it
//   Vec Spread<lanes>(scales)           the scale of each lane's block, where a block has `lanes`
//                                       lanes and scales[0] is that of lane 0
//   void Sum(a, b, c, d, sums)          of all lanes of each, with one order of additions for all
//
// Isa belongs to the anonymous namespace of its file: then so do the instances of the templates
// here.
#ifndef BIVLM_CPU_GROUP_PRODUCTS_H_
#define BIVLM_CPU_GROUP_PRODUCTS_H_

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "group_tokens.h"

namespace bivlm {

template <typename Isa, std::size_t bits, std::size_t block>
struct GroupProducts {
  using Vec = typename Isa::Vec;
  using Ints = typename Isa::Ints;
  static constexpr std::size_t kLanes = Isa::kLanes;
  static constexpr std::size_t kBytes = 4 * kLanes;
  static constexpr std::size_t kBlockBytes = block * bits / 8;
  static constexpr std::size_t kBlockLanes = kBlockBytes / 4;

  static constexpr std::size_t kTokens = 4;  // that share a read of the weight
  static constexpr std::size_t kSteps = 4;   // rows of a stream that are multiplied in a batch
  static constexpr std::size_t kStored = std::max(kSteps, kLanes);
  static constexpr std::size_t kSegment = 16;           // blocks whose scales are made at a time
  static constexpr std::size_t kCacheBytes = 1U << 17;  // of codes that stay for further tokens

  // Rows that are multiplied side by side and share the loads of activations. They lie far apart,
  // so that each is the head of a stream that goes through memory in its order, as the CPU's
  // prefetchers expect it: the head of SmolVLM-256M, cold, was read at 94 % of the speed of a
  // plain read, with neighbouring rows at a third of it, and with these and prefetches 4 to 64 KiB
  // ahead at 60 % (avx512, one of two cores of a Zen 4 with other jobs beside).
  static constexpr std::size_t StreamsOf(std::size_t tokens) {
    return tokens <= 2 ? Isa::kStreams : std::min<std::size_t>(Isa::kStreams, 2);
  }

  using Scales = float[kSegment + kPaddingBlocks];  // of the blocks of a segment and a token

  // Bytes of a row of codes.
  struct Segment {
    std::size_t begin;
    std::size_t end;
  };

  // Of constants, so that nothing is divided.
  static std::size_t Blocks(const GroupMatMulWeight& weight) { return weight.k / block; }
  static std::size_t RowBytes(const GroupMatMulWeight& weight) { return weight.k * bits / 8; }

  static Vec LoadFloats(const float* floats) {
    Vec v;
    std::memcpy(&v, floats, sizeof(v));
    return v;
  }

  [[gnu::noinline]] static Vec WidenLast(const uint8_t* halves, std::size_t bytes) {
    uint16_t last[kLanes] = {};
    std::memcpy(last, halves, bytes);
    return Isa::Widen(last);
  }

  // Scales of `count` blocks of a row for each token; the padding behind them is 0. A vector may
  // reach into the row behind, but not behind `end`.
  template <std::size_t tokens>
  [[gnu::always_inline]] static void MakeScales(const uint8_t* halves, const uint8_t* end,
                                                const GroupToken (&x)[tokens], std::size_t first,
                                                std::size_t count, Scales (&scales)[tokens]) {
    for (std::size_t i = 0; i < count; i += kLanes) {
      const uint8_t* address = halves + 2 * i;
      const std::size_t left = static_cast<std::size_t>(end - address);
      const Vec weight = left >= 2 * kLanes ? Isa::Widen(reinterpret_cast<const uint16_t*>(address))
                                            : WidenLast(address, left);
#pragma GCC unroll 4
      for (std::size_t t = 0; t < tokens; ++t) {
        const Vec product = weight * LoadFloats(x[t].scale + first + i);
        std::memcpy(scales[t] + i, &product, sizeof(product));
      }
    }
    if constexpr (kBlockLanes >= kLanes) return;
#pragma GCC unroll 4
    for (std::size_t t = 0; t < tokens; ++t) {
      const Vec zeros = {};
      std::memcpy(scales[t] + count, &zeros, sizeof(zeros));
    }
  }

  // Adds the products of one vector of codes of each row to sums[r][t]; they begin at byte `at` of
  // the rows, and their scales at number `place` of scales[r][t].
  template <std::size_t tokens, std::size_t rows>
  [[gnu::always_inline]] static void AddVectors(const uint8_t* const (&codes)[rows],
                                                const GroupToken (&x)[tokens], std::size_t at,
                                                const Scales (&scales)[rows][tokens],
                                                std::size_t place, Vec (&sums)[rows][tokens]) {
    typename Isa::template Levels<bits> levels[rows];
#pragma GCC unroll 4
    for (std::size_t r = 0; r < rows; ++r) levels[r] = Isa::template Load<bits>(codes[r]);
#pragma GCC unroll 4
    for (std::size_t t = 0; t < tokens; ++t) {
      const int8_t* const q[2] = {x[t].q[0] + at, x[t].q[1] + at};
      Ints start;
      std::memcpy(&start, x[t].start + at / 4, sizeof(start));
#pragma GCC unroll 4
      for (std::size_t r = 0; r < rows; ++r) {
        const Ints dots = Isa::template Dot<bits>(levels[r], q, start);
        const Vec scale = Isa::template Spread<kBlockLanes>(scales[r][t] + place);
        sums[r][t] = Isa::MultiplyAdd(Isa::ToFloats(dots), scale, sums[r][t]);
      }
    }
  }

  // Adds the products of a segment of some rows, `distance` apart, to sums; a first segment sets
  // them.
  template <std::size_t tokens, std::size_t rows>
  [[gnu::always_inline]] static void AddRows(const GroupMatMulWeight& weight,
                                             const GroupToken (&tokens_of_call)[tokens],
                                             std::size_t row, std::size_t distance,
                                             const Segment& segment,
                                             const Scales (&scales)[rows][tokens],
                                             Vec (&sums_of_batch)[rows][tokens]) {
    GroupToken x[tokens];
    const uint8_t* starts[rows];
    Vec sums[rows][tokens];
#pragma GCC unroll 4
    for (std::size_t t = 0; t < tokens; ++t) x[t] = tokens_of_call[t];
#pragma GCC unroll 4
    for (std::size_t r = 0; r < rows; ++r) {
      starts[r] = weight.codes + (row + r * distance) * RowBytes(weight);
#pragma GCC unroll 4
      for (std::size_t t = 0; t < tokens; ++t) {
        sums[r][t] = segment.begin == 0 ? Vec{} : sums_of_batch[r][t];
      }
    }
    const uint8_t* codes[rows];
    std::size_t at = segment.begin;
    for (; at + kBytes <= segment.end; at += kBytes) {
#pragma GCC unroll 4
      for (std::size_t r = 0; r < rows; ++r) codes[r] = starts[r] + at;
      AddVectors<tokens, rows>(codes, x, at, scales, (at - segment.begin) / kBlockBytes, sums);
    }
    if (kBlockLanes < kLanes && at < segment.end) {
      // The last vector reaches into the next row, where q is 0, but not behind the last one.
      const uint8_t* end = weight.codes + weight.n * RowBytes(weight);
      uint8_t last[rows][kBytes];
#pragma GCC unroll 4
      for (std::size_t r = 0; r < rows; ++r) {
        codes[r] = starts[r] + at;
        if (static_cast<std::size_t>(end - codes[r]) >= kBytes) continue;
        std::memset(last[r], 0, kBytes);
        std::memcpy(last[r], codes[r], segment.end - at);
        codes[r] = last[r];
      }
      AddVectors<tokens, rows>(codes, x, at, scales, (at - segment.begin) / kBlockBytes, sums);
    }
#pragma GCC unroll 4
    for (std::size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (std::size_t t = 0; t < tokens; ++t) sums_of_batch[r][t] = sums[r][t];
    }
  }

  // Writes y for the rows first + r * distance + 0, 1, .. `steps` - 1, r < streams, and all tokens.
  // Scales are made before the products, and lanes added behind them: a row by itself would wait
  // for both.
  template <std::size_t tokens, std::size_t streams>
  static void Batch(const GroupMatMulArgs& args, std::size_t token, const GroupToken (&x)[tokens],
                    std::size_t first, std::size_t distance, std::size_t steps) {
    const GroupMatMulWeight& weight = *args.weight;
    const std::size_t blocks = Blocks(weight);
    const uint8_t* scales_end = weight.scales + 2 * weight.n * blocks;
    alignas(64) Scales scales[kSteps][streams][tokens];
    Vec sums[kSteps][streams][tokens];
    for (std::size_t begin = 0; begin < blocks; begin += kSegment) {
      const std::size_t count = std::min(kSegment, blocks - begin);
      for (std::size_t r = 0; r < streams; ++r) {
        const uint8_t* halves = weight.scales + 2 * ((first + r * distance) * blocks + begin);
        for (std::size_t i = 0; i < steps; ++i, halves += 2 * blocks) {
          MakeScales(halves, scales_end, x, begin, count, scales[i][r]);
        }
      }
      const Segment segment = {begin * kBlockBytes, (begin + count) * kBlockBytes};
      for (std::size_t i = 0; i < steps; ++i) {
        AddRows<tokens, streams>(weight, x, first + i, distance, segment, scales[i], sums[i]);
      }
    }
    for (std::size_t r = 0; r < streams; ++r) {
      for (std::size_t i = steps; i < kSteps; ++i) {
        for (std::size_t t = 0; t < tokens; ++t) sums[i][r][t] = Vec{};
      }
      for (std::size_t t = 0; t < tokens; ++t) {
        alignas(64) float y[kStored];
        for (std::size_t i = 0; i < kSteps; i += 4) {
          Isa::Sum(sums[i][r][t], sums[i + 1][r][t], sums[i + 2][r][t], sums[i + 3][r][t], y + i);
        }
        Store(args, (token + t) * weight.n + first + r * distance, steps, y);
      }
    }
  }

  static void Store(const GroupMatMulArgs& args, std::size_t at, std::size_t count,
                    const float (&y)[kStored]) {
    if (args.type == ElementType::kFloat16) {
      Isa::ToHalves(y, count, static_cast<uint16_t*>(args.y) + at);
    } else if (count == kSteps) {
      std::memcpy(static_cast<float*>(args.y) + at, y, kSteps * sizeof(float));
    } else {
      std::memcpy(static_cast<float*>(args.y) + at, y, count * sizeof(float));
    }
  }

  // Rows from a stream to the next, at most `rows`. Where that can be, not near a multiple of 4
  // KiB: such streams compete for the same lines of the L1 cache (456 rows of 576 bytes apart they
  // were read at 15 GB/s, 880 at 23).
  static std::size_t Distance(const GroupMatMulWeight& weight, std::size_t rows) {
    const std::size_t most = rows / kSteps * kSteps;
    for (std::size_t less = 0; less < std::min<std::size_t>(most, 8 * kSteps); less += kSteps) {
      const std::size_t place = (most - less) * RowBytes(weight) % 4096;
      if (place >= 1024 && place <= 3072) return most - less;
    }
    return most;
  }

  template <std::size_t tokens>
  static void Tile(const GroupMatMulArgs& args, std::size_t token, std::size_t row_begin,
                   std::size_t row_end, std::byte* prepared) {
    constexpr std::size_t kStreams = StreamsOf(tokens);
    GroupToken x[tokens];
    for (std::size_t t = 0; t < tokens; ++t) {
      x[t] = GroupTokenAt(*args.weight, prepared + t * GroupTokenBytes(*args.weight));
    }
    const std::size_t distance = Distance(*args.weight, (row_end - row_begin) / kStreams);
    for (std::size_t row = row_begin; row < row_begin + distance; row += kSteps) {
      Batch<tokens, kStreams>(args, token, x, row, distance, kSteps);
    }
    for (std::size_t row = row_begin + kStreams * distance; row < row_end; row += kSteps) {
      Batch<tokens, 1>(args, token, x, row, 0, std::min(kSteps, row_end - row));
    }
  }

  using TileFunction = void (*)(const GroupMatMulArgs&, std::size_t, std::size_t, std::size_t,
                                std::byte*);
  static constexpr TileFunction kTiles[kTokens] = {Tile<1>, Tile<2>, Tile<3>, Tile<4>};

  static void Rows(const GroupMatMulArgs& args, std::size_t token_begin, std::size_t token_end,
                   std::size_t row_begin, std::size_t row_end, const std::byte* prepared) {
    const GroupMatMulWeight& weight = *args.weight;
    std::byte* tokens = const_cast<std::byte*>(prepared);
    const std::size_t cached = std::max<std::size_t>(kCacheBytes / RowBytes(weight) / 16, 1) * 16;
    const std::size_t step = token_end - token_begin <= kTokens ? row_end - row_begin : cached;
    for (std::size_t row = row_begin; row < row_end; row += step) {
      for (std::size_t token = token_begin; token < token_end; token += kTokens) {
        kTiles[std::min(kTokens, token_end - token) - 1](
            args, token, row, std::min(row + step, row_end),
            tokens + (token - token_begin) * GroupTokenBytes(weight));
      }
    }
  }
};

template <typename Isa>
void MultiplyGroups(const GroupMatMulArgs& args, std::size_t token_begin, std::size_t token_end,
                    std::size_t row_begin, std::size_t row_end, const std::byte* prepared) {
  const auto choose = [&](auto bits) {
    constexpr std::size_t kBits = decltype(bits)::value;
    return args.weight->block == 16   ? GroupProducts<Isa, kBits, 16>::Rows
           : args.weight->block == 32 ? GroupProducts<Isa, kBits, 32>::Rows
                                      : GroupProducts<Isa, kBits, 64>::Rows;
  };
  const auto multiply = args.weight->bits == 8 ? choose(std::integral_constant<std::size_t, 8>())
                                               : choose(std::integral_constant<std::size_t, 4>());
  multiply(args, token_begin, token_end, row_begin, row_end, prepared);
}

}  // namespace bivlm

#endif  // BIVLM_CPU_GROUP_PRODUCTS_H_
