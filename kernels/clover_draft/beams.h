// The likeliest children of a layer of nodes, and the likeliest of these.

#pragma once

#include <algorithm>
#include <limits>

#include "../gumbel_sample/noise.h"
#include "layers.h"

namespace {

struct Candidate {
  float score;  // of a token; log-probability of a path
  int64_t token, parent;
};

// Keeps the `width` best of what it is offered, best first; of equals the one that came first. A NaN is none.
class Best {
 public:
  explicit Best(int64_t width) : width_(width) {}

  float floor() const {
    return static_cast<int64_t>(kept_.size()) < width_ ? -std::numeric_limits<float>::infinity() : kept_.back().score;
  }
  void offer(const Candidate& one) {
    if (static_cast<int64_t>(kept_.size()) == width_) {
      if (!(one.score > kept_.back().score)) return;
      kept_.pop_back();
    }
    kept_.insert(std::upper_bound(kept_.begin(), kept_.end(), one,
                                  [](const Candidate& a, const Candidate& b) { return a.score > b.score; }),
                 one);
  }
  const std::vector<Candidate>& kept() const { return kept_; }

 private:
  int64_t width_;
  std::vector<Candidate> kept_;
};

// How a request draws: temperature 0 is greedy, top_k 0 and top_p 1 keep everything.
struct Sampling {
  float temperature;
  int64_t top_k;
  float top_p;

  bool cuts(int64_t vocabulary) const {
    return temperature > 0 && ((top_k > 0 && top_k < vocabulary) || top_p < 1);
  }
};

// The lowest logit that is kept: of the top_k highest, those that hold top_p of their mass, the last of them included.
// Ties with it are kept. `order` is overwritten.
template <typename T>
float least_kept(const T* logits, int64_t vocabulary, const Sampling& how, Floats& order) {
  order.resize(vocabulary);
  for (int64_t token = 0; token < vocabulary; token += kVector) store(&order[token], load(logits + token));
  const int64_t most = how.top_k > 0 ? std::min(how.top_k, vocabulary) : vocabulary;
  if (most < vocabulary) std::nth_element(order.begin(), order.begin() + most, order.end(), std::greater<>());
  const auto end = order.begin() + most;
  if (!(how.top_p < 1)) return *std::min_element(order.begin(), end);
  const float largest = *std::max_element(order.begin(), end), inverse = 1 / how.temperature;
  double total = 0, mass = 0;
  for (auto one = order.begin(); one != end; ++one) total += std::exp(static_cast<double>((*one - largest) * inverse));
  std::make_heap(order.begin(), end);
  auto last = end;
  float least = largest;
  while (last != order.begin() && mass < how.top_p * total) {
    least = order.front();
    mass += std::exp(static_cast<double>((least - largest) * inverse));
    std::pop_heap(order.begin(), last--);
  }
  return least;
}

// Offers the best children of a node: log-softmax of logit_weight · logits + noise_weight · T · noise, onto `path`,
// over the logits from `floor` on. scores [V] is overwritten.
template <typename T>
void offer_children(const T* logits, int64_t vocabulary, const float* drawn, float floor, float logit_weight,
                    float noise_weight, float path, int64_t parent, Floats& scores, Best& children) {
  __m512 most = constant(-std::numeric_limits<float>::infinity());
  for (int64_t token = 0; token < vocabulary; token += kVector) {
    const __m512 logit = load(logits + token);
    __m512 score = _mm512_fmadd_ps(constant(noise_weight), load(drawn + token),
                                   _mm512_mul_ps(constant(logit_weight), logit));
    const __mmask16 is_cut = _mm512_cmp_ps_mask(logit, constant(floor), _CMP_LT_OQ);
    score = _mm512_mask_mov_ps(score, is_cut, constant(-std::numeric_limits<float>::infinity()));
    store(&scores[token], score);
    most = _mm512_max_ps(most, score);
  }
  const float largest = _mm512_reduce_max_ps(most);
  __m512 total = _mm512_setzero_ps();
  for (int64_t token = 0; token < vocabulary; token += kVector)
    total = _mm512_add_ps(total, exp(_mm512_sub_ps(load(&scores[token]), constant(largest))));
  const float shift = path - largest - std::log(_mm512_reduce_add_ps(total));
  const __m512 most_likely = constant(path);  // rounding may not make a child likelier than its parent
  for (int64_t token = 0; token < vocabulary; token += kVector) {
    const __m512 score = _mm512_min_ps(most_likely, _mm512_add_ps(load(&scores[token]), constant(shift)));
    __mmask16 better = _mm512_cmp_ps_mask(score, constant(children.floor()), _CMP_GT_OQ);
    alignas(64) float lanes[kVector];
    if (better) _mm512_store_ps(lanes, score);
    for (; better; better &= better - 1) {
      const int lane = __builtin_ctz(better);
      children.offer({lanes[lane], token + lane, parent});
    }
  }
}

// T · Gumbel noise of a position, [V] rounded up to whole groups of tokens.
inline void draw(const Key& key, float temperature, int64_t vocabulary, Floats& out) {
  for (int64_t start = 0; start < vocabulary; start += kNoiseTokens) {
    __m512 drawn[4];
    noise(key, start, drawn);
    for (int64_t part = 0; part < 4; ++part)
      store(&out[start + part * kVector], _mm512_mul_ps(constant(temperature), drawn[part]));
  }
}

}  // namespace
