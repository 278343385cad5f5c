// SPDX-License-Identifier: Apache-2.0
// Matrices with a row per request, as the ops over candidates take them.
#pragma once

#include "../common/checks.h"

namespace clover2::cpu {

// A matrix whose rows are contiguous.
template <typename T>
struct Rows {
  Rows(const Tensor& tensor, const char* name, ScalarType dtype, int64_t rows,
       int64_t least_columns)
      : data(static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()))),
        stride(tensor.dim() == 2 ? tensor.stride(0) : 0) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.dim() == 2 &&
                        tensor.size(0) == rows &&
                        tensor.size(1) >= least_columns &&
                        (tensor.size(1) <= 1 || tensor.stride(1) == 1),
                    name, " must be [", rows, ", at least ", least_columns,
                    "] with contiguous rows, of the dtype that the schema's "
                    "reference names");
  }

  T* operator[](int64_t row) const { return data + row * stride; }

  T* data;
  int64_t stride;
};

inline void check_row(int64_t row, int64_t end, const char* name) {
  STD_TORCH_CHECK(row >= 0 && row < end, name, " must be rows below ", end,
                  ", found ", row);
}

}  // namespace clover2::cpu
