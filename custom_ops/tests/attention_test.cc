// GroupQueryAttention with every kernel that this CPU has against the formula in double.
#include "bivlm/attention.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "check.h"
#include "reference.h"

namespace bivlm::testing {
namespace {

// Types of the activations and of the cache.
struct Types {
  bool half;
  bool half_cache;
  const char* name;
};
constexpr Types kTypes[] = {{false, false, " float32"},
                            {true, true, " float16"},
                            {false, true, " float32 with a float16 cache"}};

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A run: `past` tokens per row in caches of `past_capacity` positions, then s new ones.
struct Problem {
  std::size_t b = 1, s = 1, heads = 1, kv_heads = 1, d = 1;
  std::size_t past_capacity = 0;
  std::vector<std::size_t> past;  // per row
  double scale = 0.25;
  std::vector<float> qkv, cos, sin, past_key, past_value;
  // What Derive makes of them: (b, s, heads, d), the terms that a query is the sum of, (b, s,
  // kv_heads, d).
  std::vector<double> query, query_terms, key, value;

  std::size_t total() const { return *std::max_element(past.begin(), past.end()) + s; }
  std::size_t capacity() const { return std::max(past_capacity, total()); }
  std::string Text() const {
    std::string text = "b=" + std::to_string(b) + " s=" + std::to_string(s) +
                       " heads=" + std::to_string(heads) + "/" + std::to_string(kv_heads) +
                       " d=" + std::to_string(d) + " P=" + std::to_string(past_capacity) + " past=";
    for (const std::size_t tokens : past) text += std::to_string(tokens) + ",";
    return text;
  }
};

// Rotates the queries and keys.
void Derive(Problem* p) {
  p->query.clear();
  p->query_terms.clear();
  p->key.clear();
  p->value.clear();
  for (std::size_t token = 0; token < p->b * p->s; ++token) {
    for (std::size_t head = 0; head < p->heads + 2 * p->kv_heads; ++head) {
      const float* states = &p->qkv[(token * (p->heads + 2 * p->kv_heads) + head) * p->d];
      for (std::size_t f = 0; f < p->d; ++f) {
        const std::size_t half = p->d / 2;
        const double c = p->cos[token * half + f % half];
        const double s = p->sin[token * half + f % half];
        const double turned = f < half ? -s * states[f + half] : s * states[f - half];
        const double rotated = c * states[f] + turned;
        if (head < p->heads) {
          p->query.push_back(rotated);
          p->query_terms.push_back(std::fabs(c * states[f]) + std::fabs(turned));
        } else if (head < p->heads + p->kv_heads) {
          p->key.push_back(rotated);
        } else {
          p->value.push_back(states[f]);
        }
      }
    }
  }
}

// Random contents with so few bits that rotations are exact in float16; positions behind the past
// are NaN.
Problem Make(Problem p, uint64_t seed, float size = 1.0F) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0.0F, 1.0F);
  const float step = size < 2.0F ? 0x1p-4F : 0x1p-1F;
  const auto fill = [&](std::size_t count) {
    std::vector<float> values(count);
    for (float& value : values) {
      value = std::round(std::clamp(normal(random), -3.9F, 3.9F) * size / step) * step;
    }
    return values;
  };
  const auto turns = [&](std::size_t count) {
    std::vector<float> values(count);
    for (float& value : values) {
      value = 0.25F * static_cast<float>(std::uniform_int_distribution<int>(-4, 4)(random));
    }
    return values;
  };
  p.qkv = fill(p.b * p.s * (p.heads + 2 * p.kv_heads) * p.d);
  p.cos = turns(p.b * p.s * p.d / 2);
  p.sin = turns(p.b * p.s * p.d / 2);
  Derive(&p);
  for (std::vector<float>* cache : {&p.past_key, &p.past_value}) {
    *cache = fill(p.b * p.kv_heads * p.past_capacity * p.d);
    for (std::size_t i = 0; i < cache->size(); ++i) {
      const std::size_t row = i / (p.kv_heads * p.past_capacity * p.d);
      if (i / p.d % p.past_capacity >= p.past[row]) (*cache)[i] = kNan;
    }
  }
  return p;
}

