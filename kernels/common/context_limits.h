// SPDX-License-Identifier: Apache-2.0
// Sizes of context_nodes, for both devices. The upper bounds size arrays on the
// stack and in shared memory; a verified tree has at most 63 levels.
#pragma once

#include <cstdint>

namespace clover2 {

constexpr int64_t kMaxContextMatch = 64;
constexpr int64_t kMaxContextPlaces = 64;
constexpr int64_t kMaxContextDepth = 63;
constexpr int64_t kMaxContextNodes = 128;

struct ContextLimits {
  int64_t min_match;  // a place counts if this many tokens match
  int64_t max_match;  // matches are not followed back any farther
  int64_t max_places;
  int64_t max_depth;
  int64_t max_nodes;
};

// A place is followed at most this many levels per token that matched: what
// follows a short match is right less often and less far.
constexpr int64_t kLevelsPerMatch = 2;

}  // namespace clover2
