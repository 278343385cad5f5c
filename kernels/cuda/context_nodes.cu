// SPDX-License-Identifier: Apache-2.0
// Earlier occurrences of a text's last tokens, and a trie of what followed
// them.
//
// One block per request. It reads the text from its recent end in tiles: every
// thread tests a few positions and follows those that match; then the first
// warp sorts the tile's finds, in order of position, into the list of the best
// places. Once the list is full, only positions that match longer than its last
// one are looked at. At the end all threads fetch what follows the places, and
// the first warp merges it into a trie in shared memory.
//
// Memory traffic: the text once (4 bytes per token; a second read, at an
// offset, comes from L1), the outputs once. Integers only, exact.
//
// Limits: those of common/context_limits.h. For a row or a length outside the
// history nothing is found.
#include "common/tree_math.h"
#include "device.cuh"
#include "launch.h"

namespace clover2 {
namespace {

constexpr int kContextThreads = 512;
constexpr int kContextWarps = kContextThreads / kWarpSize;
// Positions that a thread tests before the block meets: their loads overlap,
// and most texts are one tile.
constexpr int kSteps = 8;
constexpr int kTile = kSteps * kContextThreads;
constexpr int kWords = kSteps * kContextWarps;  // of a tile's ballots
constexpr int kPlaces = static_cast<int>(kMaxContextPlaces);
constexpr int kNodes = static_cast<int>(kMaxContextNodes);
static_assert(kWords % kWarpSize == 0 && kPlaces % kWarpSize == 0);

struct Place {
  int position;
  int match;
};

// In shared memory.
struct ContextState {
  int32_t suffix[kMaxContextMatch];  // the last tokens, the last one first
  Place places[kPlaces];             // the best so far, in order
  int num_places;
  int need;                // shorter matches would not be kept
  unsigned found[kWords];  // of a tile; bit of word: position, falling
  unsigned char match[kTile];
  int32_t following[kPlaces * kMaxContextDepth];  // [places, max_depth]
  int32_t tokens[kNodes];
  int parents[kNodes];
  int depths[kNodes];
  int matches[kNodes];
  int counts[kNodes];
  int size;
};

struct Text {
  const int32_t* tokens;
  int last;  // position of the last token; -1: there is none
};

__device__ __forceinline__ Text request_text(const ContextNodesParams& p,
                                             int request) {
  const int slot = p.requests[request];
  const int length = p.lengths[request];
  if (slot < 0 || slot >= p.slots || length < 0 || length > p.width) {
    return {nullptr, -1};
  }
  return {p.history + slot * p.slot_stride, length - 1};
}

__device__ __forceinline__ int match_length(const Text& text, int position,
                                            const int32_t* suffix,
                                            int max_match) {
  const int limit = min_int(max_match, position + 1);
  int match = 0;
  while (match < limit && text.tokens[position - match] == suffix[match]) {
    ++match;
  }
  return match;
}

// Notes which of the kTile positions before `end` match `need` tokens or more.
__device__ __forceinline__ void search_tile(const Text& text, int end, int need,
                                            int max_match,
                                            ContextState& state) {
  const int thread = static_cast<int>(threadIdx.x);
  const int reach = need - 1;
  const int32_t root = state.suffix[0];
  const int32_t far = state.suffix[reach];
  bool candidate[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int position = end - 1 - step * kContextThreads - thread;
    candidate[step] = position >= reach && text.tokens[position] == root &&
                      text.tokens[position - reach] == far;
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int offset = step * kContextThreads + thread;
    int match = 0;
    if (candidate[step]) {
      match = match_length(text, end - 1 - offset, state.suffix, max_match);
      state.match[offset] = static_cast<unsigned char>(match);
    }
    const unsigned found = ballot(match >= need);
    if (thread % kWarpSize == 0) state.found[offset / kWarpSize] = found;
  }
}

// Puts a place behind all that match as long; if the list is full the last one
// goes. One warp; returns the new number of places.
__device__ __forceinline__ int insert_place(ContextState& state, Place place,
                                            int count, int max_places) {
  constexpr int kPerLane = kPlaces / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int slot = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int other = i * kWarpSize + lane;
    slot += count_bits(
        ballot(other < count && state.places[other].match >= place.match));
  }
  count = min_int(count + 1, max_places);
  Place shifted[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int other = i * kWarpSize + lane;
    if (other > slot && other < count) shifted[i] = state.places[other - 1];
    if (other == slot) shifted[i] = place;
  }
  sync_warp();
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int other = i * kWarpSize + lane;
    if (other >= slot && other < count) state.places[other] = shifted[i];
  }
  sync_warp();
  return count;
}