// Element (row, kv head, position, feature) of the keys or values of all tokens.
double At(const Problem& p, const std::vector<float>& past, const std::vector<double>& states,
          std::size_t row, std::size_t head, std::size_t position, std::size_t f) {
  if (position < p.past[row]) {
    return past[((row * p.kv_heads + head) * p.past_capacity + position) * p.d + f];
  }
  return states[((row * p.s + position - p.past[row]) * p.kv_heads + head) * p.d + f];
}

struct Value {
  double value = 0.0;
  double bound = 0.0;
};

// Output (b, s, heads, d). The bound: weights are off by the relative error of e^x, the rounding of
// x = scale * dot with its rotated query, and that of the sums; so are their products with the
// values.
std::vector<Value> Reference(const Problem& p) {
  std::vector<Value> output(p.query.size());
  for (std::size_t row = 0; row < p.b; ++row) {
    for (std::size_t token = 0; token < p.s; ++token) {
      for (std::size_t head = 0; head < p.heads; ++head) {
        const std::size_t kv_head = head / (p.heads / p.kv_heads);
        const std::size_t at = ((row * p.s + token) * p.heads + head) * p.d;
        const std::size_t keys = p.past[row] + token + 1;
        std::vector<double> scores(keys);
        double largest = -INFINITY;
        double score_error = 0.0;
        for (std::size_t k = 0; k < keys; ++k) {
          double magnitude = 0.0;
          for (std::size_t f = 0; f < p.d; ++f) {
            const double factor = p.scale * At(p, p.past_key, p.key, row, kv_head, k, f);
            scores[k] += factor * p.query[at + f];
            magnitude += std::fabs(factor) * p.query_terms[at + f];
          }
          largest = std::max(largest, scores[k]);
          score_error = std::max(score_error, magnitude * FLT_EPSILON * (2.0 + double(p.d) / 8));
        }
        double sum = 0.0;
        for (double& score : scores) sum += score = std::exp(score - largest);
        const double relative = 2 * score_error + FLT_EPSILON * (8.0 + double(keys) / 8);
        for (std::size_t f = 0; f < p.d; ++f) {
          Value& value = output[at + f];
          double magnitude = 0.0;
          for (std::size_t k = 0; k < keys; ++k) {
            const double term = scores[k] / sum * At(p, p.past_value, p.value, row, kv_head, k, f);
            value.value += term;
            magnitude += std::fabs(term);
          }
          value.bound = relative * magnitude;
        }
      }
    }
  }
  return output;
}

// A tensor of the problem's element type between guards.
class TensorMemory {
 public:
  TensorMemory(const std::vector<float>& values, std::size_t count, bool float16)
      : float16_(float16), count_(count), memory_(count * (float16 ? 2 : 4)) {
    for (std::size_t i = 0; i < count; ++i) Set(i, i < values.size() ? values[i] : kNan);
  }
  void* data() { return memory_.data(); }
  bool IsIntact() const { return memory_.IsIntact(); }
  float Get(std::size_t i) {
    if (float16_) return LoadHalf(static_cast<uint16_t*>(data()) + i);
    return static_cast<float*>(data())[i];
  }

 private:
  void Set(std::size_t i, float value) {
    if (float16_) {
      static_cast<uint16_t*>(data())[i] = HalfFromFloat(value);
    } else {
      static_cast<float*>(data())[i] = value;
    }
  }
  bool float16_;
  std::size_t count_;
  Guarded memory_;
};

