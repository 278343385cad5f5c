// SPDX-License-Identifier: Apache-2.0
// Row-wise parts of growing trees, in float vectors. Included once per
// instruction set, after simd.h.

namespace clover2::cpu::CLOVER2_ISA {

template <typename Element>
void convert_row(const Element* source, int64_t size, float* target) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    store_floats(target + i, load_floats(source + i));
  }
  for (; i < size; ++i) target[i] = static_cast<float>(source[i]);
}

inline void to_float(const void* source, ScalarType dtype, int64_t size,
                     float* target) {
  if (dtype == ScalarType::Float) {
    convert_row(static_cast<const float*>(source), size, target);
  } else if (dtype == ScalarType::BFloat16) {
    convert_row(static_cast<const BFloat16*>(source), size, target);
  } else {
    convert_row(static_cast<const Half*>(source), size, target);
  }
}

template <typename Element>
void store_row(const float* source, int64_t size, Element* target) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    store_floats(target + i, load_floats(source + i));
  }
  for (; i < size; ++i) target[i] = static_cast<Element>(source[i]);
}

inline void from_float(const float* source, int64_t size, void* target,
                       ScalarType dtype) {
  if (dtype == ScalarType::Float) {
    store_row(source, size, static_cast<float*>(target));
  } else if (dtype == ScalarType::BFloat16) {
    store_row(source, size, static_cast<BFloat16*>(target));
  } else {
    store_row(source, size, static_cast<Half*>(target));
  }
}

// The k largest so far, falling; of equal ones the first seen stays in front.
struct Largest {
  float* values;
  int64_t* indices;
  int64_t k;
  int64_t count = 0;

  void offer(float value, int64_t index) {
    if (count == k && !(value > values[k - 1])) return;
    int64_t place = count < k ? count++ : k - 1;
    for (; place > 0 && values[place - 1] < value; --place) {
      values[place] = values[place - 1];
      indices[place] = indices[place - 1];
    }
    values[place] = value;
    indices[place] = index;
  }

  // What a value must exceed, once there are k.
  float least() const { return values[k - 1]; }
};

inline void top_k(float* logits, int64_t padded, int64_t k, float* values,
                  int64_t* indices) {
  constexpr int kVectors = kRowStep / kLanes;
  const floats lowest = broadcast(-std::numeric_limits<float>::infinity());
  Largest best{values, indices, k};
  for (int64_t i = 0; i < padded; i += kRowStep) {
    floats row[kVectors], most = lowest;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      floats x = load_floats(logits + i + v * kLanes);
      x = x - x == floats{} ? x : lowest;  // NaN and infinity
      store_floats(logits + i + v * kLanes, x);
      most = maximum(most, x);
      row[v] = x;
    }
    if (best.count < k) {
      for (int64_t j = i; j < i + kRowStep; ++j) best.offer(logits[j], j);
    } else if (greater(most, broadcast(best.least())) != 0) {
      for (int v = 0; v < kVectors; ++v) {
        uint32_t lanes = greater(row[v], broadcast(best.least()));
        for (; lanes != 0; lanes &= lanes - 1) {
          const int64_t j = i + v * kLanes + __builtin_ctz(lanes);
          best.offer(logits[j], j);
        }
      }
    }
  }
  const float top = values[0];
  if (!(top - top == 0.0f)) return;  // nothing finite: all are -inf
  floats sums{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    sums = sums + exponential(load_floats(logits + i) - broadcast(top));
  }
  const float log_sum = std::log(sum(sums));
  for (int64_t i = 0; i < k; ++i) {
    // Rounding may lift log(1) above 0.
    const float value = values[i] - top - log_sum;
    values[i] = value < 0.0f ? value : 0.0f;
  }
}

inline float dot(const float* a, const float* b, int64_t size) {
  floats sums{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    sums = multiply_add(load_floats(a + i), load_floats(b + i), sums);
  }
  float result = sum(sums);
  for (; i < size; ++i) result += a[i] * b[i];
  return result;
}

