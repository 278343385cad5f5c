// SPDX-License-Identifier: Apache-2.0
// context_nodes on the CPU: earlier occurrences of a text's last tokens, and a
// trie of what followed them.
//
// One pass over the text from its recent end. The pass compares blocks of
// tokens at two offsets, which compilers turn into vector instructions, and
// stops at the few positions that can still be kept; so it costs little more
// than reading the text. A request's state is on the stack.

#include "../common/checks.h"
#include "ops.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace clover2::cpu {

namespace {

constexpr int64_t kBlock = 32;  // tokens compared before the first branch

struct Text {
  const int32_t* tokens;
  int64_t last;  // position of the last token, the root
};

// A position of the root's token, and how many tokens up to it are those up to
// the root.
struct Place {
  int64_t position;
  int64_t match;
};

// One request's rows of the outputs.
struct Nodes {
  int64_t* tokens;
  int32_t* parents;
  int32_t* depths;
  int32_t* matches;
  int32_t* places;
};

// The last position before `before` that may match `need` tokens: the first and
// the last of them do. -1 if there is none.
int64_t previous_candidate(const Text& text, int64_t before, int64_t need) {
  const int64_t reach = need - 1;
  if (before <= reach) return -1;
  const int32_t root = text.tokens[text.last];
  const int32_t far = text.tokens[text.last - reach];
  int64_t position = before;
  while (position - kBlock >= reach) {
    const int32_t* block = text.tokens + position - kBlock;
    int32_t found = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      found |= static_cast<int32_t>(block[i] == root) &
               static_cast<int32_t>(block[i - reach] == far);
    }
    if (found != 0) break;
    position -= kBlock;
  }
  while (--position >= reach) {
    if (text.tokens[position] == root && text.tokens[position - reach] == far) {
      return position;
    }
  }
  return -1;
}

int64_t match_length(const Text& text, int64_t position, int64_t max_match) {
  const int64_t limit = std::min(max_match, position + 1);
  int64_t match = 0;
  while (match < limit &&
         text.tokens[position - match] == text.tokens[text.last - match]) {
    ++match;
  }
  return match;
}

// Fills `places`, the longest match first and the most recent of equal ones
// first; returns their number.
int64_t find_places(const Text& text, const ContextLimits& limits,
                    Place* places) {
  int64_t count = 0;
  int64_t need = limits.min_match;  // shorter matches would not be kept
  int64_t position = text.last;
  while (need <= limits.max_match) {
    position = previous_candidate(text, position, need);
    if (position < 0) break;
    const int64_t match = match_length(text, position, limits.max_match);
    if (match < need) continue;
    if (count < limits.max_places) ++count;
    int64_t slot = count - 1;  // when full, the last place makes room
    for (; slot > 0 && places[slot - 1].match < match; --slot) {
      places[slot] = places[slot - 1];
    }
    places[slot] = {position, match};
    if (count == limits.max_places) need = places[count - 1].match + 1;
  }
  return count;
}

// Merges what follows the places into a trie; returns its number of nodes.
int32_t merge_continuations(const Text& text, const ContextLimits& limits,
                            const Place* places, int64_t count,
                            const Nodes& nodes) {
  // By row; 0, the root, is nobody's child and ends a list.
  int32_t first_child[kMaxContextNodes + 1] = {};
  int32_t next_sibling[kMaxContextNodes + 1] = {};
  int32_t size = 0;
  for (const Place* place = places; place < places + count; ++place) {
    const int64_t levels =
        std::min({limits.max_depth, kLevelsPerMatch * place->match,
                  text.last - place->position});
    int32_t row = 0;
    for (int64_t depth = 1; depth <= levels; ++depth) {
      const int32_t token = text.tokens[place->position + depth];
      int32_t child = first_child[row];
      while (child != 0 && nodes.tokens[child - 1] != token) {
        child = next_sibling[child];
      }
      if (child == 0) {
        if (size == limits.max_nodes) break;
        nodes.tokens[size] = token;
        nodes.parents[size] = row;
        nodes.depths[size] = static_cast<int32_t>(depth);
        nodes.matches[size] = static_cast<int32_t>(place->match);
        child = ++size;
        next_sibling[child] = first_child[row];
        first_child[row] = child;
      }
      ++nodes.places[child - 1];
      row = child;
    }
  }
  return size;
}

Text request_text(const Tensor& history, int64_t i, int64_t slot,
                  int64_t length) {
  STD_TORCH_CHECK(slot >= 0 && slot < history.size(0), "requests[", i,
                  "] must be one of the ", history.size(0),
                  " rows of history, found ", slot);
  STD_TORCH_CHECK(length >= 0 && length <= history.size(1), "lengths[", i,
                  "] must be between 0 and ", history.size(1),
                  ", the width of history, found ", length);
  return {history.const_data_ptr<int32_t>() + slot * history.stride(0),
          length - 1};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> context_nodes(
    const Tensor& history,   // [slots, width] int32
    const Tensor& requests,  // [R] int32
    const Tensor& lengths,   // [R] int32
    int64_t min_match, int64_t max_match, int64_t max_places, int64_t max_depth,
    int64_t max_nodes) {
  const ContextLimits limits{min_match, max_match, max_places, max_depth,
                             max_nodes};
  const int64_t count = check_context_nodes(history, requests, lengths, limits);
  const auto column = [&](ScalarType dtype) {
    return torch::stable::new_empty(history, {count, max_nodes}, dtype);
  };
  Tensor tokens = column(ScalarType::Long);
  Tensor parents = column(ScalarType::Int);
  Tensor depths = column(ScalarType::Int);
  Tensor matches = column(ScalarType::Int);
  Tensor followed = column(ScalarType::Int);
  Tensor sizes = torch::stable::new_empty(history, {count}, ScalarType::Int);
  const Nodes all{
      tokens.mutable_data_ptr<int64_t>(), parents.mutable_data_ptr<int32_t>(),
      depths.mutable_data_ptr<int32_t>(), matches.mutable_data_ptr<int32_t>(),
      followed.mutable_data_ptr<int32_t>()};
  std::fill_n(all.tokens, count * max_nodes, -1);
  for (int32_t* values : {all.parents, all.depths, all.matches, all.places}) {
    std::fill_n(values, count * max_nodes, 0);
  }

  Place places[kMaxContextPlaces];
  for (int64_t i = 0; i < count; ++i) {
    const Text text =
        request_text(history, i, requests.const_data_ptr<int32_t>()[i],
                     lengths.const_data_ptr<int32_t>()[i]);
    const int64_t first = i * max_nodes;
    const Nodes nodes{all.tokens + first, all.parents + first,
                      all.depths + first, all.matches + first,
                      all.places + first};
    const int64_t found = find_places(text, limits, places);
    sizes.mutable_data_ptr<int32_t>()[i] =
        merge_continuations(text, limits, places, found, nodes);
  }
  return {tokens, parents, depths, matches, followed, sizes};
}

}  // namespace clover2::cpu