void ExpectPresent(Checker* check, const Problem& p, const std::string& what,
                   const std::vector<float>& past, const std::vector<double>& states,
                   TensorMemory* present, bool in_place) {
  std::size_t wrong = 0;
  for (std::size_t row = 0; row < p.b; ++row) {
    for (std::size_t head = 0; head < p.kv_heads; ++head) {
      for (std::size_t position = 0; position < p.capacity(); ++position) {
        for (std::size_t f = 0; f < p.d; ++f) {
          const float got =
              present->Get(((row * p.kv_heads + head) * p.capacity() + position) * p.d + f);
          if (position < p.past[row] + p.s) {
            wrong += got != At(p, past, states, row, head, position, f);
          } else {
            wrong += in_place ? !std::isnan(got) : got != 0.0F;
          }
        }
      }
    }
  }
  check->Expect(wrong == 0, what, ": ", wrong, " wrong elements of present");
}

void Run(Checker* check, const Problem& p, const AttentionKernel& kernel, const Types& types,
         bool in_place, const Executor& executor, const std::vector<Value>& want) {
  const std::string what =
      std::string(kernel.name) + " " + p.Text() + types.name + (in_place ? " in place" : " anew");
  TensorMemory qkv(p.qkv, p.qkv.size(), types.half);
  TensorMemory cos(p.cos, p.cos.size(), types.half);
  TensorMemory sin(p.sin, p.sin.size(), types.half);
  TensorMemory past_key(p.past_key, p.past_key.size(), types.half_cache);
  TensorMemory past_value(p.past_value, p.past_value.size(), types.half_cache);
  const std::size_t present_size = p.b * p.kv_heads * p.capacity() * p.d;
  TensorMemory new_key({}, present_size, types.half_cache);
  TensorMemory new_value({}, present_size, types.half_cache);
  TensorMemory output({}, p.query.size(), types.half);
  std::vector<int32_t> last;
  for (const std::size_t past : p.past) last.push_back(static_cast<int32_t>(past + p.s) - 1);

  AttentionArgs args;
  args.type = types.half ? ElementType::kFloat16 : ElementType::kFloat32;
  args.cache_type = types.half_cache ? ElementType::kFloat16 : ElementType::kFloat32;
  args.b = p.b;
  args.s = p.s;
  args.heads = p.heads;
  args.kv_heads = p.kv_heads;
  args.d = p.d;
  args.past_capacity = p.past_capacity;
  args.capacity = p.capacity();
  args.scale = static_cast<float>(p.scale);
  args.last_index = last.data();
  args.qkv = qkv.data();
  args.cos = cos.data();
  args.sin = sin.data();
  args.past_key = past_key.data();
  args.past_value = past_value.data();
  args.output = output.data();
  args.present_key = in_place ? past_key.data() : new_key.data();
  args.present_value = in_place ? past_value.data() : new_value.data();
  RunAttention(kernel, args, executor);

  ExpectPresent(check, p, what + " key", p.past_key, p.key, in_place ? &past_key : &new_key,
                in_place);
  ExpectPresent(check, p, what + " value", p.past_value, p.value,
                in_place ? &past_value : &new_value, in_place);
  for (const TensorMemory* memory :
       {&qkv, &cos, &sin, &past_key, &past_value, &new_key, &new_value, &output}) {
    check->Expect(memory->IsIntact(), what, ": wrote outside a tensor");
  }
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double got = output.Get(i);
    // float16 outputs are rounded once: half of a step of 2^-10, or of 2^-24 for small ones
    const double rounding =
        types.half ? std::max(std::fabs(want[i].value) * 0x1p-11, 0x1p-25) * 1.001 : 0.0;
    const double bound = want[i].bound + rounding + 1e-30;
    const bool close =
        std::isnan(want[i].value) ? std::isnan(got) : std::fabs(got - want[i].value) <= bound;
    check->Expect(close, what, " at ", i, ": got ", got, " want ", want[i].value, " bound ", bound);
    if (!close) return;
  }
}