inline void rms_norm(float* row, const float* weight, int64_t size, float eps) {
  const float mean = dot(row, row, size) / static_cast<float>(size);
  const float scale = 1.0f / std::sqrt(mean + eps);
  for (int64_t i = 0; i < size; ++i) row[i] *= weight[i] * scale;
}

inline void quantize(const float* row, int64_t padded, int8_t* target,
                     float* scale, int32_t* sum_of_row) {
  using bytes = int8_t __attribute__((vector_size(kLanes)));
  floats most{}, not_finite{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const floats x = load_floats(row + i);
    most = maximum(most, maximum(x, -x));
    not_finite = not_finite + (x - x);
  }
  const float largest_size = largest(most);
  const float inverse =
      largest_size >= kLeastInput ? 127.0f / largest_size : 0.0f;
  *scale = largest_size / 127.0f + sum(not_finite);
  // Adding 1.5 * 2^23 rounds to an integer, found in the lowest bits.
  const floats shift = broadcast(0x1.8p23f);
  ints sums{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const floats shifted = load_floats(row + i) * broadcast(inverse) + shift;
    const ints bits = load<ints>(&shifted);
    const bytes rounded = __builtin_convertvector(bits, bytes);
    std::memcpy(target + i, &rounded, sizeof(rounded));
    sums = sums + __builtin_convertvector(rounded, ints);
  }
  *sum_of_row = 0;
  for (int lane = 0; lane < kLanes; ++lane) *sum_of_row += sums[lane];
}

inline void add_cosine(const float* query, const float* key, const float* value,
                       int64_t heads, int64_t dim, float eps, float* state) {
  for (int64_t head = 0; head < heads; ++head) {
    const float query_norm = std::sqrt(dot(query, query, dim));
    const float key_norm = std::sqrt(dot(key, key, dim));
    const float norms = (query_norm > eps ? query_norm : eps) *
                        (key_norm > eps ? key_norm : eps);
    const float cosine = dot(query, key, dim) / norms;
    for (int64_t i = 0; i < dim; ++i) state[i] += cosine * value[i];
    query += dim;
    key += dim;
    value += dim;
    state += dim;
  }
}

template <typename Element>
void finish_rows(const GroupSums& group) {
  // Whole vectors, whatever the number of outputs.
  float scales[kGroupOutputs] = {}, bias[kGroupOutputs] = {};
  for (int64_t i = 0; i < group.outputs; ++i) {
    scales[i] = group.output_scales[i];
    if (group.bias != nullptr) bias[i] = group.bias[i];
  }
  for (int64_t row = 0; row < group.rows; ++row) {
    const int32_t* sums = group.sums + row * kGroupOutputs;
    float results[kGroupOutputs];
    for (int64_t i = 0; i < kGroupOutputs; i += kLanes) {
      const ints exact = load<ints>(sums + i);
      const floats scale =
          load_floats(scales + i) * broadcast(group.row_scales[row]);
      store_floats(results + i,
                   multiply_add(__builtin_convertvector(exact, floats), scale,
                                load_floats(bias + i)));
    }
    store_row(results, group.outputs,
              static_cast<Element*>(group.out) + row * group.stride);
  }
}

inline void finish(const GroupSums& group) {
  if (group.dtype == ScalarType::Float) {
    finish_rows<float>(group);
  } else if (group.dtype == ScalarType::BFloat16) {
    finish_rows<BFloat16>(group);
  } else {
    finish_rows<Half>(group);
  }
}

inline void fill_in(DraftKernels& kernels) {
  kernels.to_float = to_float;
  kernels.from_float = from_float;
  kernels.top_k = top_k;
  kernels.rms_norm = rms_norm;
  kernels.quantize = quantize;
  kernels.add_cosine = add_cosine;
  kernels.finish = finish;
}

}  // namespace clover2::cpu::CLOVER2_ISA
