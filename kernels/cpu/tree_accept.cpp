// SPDX-License-Identifier: Apache-2.0
// tree_accept on the CPU: the walk from the root along the target's choices.
// Integers only; a request costs at most max_depth scans of its (at most 64)
// rows.

#include "../common/checks.h"
#include "ops.h"

#include <torch/csrc/stable/ops.h>

namespace clover2::cpu {

namespace {

// Writes the accepted rows to `path` and returns their number; `*next` gets the
// target's choice after the last of them.
int32_t walk(const int64_t* target, const int64_t* draft,
             const int32_t* parents, int64_t rows, int64_t max_depth,
             int32_t* path, int64_t* next) {
  int32_t accepted = 0;
  int64_t node = 0;
  *next = target[0];
  // Children come after their parent, so one pass over the rows is enough. The
  // first matching sibling wins: after it, `node` is no longer the parent.
  for (int64_t row = 1; row < rows && accepted < max_depth; ++row) {
    if (parents[row] == node && draft[row] == *next) {
      node = row;
      path[accepted++] = static_cast<int32_t>(row);
      *next = target[row];
    }
  }
  return accepted;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> tree_accept(
    const Tensor& target_tokens,  // [rows] int64
    const Tensor& draft_tokens,   // [rows] int64
    const Tensor& parents,        // [rows] int32
    const Tensor& row_offsets,    // [R + 1] int32
    int64_t max_depth) {
  const int64_t requests = check_tree_accept(target_tokens, draft_tokens,
                                             parents, row_offsets, max_depth);
  Tensor paths = torch::stable::new_empty(row_offsets, {requests, max_depth});
  Tensor lengths = torch::stable::new_empty(row_offsets, {requests});
  Tensor next_tokens = torch::stable::new_empty(target_tokens, {requests});
  const int32_t* offsets = row_offsets.const_data_ptr<int32_t>();
  const int64_t* target = target_tokens.const_data_ptr<int64_t>();
  const int64_t* draft = draft_tokens.const_data_ptr<int64_t>();
  const int32_t* parent = parents.const_data_ptr<int32_t>();
  int32_t* path = paths.mutable_data_ptr<int32_t>();
  int32_t* length = lengths.mutable_data_ptr<int32_t>();
  int64_t* next = next_tokens.mutable_data_ptr<int64_t>();

  for (int64_t i = 0; i < requests * max_depth; ++i) path[i] = -1;
  for (int64_t request = 0; request < requests; ++request) {
    const int64_t first = offsets[request];
    const int64_t rows = offsets[request + 1] - first;
    STD_TORCH_CHECK(rows >= 0 && first >= 0 && first + rows <= parents.size(0),
                    "row_offsets must ascend within the ", parents.size(0),
                    " rows; request ", request, " has rows ", first, " to ",
                    first + rows);
    length[request] = 0;
    next[request] = -1;
    if (rows == 0) continue;
    length[request] =
        walk(target + first, draft + first, parent + first, rows, max_depth,
             path + request * max_depth, next + request);
  }
  return {paths, lengths, next_tokens};
}

}  // namespace clover2::cpu