// What a kernel makes of element i of the keys.
double RotatedKey(const Problem& p, const AttentionKernel& kernel, const Types& types,
                  std::size_t i) {
  TensorMemory qkv(p.qkv, p.qkv.size(), types.half);
  TensorMemory cos(p.cos, p.cos.size(), types.half);
  TensorMemory sin(p.sin, p.sin.size(), types.half);
  TensorMemory key({}, p.d, types.half_cache);
  AttentionArgs args;
  args.type = types.half ? ElementType::kFloat16 : ElementType::kFloat32;
  args.cache_type = types.half_cache ? ElementType::kFloat16 : ElementType::kFloat32;
  args.b = p.b;
  args.s = p.s;
  args.heads = p.heads;
  args.kv_heads = p.kv_heads;
  args.d = p.d;
  args.qkv = qkv.data();
  args.cos = cos.data();
  args.sin = sin.data();
  kernel.functions->rotate_key(args, i / p.d / p.kv_heads, i / p.d % p.kv_heads, key.data());
  return key.Get(i % p.d);
}

void RunAll(Checker* check, const Problem& p, const Executor& executor = Executor()) {
  const std::vector<Value> want = Reference(p);
  for (const AttentionKernel& kernel : AttentionKernels()) {
    if ((kernel.isa & SupportedIsa()) != kernel.isa) continue;
    for (const Types& types : kTypes) {
      for (const bool in_place : {false, true}) {
        if (in_place && p.capacity() != p.past_capacity) continue;
        Run(check, p, kernel, types, in_place, executor, want);
      }
    }
  }
}

Problem Shape(std::size_t s, std::size_t past, std::size_t heads, std::size_t kv_heads,
              std::size_t d, std::size_t past_capacity) {
  Problem p;
  p.s = s;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.d = d;
  p.past = {past};
  p.past_capacity = past_capacity;
  p.scale = 1 / std::sqrt(static_cast<double>(static_cast<float>(d)));
  return p;
}

// One token: all group sizes round the tile, and keys round a block and a vector.
void Decode(Checker* check) {
  uint64_t seed = 1;
  for (const std::size_t group : {1, 2, 3, 4, 5, 7, 8, 9, 13}) {
    for (const std::size_t past : {0, 1, 15, 16, 62, 63, 64, 65, 130}) {
      RunAll(check, Make(Shape(1, past, group, 1, 16, past + seed % 3), seed));
      ++seed;
    }
  }
  for (const std::size_t d : {2, 4, 6, 8, 10, 14, 16, 18, 30, 32, 48, 64, 80, 100, 128, 258}) {
    RunAll(check, Make(Shape(1, 70, 6, 2, d, 71), seed++));
  }
}

// Several tokens: rows round the tiles and tasks, with and without a past.
void Prefill(Checker* check) {
  uint64_t seed = 1000;
  for (const std::size_t s : {2, 3, 5, 6, 7, 12, 63, 64, 65, 100, 200}) {
    for (const std::size_t past : {0, 1, 70}) {
      RunAll(check, Make(Shape(s, past, 3, 1, 20, past + s + seed % 2), seed));
      ++seed;
    }
  }
  for (const std::size_t d : {2, 6, 16, 34, 64, 72, 128}) {
    RunAll(check, Make(Shape(40, 30, 2, 2, d, 30), seed++));
  }
  RunAll(check, Make(Shape(2, 3, 300, 1, 8, 5), seed));  // a group larger than a task
}

void Batches(Checker* check) {
  Problem p = Shape(1, 0, 6, 3, 12, 90);
  p.b = 3;
  p.past = {0, 89, 40};
  RunAll(check, Make(p, 1), ThreeThreads());
  p.s = 30;
  p.past = {60, 0, 17};
  RunAll(check, Make(p, 2), ThreeThreads());
}

// Enough work for several threads: few long tasks, and more tasks than work spaces.
void Threads(Checker* check) {
  RunAll(check, Make(Shape(1, 700, 9, 3, 64, 701), 3), ThreeThreads());
  RunAll(check, Make(Shape(150, 20, 8, 2, 16, 170), 4), ThreeThreads());
  Problem p = Shape(1, 300, 3, 3, 20, 301);
  p.b = 25;
  p.past = std::vector<std::size_t>(25, 300);
  RunAll(check, Make(p, 5), ThreeThreads());
}