// Sorts a tile's finds into the list of places. One warp.
__device__ __forceinline__ void take_tile(const ContextNodesParams& p, int end,
                                          ContextState& state) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int count = state.num_places;
  int need = state.need;
  for (int first = 0; first < kWords; first += kWarpSize) {
    unsigned words = ballot(state.found[first + lane] != 0);
    for (; words != 0; words &= words - 1) {
      const int word = first + lowest_bit(words);
      for (unsigned bits = state.found[word]; bits != 0; bits &= bits - 1) {
        const int offset = word * kWarpSize + lowest_bit(bits);
        const int match = state.match[offset];
        if (match < need) continue;
        count =
            insert_place(state, {end - 1 - offset, match}, count, p.max_places);
        if (count == p.max_places) need = state.places[count - 1].match + 1;
      }
    }
  }
  sync_warp();  // all lanes have read what the first one now changes
  if (lane == 0) {
    state.num_places = count;
    state.need = need;
  }
}

__device__ __forceinline__ int followed_levels(const ContextNodesParams& p,
                                               const Text& text,
                                               const Place& place) {
  const int levels = static_cast<int>(kLevelsPerMatch) * place.match;
  return min_int(min_int(p.max_depth, levels), text.last - place.position);
}

// The row of `row`'s child with this token, or 0. One warp.
__device__ __forceinline__ int find_child(const ContextState& state, int row,
                                          int size, int32_t token) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  // A child comes after its parent, which is node row - 1.
  for (int first = row; first < size; first += kWarpSize) {
    const int node = first + lane;
    const unsigned found = ballot(node < size && state.parents[node] == row &&
                                  state.tokens[node] == token);
    if (found != 0) return first + lowest_bit(found) + 1;
  }
  return 0;
}

// Builds the trie of the first `count` places' following tokens. One warp.
__device__ __forceinline__ void merge_places(const ContextNodesParams& p,
                                             const Text& text,
                                             ContextState& state) {
  const bool writes = static_cast<int>(threadIdx.x) % kWarpSize == 0;
  int size = 0;
  for (int i = 0; i < state.num_places; ++i) {
    const Place place = state.places[i];
    const int levels = followed_levels(p, text, place);
    int row = 0;
    for (int level = 0; level < levels; ++level) {
      const int32_t token = state.following[i * p.max_depth + level];
      int child = find_child(state, row, size, token);
      if (child != 0) {
        if (writes) ++state.counts[child - 1];
      } else {
        if (size == p.max_nodes) break;
        if (writes) {
          state.tokens[size] = token;
          state.parents[size] = row;
          state.depths[size] = level + 1;
          state.matches[size] = place.match;
          state.counts[size] = 1;
        }
        child = ++size;
        sync_warp();
      }
      row = child;
    }
  }
  if (writes) state.size = size;
}

__device__ __forceinline__ void write_nodes(const ContextNodesParams& p,
                                            int request,
                                            const ContextState& state) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int node = thread; node < p.max_nodes; node += kContextThreads) {
    const int64_t at = static_cast<int64_t>(request) * p.max_nodes + node;
    const bool exists = node < state.size;
    p.tokens[at] = exists ? state.tokens[node] : -1;
    p.parents[at] = exists ? state.parents[node] : 0;
    p.depths[at] = exists ? state.depths[node] : 0;
    p.matches[at] = exists ? state.matches[node] : 0;
    p.places[at] = exists ? state.counts[node] : 0;
  }
  if (thread == 0) p.sizes[request] = state.size;
}

__global__ void __launch_bounds__(kContextThreads)
    context_nodes_kernel(const ContextNodesParams p) {
  ContextState& state = *reinterpret_cast<ContextState*>(dynamic_shared());
  const int request = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  const bool first_warp = thread < kWarpSize;
  const Text text = request_text(p, request);
  if (thread < p.max_match && thread <= text.last) {
    state.suffix[thread] = text.tokens[text.last - thread];
  }
  if (thread == 0) {
    state.num_places = 0;
    state.need = p.min_match;
  }
  __syncthreads();

  for (int end = text.last;; end -= kTile) {
    const int need = state.need;
    if (need > p.max_match || end < need) break;
    search_tile(text, end, need, p.max_match, state);
    __syncthreads();
    if (first_warp) take_tile(p, end, state);
    __syncthreads();
  }

  for (int i = thread; i < state.num_places * p.max_depth;
       i += kContextThreads) {
    const Place place = state.places[i / p.max_depth];
    const int level = i % p.max_depth;
    if (level < followed_levels(p, text, place)) {
      state.following[i] = text.tokens[place.position + 1 + level];
    }
  }
  __syncthreads();
  if (first_warp) merge_places(p, text, state);
  __syncthreads();
  write_nodes(p, request, state);
}

}  // namespace

int launch_context_nodes(const ContextNodesParams& params, void* stream) {
  if (params.num_requests == 0) return 0;
  return launch_kernel(context_nodes_kernel,
                       Grid{static_cast<unsigned>(params.num_requests), 1, 1},
                       kContextThreads, static_cast<int>(sizeof(ContextState)),
                       static_cast<Stream>(stream), params);
}

}  // namespace clover2
