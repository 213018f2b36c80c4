// A Clover-2 draft model in bfloat16 or float32 on a CPU with AVX-512: taking in accepted tokens, and growing trees.
//
// A draft of a small model is a hundred operations of some microseconds each, most of which is calling them. Here a
// step is two calls. The definition is rollout/speculation/clover.py and clover_trees.py; between products this keeps
// floats where torch rounds to bfloat16.

#include <cstring>
#include <functional>

#include "beams.h"
#include "block.h"

namespace {

// As kernels/clover_draft/__init__.py lays them out.
struct Sizes {
  int64_t vocabulary, size, layers, heads, kv_heads, width, inner, depths;
};

// Hands out pointers in the order of their names.
template <typename T>
struct Tensors {
  const T* const* next;

  const T* one() { return *next++; }
  Linear<T> linear(bool has_bias) {
    const T* weight = one();
    return {weight, has_bias ? one() : nullptr};
  }
  Decoder<T> decoder() {
    const T* norm = one();
    const Linear<T> query = linear(true);
    return {norm, query, linear(true)};
  }
  BlockLayer<T> layer() {
    BlockLayer<T> found{};
    found.input_norm = one();
    found.qkv = linear(false);
    found.q_norm = one();
    found.k_norm = one();
    found.o = linear(false);
    found.post_norm = one();
    found.gate_up = linear(false);
    found.down = linear(false);
    return found;
  }
};

template <typename T>
struct Draft {
  Sizes sizes;
  Decoder<T> extract;
  std::vector<BlockLayer<T>> layers;
  const T* block_norm;
  Decoder<T> regress;
  Linear<T> root_project, state_project, token_project;
  const T* head_norm;
  const T *trust, *trust_bias, *trust_by_depth;  // [2, H], [2], [depths, 2]
  const T *embedding, *head;                     // [V, H], the target's

