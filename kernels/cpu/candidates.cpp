// SPDX-License-Identifier: Apache-2.0
// The pool of candidates on the CPU; see vllm_clover2/ops/candidates.py for what
// the ops compute. A request's pool is some hundred rows, parents first, so one
// pass over them in order does what takes many small tensor operations.

#include "ops.h"
#include "rows.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace clover2::cpu {

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLeastCredit = 1e-6f;
// See the reference: sums of logs on the grid are exact.
constexpr float kGrid = 1.0f / 4096.0f;
constexpr float kLeastLog = -60.0f;

// What a request's context nodes are; row i + 1 of the pool is node i.
struct Context {
  int64_t size;
  const int32_t* depths;
  const float* below;
};

void context_joint(const Context& nodes, const int64_t* parents, float* joint) {
  joint[0] = 0.0f;
  for (int64_t i = 0; i < nodes.size; ++i) {
    if (nodes.depths[i] == 0) {
      joint[i + 1] = kNone;
      continue;
    }
    const float log = std::floor(std::log(nodes.below[i]) / kGrid) * kGrid;
    joint[i + 1] = joint[parents[i + 1]] + std::max(log, kLeastLog);
  }
}

// Indices of the likeliest, ties by index.
std::vector<int64_t> likeliest(const float* values, int64_t size, int64_t count) {
  std::vector<int64_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  count = std::min(count, size);
  std::partial_sort(order.begin(), order.begin() + count, order.end(),
                    [values](int64_t a, int64_t b) {
                      return values[a] != values[b] ? values[a] > values[b]
                                                    : a < b;
                    });
  order.resize(count);
  return order;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> add_candidates(
    Tensor& tokens,   // [B, T] int64
    Tensor& parents,  // [B, T] int64
    Tensor& joint,    // [B, T] float32
    Tensor& below,    // [B, N] float32
    Tensor& credit,   // [B, N] float32
    Tensor& by_head,  // [B, N] bool
    const Tensor& depths, const Tensor& beside, int64_t first, int64_t level,
    const Tensor& rows, const Tensor& open, const Tensor& asked,
    const Tensor& child_values, const Tensor& child_tokens, int64_t width) {
  STD_TORCH_CHECK(rows.dim() == 2 && depths.dim() == 2 && asked.dim() == 1 &&
                      child_values.dim() == 2,
                  "rows, depths and child_values must be matrices, asked a "
                  "vector");
  const int64_t requests = rows.size(0), places = rows.size(1);
  const int64_t nodes = depths.size(1), count = asked.size(0);
  const int64_t children = child_values.size(1);
  const int64_t end = first + places * children;
  STD_TORCH_CHECK(first > nodes && width >= 1, "first must be beyond the ",
                  nodes, " context nodes and width at least 1, found ", first,
                  " and ", width);
  const Rows<int64_t> all_tokens(tokens, "tokens", ScalarType::Long, requests,
                                 end);
  const Rows<int64_t> all_parents(parents, "parents", ScalarType::Long,
                                  requests, end);
  const Rows<float> all_joint(joint, "joint", ScalarType::Float, requests, end);
  const Rows<float> all_below(below, "below", ScalarType::Float, requests,
                              nodes);
  const Rows<float> all_credit(credit, "credit", ScalarType::Float, requests,
                               nodes);
  const Rows<bool> all_by_head(by_head, "by_head", ScalarType::Bool, requests,
                               nodes);
  const Rows<int32_t> all_depths(depths, "depths", ScalarType::Int, requests,
                                 nodes);
  const Rows<float> all_beside(beside, "beside", ScalarType::Float, requests,
                               nodes);
  const Rows<int64_t> all_rows(rows, "rows", ScalarType::Long, requests, places);
  const Rows<float> all_open(open, "open_", ScalarType::Float, requests, places);
  const Rows<float> values(child_values, "child_values", ScalarType::Float,
                           count, children);
  const Rows<int64_t> drafted(child_tokens, "child_tokens", ScalarType::Long,
                              count, children);
  check_vector(asked, "asked", ScalarType::Long, count);

  std::vector<int64_t> states(requests * places, -1);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t place = asked.const_data_ptr<int64_t>()[i];
    check_row(place, requests * places, "asked");
    states[place] = i;
  }
  const int64_t next = std::min(width, nodes + places * children);
  const auto column = [&](ScalarType dtype) {
    return torch::stable::new_empty(rows, {requests, next}, dtype);
  };
  Tensor next_rows = column(ScalarType::Long);
  Tensor next_tokens = column(ScalarType::Long);
  Tensor next_parents = column(ScalarType::Long);
  Tensor next_open = column(ScalarType::Float);

  std::vector<float> held(nodes + 1), head(nodes), level_joint;
  std::vector<int64_t> state_of(nodes + 1);
  for (int64_t b = 0; b < requests; ++b) {
    int64_t* token = all_tokens[b];
    int64_t* parent = all_parents[b];
    float* log = all_joint[b];
    int64_t* state = states.data() + b * places;
    const Context context{nodes, all_depths[b], all_below[b]};
    for (int64_t i = 0; i < nodes; ++i) {
      check_row(parent[i + 1], i + 1, "parents");
    }
    std::fill(held.begin(), held.end(), 0.0f);
    for (int64_t i = 0; i < nodes; ++i) {
      held[parent[i + 1]] += all_beside[b][i];
    }
    std::fill(state_of.begin(), state_of.end(), -1);
    for (int64_t f = 0; f < places; ++f) {
      check_row(all_rows[b][f], first, "rows");
      if (!(all_open[b][f] > 0.0f)) state[f] = -1;
      if (state[f] >= 0 && all_rows[b][f] <= nodes) {
        state_of[all_rows[b][f]] = state[f];
      }
    }

    // What both sources say of context nodes whose parent was asked about.
    for (int64_t i = 0; i < nodes; ++i) {
      const int64_t of_parent =
          context.depths[i] > 0 ? state_of[parent[i + 1]] : -1;
      if (of_parent < 0) continue;
      float by_the_head = 0.0f;
      for (int64_t j = 0; j < children; ++j) {
        if (drafted[of_parent][j] != token[i + 1]) continue;
        by_the_head += std::exp(values[of_parent][j]);
        all_by_head[b][i] = true;
      }
      const float own = all_beside[b][i];
      const float mixture =
          std::min(1.0f, own + (1.0f - held[parent[i + 1]]) * by_the_head);
      all_below[b][i] = mixture;
      all_credit[b][i] = own / std::max(mixture, kLeastCredit);
    }
    context_joint(context, parent, log);

    // The head's own candidates.
    for (int64_t f = 0; f < places; ++f) {
      const int64_t row = all_rows[b][f];
      const bool own = row <= nodes;
      const float above = log[row] + (own ? std::log1p(-held[row]) : 0.0f);
      for (int64_t j = 0; j < children; ++j) {
        const int64_t place = first + f * children + j;
        // As in the reference, a place that was not asked about has any token.
        token[place] = drafted[std::max<int64_t>(state[f], 0)][j];
        parent[place] = row;
        log[place] = state[f] < 0 ? kNone : above + values[state[f]][j];
      }
    }
    for (int64_t i = 0; i < nodes; ++i) {
      if (context.depths[i] == 0 || state_of[parent[i + 1]] < 0) continue;
      for (int64_t f = 0; f < places; ++f) {
        if (all_rows[b][f] != parent[i + 1] || state[f] < 0) continue;
        for (int64_t j = 0; j < children; ++j) {
          const int64_t place = first + f * children + j;
          if (token[place] == token[i + 1]) log[place] = kNone;
        }
      }
    }

    level_joint.assign(nodes + places * children, kNone);
    for (int64_t i = 0; i < nodes; ++i) {
      if (context.depths[i] == level && state_of[parent[i + 1]] >= 0) {
        level_joint[i] = log[i + 1];
      }
    }
    std::copy(log + first, log + end, level_joint.begin() + nodes);
    const std::vector<int64_t> chosen =
        likeliest(level_joint.data(), nodes + places * children, next);
    for (int64_t i = 0; i < next; ++i) {
      const int64_t at = chosen[i], out = b * next + i;
      const bool own = at < nodes, none = level_joint[at] == kNone;
      const int64_t row = own ? at + 1 : first + at - nodes;
      const int64_t of_parent =
          own ? state_of[parent[row]] : state[(at - nodes) / children];
      next_rows.mutable_data_ptr<int64_t>()[out] = row;
      next_tokens.mutable_data_ptr<int64_t>()[out] = none ? 0 : token[row];
      next_parents.mutable_data_ptr<int64_t>()[out] = none ? 0 : of_parent;
      next_open.mutable_data_ptr<float>()[out] =
          std::exp(level_joint[at]) * (1.0f - (own ? held[row] : 0.0f));
    }
  }
  return {next_rows, next_tokens, next_parents, next_open};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> best_candidates(
    const Tensor& parents,  // [B, T] int64
    const Tensor& joint,    // [B, T] float32
    const Tensor& below,    // [B, N] float32
    const Tensor& depths,   // [B, N] int32
    int64_t num_nodes) {
  STD_TORCH_CHECK(
      parents.dim() == 2 && depths.dim() == 2 && num_nodes >= 1,
      "parents and depths must be matrices and num_nodes at least 1");
  const int64_t requests = parents.size(0), size = parents.size(1);
  const int64_t nodes = depths.size(1);
  STD_TORCH_CHECK(size > nodes, "parents must have a row for the root and the ",
                  nodes, " context nodes, found ", size);
  const Rows<int64_t> all_parents(parents, "parents", ScalarType::Long,
                                  requests, size);
  const Rows<float> all_joint(joint, "joint", ScalarType::Float, requests,
                              size);
  const Rows<float> all_below(below, "below", ScalarType::Float, requests,
                              nodes);
  const Rows<int32_t> all_depths(depths, "depths", ScalarType::Int, requests,
                                 nodes);
  const int64_t most = std::min(num_nodes, size - 1);
  const auto column = [&](ScalarType dtype) {
    return torch::stable::new_empty(parents, {requests, most}, dtype);
  };
  Tensor rows = column(ScalarType::Long);
  Tensor links = column(ScalarType::Int);
  Tensor tree_depths = column(ScalarType::Int);
  Tensor values = column(ScalarType::Float);
  Tensor sizes =
      torch::stable::new_empty(parents, {requests}, ScalarType::Int);

  std::vector<float> log(size);
  std::vector<int32_t> row_of(size), depth_of(size);
  for (int64_t b = 0; b < requests; ++b) {
    const int64_t* parent = all_parents[b];
    std::copy_n(all_joint[b], size, log.begin());
    for (int64_t row = 1; row < size; ++row) {
      check_row(parent[row], row, "parents");
    }
    context_joint({nodes, all_depths[b], all_below[b]}, parent, log.data());
    const std::vector<int64_t> order = likeliest(log.data() + 1, size - 1, most);
    int32_t kept = 0;
    row_of[0] = depth_of[0] = 0;
    for (int64_t i = 0; i < most; ++i) {
      const int64_t row = order[i] + 1, out = b * most + i;
      const bool none = log[row] == kNone;
      if (!none) {
        row_of[row] = ++kept;
        depth_of[row] = depth_of[parent[row]] + 1;
      }
      rows.mutable_data_ptr<int64_t>()[out] = none ? 0 : row;
      links.mutable_data_ptr<int32_t>()[out] = none ? 0 : row_of[parent[row]];
      tree_depths.mutable_data_ptr<int32_t>()[out] = none ? 0 : depth_of[row];
      values.mutable_data_ptr<float>()[out] = log[row];
    }
    sizes.mutable_data_ptr<int32_t>()[b] = kept;
  }
  return {rows, links, tree_depths, values, sizes};
}

}  // namespace clover2::cpu
