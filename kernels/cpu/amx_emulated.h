// SPDX-License-Identifier: Apache-2.0
// Layout kAmx without the matrix unit, in the order in which that unit adds:
// per tile (32 elements deep) even and odd elements are summed apart. For
// machines that got a cache of this layout but lack AMX, and for tests.
// Included after simd.h.

namespace clover2::cpu::CLOVER2_ISA {

struct AmxEmulatedKernel {
  using Element = BFloat16;
  using Query = BFloat16;
  using Probability = BFloat16;
  static constexpr int64_t kLeastPiece = 128;  // of keys, in vLLM's division
  static constexpr bool kScaleLogits = true;   // queries stay exact bf16 values
  static constexpr int64_t kTileElements = kTileRows * kTileRows * kPair;

  explicit AmxEmulatedKernel(int64_t dim) : dim(dim) {}

  void pack_query(const Element* source, int64_t index, float,
                  Query* packed) const {
    std::memcpy(packed + index * dim, source, dim * sizeof(Element));
  }

  void begin(int64_t) const {}
  void end() const {}

  int64_t key_offset(int64_t token) const { return token * dim; }
  int64_t value_offset(int64_t token) const { return token * kTileRows; }

  // start + a[depth] * tiles[depth][kLanes of 16]; the tiles follow each other.
  CLOVER2_INLINE static floats dot(const floats& start, const Element* a,
                                   const Element* tiles, int64_t depth) {
    floats accumulator = start;
    for (int64_t begin = 0; begin < depth; begin += kTileRows * kPair) {
      floats even_sum = {};
      floats odd_sum = {};
      for (int64_t pair = 0; pair < kTileRows; ++pair) {
        const words both = load<words>(tiles + pair * kTileRows * kPair);
        const words low = both << 16;
        const words high = both & 0xffff0000u;
        const float even = a[begin + pair * kPair];
        const float odd = a[begin + pair * kPair + 1];
        even_sum = multiply_add(broadcast(even), load<floats>(&low), even_sum);
        odd_sum = multiply_add(broadcast(odd), load<floats>(&high), odd_sum);
      }
      accumulator += even_sum + odd_sum;
      tiles += kTileElements;
    }
    return accumulator;
  }

  void query_key(int64_t queries, const Query* query, const Element* keys,
                 int64_t, float* logits, int64_t stride) const {
    for (int64_t i = 0; i < queries; ++i) {
      for (int64_t token = 0; token < kGroupTokens; token += kLanes) {
        const int64_t column = token % kTileRows;
        const Element* tiles = keys + (token - column) * dim + column * kPair;
        store_floats(logits + i * stride + token,
                     dot(floats{}, query + i * dim, tiles, dim));
      }
    }
  }

  void probability_value(int64_t queries, const Probability* probabilities,
                         int64_t stride, const Element* values, int64_t tokens,
                         int64_t block_size, float* out) const {
    for (int64_t i = 0; i < queries; ++i) {
      for (int64_t d = 0; d < dim; d += kLanes) {
        const int64_t column = d % kTileRows;
        const Element* tiles =
            values + (d - column) * block_size + column * kPair;
        float* target = out + i * dim + d;
        store_floats(target, dot(load_floats(target),
                                 probabilities + i * stride, tiles, tokens));
      }
    }
  }

  void copy_values(const Element* source, int64_t source_block, Element* target,
                   int64_t target_block, int64_t tokens) const {
    for (int64_t token = 0; token < tokens; ++token) {
      copy_value(source, token, source_block, target, token, target_block);
    }
  }

  void copy_value(const Element* source, int64_t source_token,
                  int64_t source_block, Element* target, int64_t target_token,
                  int64_t target_block) const {
    for (int64_t d = 0; d < dim; ++d) {
      target[amx_value(target_token, d, target_block, 0)] =
          source[amx_value(source_token, d, source_block, 0)];
    }
  }

  int64_t dim;
};

}  // namespace clover2::cpu::CLOVER2_ISA