  Draft(const T* const* tensors, const int64_t* numbers) {
    std::memcpy(&sizes, numbers, sizeof(sizes));
    Tensors<T> from{tensors};
    extract = from.decoder();
    for (int64_t layer = 0; layer < sizes.layers; ++layer) layers.push_back(from.layer());
    block_norm = from.one();
    regress = from.decoder();
    root_project = from.linear(true);
    state_project = from.linear(true);
    token_project = from.linear(false);
    head_norm = from.one();
    trust = from.one();
    trust_bias = from.one();
    trust_by_depth = from.one();
    embedding = from.one();
    head = from.one();
  }
};

inline float number(float value) { return value; }
inline float number(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

struct Request {
  int64_t seed, position;
  Sampling how;
};

// Trees of B requests, layer by layer; owns what one layer hands to the next.
template <typename T>
class Growth {
 public:
  Growth(const Draft<T>& draft, const std::vector<Request>& requests, const T* roots, int64_t width)
      : draft_(draft),
        requests_(requests),
        width_(width),
        states_(requests.size() * draft.sizes.size),
        scores_(draft.sizes.vocabulary),
        noise_((draft.sizes.vocabulary + kNoiseTokens - 1) / kNoiseTokens * kNoiseTokens) {
    for (size_t i = 0; i < states_.size(); i += kVector) store(&states_[i], load(roots + i));
    for (size_t b = 0; b < requests.size(); ++b) layer_.push_back({{0.0f, 0, 0}});
  }

  // The nodes of the next layer, by request.
  const std::vector<std::vector<Candidate>>& grow() {
    const Sizes& s = draft_.sizes;
    const Rows<T> output = depth_ == 0 ? root_output() : node_output();
    const Rows<T> logits = Linear<T>{draft_.head, nullptr}(output, s.size, s.vocabulary);
    int64_t row = 0;
    for (size_t b = 0; b < requests_.size(); ++b) {
      const Request& request = requests_[b];
      draw({static_cast<uint64_t>(request.seed), static_cast<uint64_t>(request.position + 1 + depth_), 0},
           request.how.temperature, s.vocabulary, noise_);
      const bool cuts = request.how.cuts(s.vocabulary);
      Best children(width_);
      for (int64_t parent = 0; parent < static_cast<int64_t>(layer_[b].size()); ++parent, ++row) {
        const T* read = &output[row * s.size];
        const T* said = &logits[row * s.vocabulary];
        const float floor = cuts ? least_kept(said, s.vocabulary, request.how, order_) : -INFINITY;
        offer_children(said, s.vocabulary, noise_.data(), floor, trusted(read, 0), trusted(read, 1),
                       layer_[b][parent].score, parent, scores_, children);
      }
      layer_[b] = children.kept();
    }
    ++depth_;
    return layer_;
  }

 private:
  // How much the logits (0) and the noise (1) count.
  float trusted(const T* output, int64_t which) const {
    const int64_t size = draft_.sizes.size, depth = std::min(depth_, draft_.sizes.depths - 1);
    return softplus(dot(output, draft_.trust + which * size, size) + number(draft_.trust_bias[which]) +
                    number(draft_.trust_by_depth[2 * depth + which]));
  }

  Rows<T> root_output() const {
    const int64_t size = draft_.sizes.size;
    return normalised(draft_.root_project(rounded<T>(states_), size, size), draft_.head_norm, size);
  }

  // Mixes the nodes of the layer into the states of their parents.
  Rows<T> node_output() {
    const int64_t size = draft_.sizes.size;
    std::vector<int64_t> tokens;
    Floats states;
    int64_t first = 0;  // row of the request's first parent
    for (size_t b = 0; b < requests_.size(); ++b) {
      for (const Candidate& node : layer_[b]) {
        tokens.push_back(node.token);
        const auto parent = states_.begin() + (first + node.parent) * size;
        states.insert(states.end(), parent, parent + size);
      }
      first += parents_.empty() ? 1 : parents_[b];
    }
    parents_.clear();
    for (const auto& nodes : layer_) parents_.push_back(static_cast<int64_t>(nodes.size()));
    states_ = std::move(states);
    const Rows<T> token = looked_up(draft_.embedding, tokens.data(), static_cast<int64_t>(tokens.size()), size);
    draft_.regress.mix(states_, token, size, draft_.sizes.heads);
    Floats sum(states_.size());
    add(sum, draft_.state_project(rounded<T>(states_), size, size));
    add(sum, draft_.token_project(token, size, size));
    return normalised(sum, draft_.head_norm, size);
  }

  const Draft<T>& draft_;
  const std::vector<Request>& requests_;
  int64_t width_, depth_ = 0;
  Floats states_;                              // of the nodes of layer_, or of the roots
  std::vector<std::vector<Candidate>> layer_;  // by request
  std::vector<int64_t> parents_;               // rows of states_, by request; empty while these are the roots
  Floats scores_, noise_, order_;
};

// The score that a node needs to be among the `budget` best of a tree.
float floor_of(std::vector<float> scores, int64_t budget) {
  std::nth_element(scores.begin(), scores.begin() + budget - 1, scores.end(), std::greater<>());
  return scores[budget - 1];
}

// Trees of `count` requests from their roots [count, H]: `width` nodes in each layer, at most `depth` layers, fewer
// where none of another would be among the `budget` best of any tree. top_k and top_p may be null. tokens, parents and
// scores are [count, depth * width]; parents as in rollout/speculation/tree.py; the score of a node that is missing
// because too few tokens were kept is -inf. Returns the layers grown.
template <typename T>
int64_t grow(const T* const* tensors, const int64_t* sizes, const T* roots, int64_t count, const int64_t* seeds,
             const int64_t* positions, const float* temperature, const int64_t* top_k, const float* top_p,
             int64_t depth, int64_t width, int64_t budget, int64_t* tokens, int64_t* parents, float* scores) {
  const Draft<T> draft(tensors, sizes);
  std::vector<Request> requests;
  for (int64_t b = 0; b < count; ++b) {
    const Sampling how{temperature[b], top_k == nullptr ? 0 : top_k[b], top_p == nullptr ? 1.0f : top_p[b]};
    requests.push_back({seeds[b], positions[b], how});
  }
  Growth<T> growth(draft, requests, roots, width);
  std::vector<std::vector<float>> grown(count);
  for (int64_t layer = 0; layer < depth; ++layer) {
    const auto& nodes = growth.grow();
    bool is_full = (layer + 1) * width >= budget;
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t place = 0; place < width; ++place) {
        const int64_t at = (b * depth + layer) * width + place;
        const bool is_there = place < static_cast<int64_t>(nodes[b].size());
        const Candidate node = is_there ? nodes[b][place] : Candidate{-INFINITY, 0, 0};
        tokens[at] = node.token;
        parents[at] = layer ? node.parent + 1 + (layer - 1) * width : 0;
        scores[at] = node.score;
        grown[b].push_back(node.score);
      }
      is_full = is_full && grown[b][layer * width] <= floor_of(grown[b], budget);
    }
    if (is_full) return layer + 1;
  }
  return depth;
}

