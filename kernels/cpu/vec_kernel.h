// SPDX-License-Identifier: Apache-2.0
// The products of attention over a cache in layout kVec: float vectors, a token
// group of keys (or 32 dimensions of values) per register pair. Included once
// per instruction set, after simd.h.

namespace clover2::cpu::CLOVER2_ISA {

// c[M][16 * N] (+)= a[M][depth] * b[depth][16 * N]; accumulators stay in
// registers.
template <int M, int N, bool kAccumulate, typename Element>
CLOVER2_INLINE void multiply_block(const float* a, int64_t lda,
                                   const Element* b, int64_t ldb, int64_t depth,
                                   float* c, int64_t ldc) {
  constexpr int V = 16 * N / kLanes;
  floats accumulator[M][V];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      accumulator[i][v] =
          kAccumulate ? load_floats(c + i * ldc + v * kLanes) : floats{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    floats right[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      right[v] = load_floats(b + k * ldb + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const floats left = broadcast(a[i * lda + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        accumulator[i][v] = multiply_add(left, right[v], accumulator[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      store_floats(c + i * ldc + v * kLanes, accumulator[i][v]);
    }
  }
}

// As many rows as accumulators of 32 columns fit into the registers: 32 with
// AVX-512, else 16.
constexpr int kRowsAtOnce = kLanes == 16 ? 8 : kLanes == 8 ? 2 : 1;

// multiply_block for any number of rows: M at once, then M / 2, ..
template <int N, bool kAccumulate, int M = kRowsAtOnce, typename Element>
inline void multiply(int64_t rows, const float* a, int64_t lda,
                     const Element* b, int64_t ldb, int64_t depth, float* c,
                     int64_t ldc) {
  for (; rows >= M; rows -= M, a += M * lda, c += M * ldc) {
    multiply_block<M, N, kAccumulate>(a, lda, b, ldb, depth, c, ldc);
  }
  if constexpr (M > 1) {
    multiply<N, kAccumulate, M / 2>(rows, a, lda, b, ldb, depth, c, ldc);
  }
}

// The interface that Attention (attention.h) needs of a layout. Positions of
// keys and values are given as a pointer to the first of a run of whole groups
// in one block.
template <typename ElementType>
struct VecKernel {
  using Element = ElementType;
  using Query = float;        // packed queries
  using Probability = float;  // what the values are multiplied with
  static constexpr int64_t kLeastPiece = 32;   // of keys, in vLLM's division
  static constexpr bool kScaleLogits = false;  // the packed queries are scaled

  explicit VecKernel(int64_t dim) : dim(dim) {}

  void pack_query(const Element* source, int64_t index, float scale,
                  Query* packed) const {
    for (int64_t d = 0; d < dim; d += kLanes) {
      store_floats(packed + index * dim + d, load_floats(source + d) * scale);
    }
  }

  // Shapes of the coming calls; nothing to set up here.
  void begin(int64_t) const {}
  void end() const {}

  int64_t key_offset(int64_t token) const { return token; }
  int64_t value_offset(int64_t token) const { return token * dim; }

  // logits[queries][32] of one token group.
  void query_key(int64_t queries, const Query* query, const Element* keys,
                 int64_t block_size, float* logits, int64_t stride) const {
    multiply<2, false>(queries, query, dim, keys, block_size, dim, logits,
                       stride);
  }

  // out[queries][dim] += probabilities[queries][tokens] * values.
  void probability_value(int64_t queries, const Probability* probabilities,
                         int64_t stride, const Element* values, int64_t tokens,
                         int64_t, float* out) const {
    int64_t d = 0;
    for (; d + 32 <= dim; d += 32) {
      multiply<2, true>(queries, probabilities, stride, values + d, dim, tokens,
                        out + d, dim);
    }
    if (d < dim) {
      multiply<1, true>(queries, probabilities, stride, values + d, dim, tokens,
                        out + d, dim);
    }
  }

  // Copies the values of a group's first tokens between two blocks' value
  // parts.
  void copy_values(const Element* source, int64_t, Element* target, int64_t,
                   int64_t tokens) const {
    std::memcpy(target, source, tokens * dim * sizeof(Element));
  }

  // Copies one token's value between two blocks' value parts.
  void copy_value(const Element* source, int64_t source_token, int64_t,
                  Element* target, int64_t target_token, int64_t) const {
    std::memcpy(target + target_token * dim, source + source_token * dim,
                dim * sizeof(Element));
  }

  int64_t dim;
};

}  // namespace clover2::cpu::CLOVER2_ISA