// Scores of hundreds: one key takes all the weight, and the largest one comes late or early.
void LargeScores(Checker* check) {
  RunAll(check, Make(Shape(1, 150, 3, 1, 64, 151), 6, 12.0F));
  RunAll(check, Make(Shape(20, 100, 3, 1, 64, 120), 7, 12.0F));
}

// A query with a NaN or an infinite score gets NaN, one with a score of -inf gives that key no
// weight, and the others do not notice.
void NotFinite(Checker* check) {
  for (const std::size_t tokens : {1, 30}) {
    const Problem finite = Make(Shape(tokens, 80, 4, 2, 16, 80 + tokens), 9);
    Problem p = finite;
    p.qkv[5] = kNan;
    Derive(&p);
    RunAll(check, p);
    for (const float value : {INFINITY, -INFINITY}) {
      p = finite;
      for (std::size_t f = 0; f < p.d; ++f) p.qkv[f] = 0.5F;
      for (std::size_t f = 0; f < p.d / 2; ++f) {
        p.cos[f] = 1.0F;
        p.sin[f] = 0.0F;
      }
      Derive(&p);
      p.past_key[70 * p.d + 3] = value;
      RunAll(check, p);
    }
  }
}

// Angles of any kind: a key in present is its rotation rounded once, and its score that of the
// rounded one.
void RoundedRotations(Checker* check) {
  for (const std::size_t d : {20, 64, 258}) {
    Problem p = Make(Shape(3, 0, 2, 1, d, 3), d);
    std::mt19937_64 random(d);
    std::uniform_real_distribution<double> angle(0.0, 6.3);
    for (std::size_t i = 0; i < p.cos.size(); ++i) {
      const double a = angle(random);
      p.cos[i] = FloatFromHalf(HalfFromFloat(static_cast<float>(std::cos(a))));
      p.sin[i] = FloatFromHalf(HalfFromFloat(static_cast<float>(std::sin(a))));
    }
    Derive(&p);
    for (const AttentionKernel& kernel : AttentionKernels()) {
      if ((kernel.isa & SupportedIsa()) != kernel.isa) continue;
      for (const Types& types : kTypes) {
        Problem rounded = p;
        for (std::size_t i = 0; i < p.key.size(); ++i) {
          const std::size_t token = i / d;
          const std::size_t f = i % d;
          const std::size_t partner = f < d / 2 ? f + d / 2 : f - d / 2;
          const float* states = &p.qkv[(token * 4 + 2) * d];
          const double terms = std::fabs(p.cos[token * d / 2 + f % (d / 2)] * states[f]) +
                               std::fabs(p.sin[token * d / 2 + f % (d / 2)] * states[partner]);
          const double got = RotatedKey(p, kernel, types, i);
          const double bound =
              FLT_EPSILON * terms + (types.half_cache ? std::fabs(p.key[i]) * 0x1p-11 : 0);
          check->Expect(std::fabs(got - p.key[i]) <= bound, kernel.name, " d=", d, " key ", i,
                        ": got ", got, " want ", p.key[i]);
          rounded.key[i] = got;
        }
        Run(check, rounded, kernel, types, true, Executor(), Reference(rounded));
      }
    }
  }
}

void NothingToDo(Checker* check) {
  Problem p = Shape(0, 3, 2, 1, 4, 3);
  RunAll(check, Make(p, 8));
  p.b = 0;
  p.s = 1;
  RunAll(check, p);
}

}  // namespace
}  // namespace bivlm::testing

int main() {
  bivlm::testing::Checker check;
  bivlm::testing::Decode(&check);
  bivlm::testing::Prefill(&check);
  bivlm::testing::Batches(&check);
  bivlm::testing::Threads(&check);
  bivlm::testing::LargeScores(&check);
  bivlm::testing::NotFinite(&check);
  bivlm::testing::RoundedRotations(&check);
  bivlm::testing::NothingToDo(&check);
  std::printf("kernels tested: %s\n",
              bivlm::AvailableAttentionNames(bivlm::SupportedIsa()).c_str());
  return check.Finish("attention_test");
}