// Takes `rows` tokens and the target's hidden states [rows, H] into the memories of `count` sequences, one after the
// other; memory m is memories[m], of shape [layers, 2, K, capacity, D], and numbers[m] are its capacity, length, new
// rows and the position of the first of these. roots [count, H] are the block's last states.
template <typename T>
void extend(const T* const* tensors, const int64_t* sizes, float rope_theta, int64_t count, T* const* memories,
            const int64_t* numbers, const int64_t* tokens, const T* hidden, T* roots) {
  const Draft<T> draft(tensors, sizes);
  const Sizes& s = draft.sizes;
  const BlockShape shape{s.size, s.heads, s.kv_heads, s.width, s.inner, rope_theta};
  std::vector<Memory<T>> all;
  Floats cosines, sines;
  for (int64_t m = 0; m < count; ++m) {
    const int64_t* n = numbers + 4 * m;
    all.push_back({memories[m], n[0], n[1], n[2], n[3]});
    for (int64_t row = 0; row < n[2]; ++row)
      for (int64_t i = 0; i < s.width / 2; ++i) {
        const float angle = static_cast<float>(n[3] + row) *
                            std::pow(rope_theta, -2.0f * static_cast<float>(i) / static_cast<float>(s.width));
        cosines.push_back(std::cos(angle));
        sines.push_back(std::sin(angle));
      }
  }
  const auto rows = static_cast<int64_t>(cosines.size()) / (s.width / 2);
  Floats state(rows * s.size);
  for (size_t i = 0; i < state.size(); i += kVector) store(&state[i], load(hidden + i));
  draft.extract.mix(state, looked_up(draft.embedding, tokens, rows, s.size), s.size, s.heads);
  for (int64_t layer = 0; layer < s.layers; ++layer)
    draft.layers[layer].forward(state, all, layer, cosines, sines, shape);
  int64_t row = -1;
  for (int64_t m = 0; m < count; ++m) {
    row += all[m].count;
    normalise(&state[row * s.size], draft.block_norm, s.size, roots + m * s.size);
  }
}

}  // namespace

#define LONGROLL_DRAFT(T, type)                                                                                        \
  extern "C" int64_t grow_##type(const T* const* tensors, const int64_t* sizes, const T* roots, int64_t count,         \
                                 const int64_t* seeds, const int64_t* positions, const float* temperature,             \
                                 const int64_t* top_k, const float* top_p, int64_t depth, int64_t width,               \
                                 int64_t budget, int64_t* tokens, int64_t* parents, float* scores) {                   \
    return grow(tensors, sizes, roots, count, seeds, positions, temperature, top_k, top_p, depth, width, budget,       \
                tokens, parents, scores);                                                                              \
  }                                                                                                                    \
  extern "C" void extend_##type(const T* const* tensors, const int64_t* sizes, float rope_theta, int64_t count,        \
                                T* const* memories, const int64_t* numbers, const int64_t* tokens, const T* hidden,    \
                                T* roots) {                                                                            \
    extend(tensors, sizes, rope_theta, count, memories, numbers, tokens, hidden, roots);                               \
  }

LONGROLL_DRAFT(uint16_t, bfloat16)
LONGROLL_DRAFT(float, float32)
