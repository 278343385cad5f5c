// SPDX-License-Identifier: Apache-2.0
// The walk from each tree's root down to the last row whose token the target
// picked.
//
// One warp per request: at each row its lanes compare 32 candidates at a time
// with what the target picked there, and the first match in row order is the
// next row. Integers only, exact.
//
// Memory traffic: the request's parents and tokens (16 bytes per row) once from
// device memory and then from L1, one target token per visited row. A launch
// takes as long as the deepest path's dependent loads, about a microsecond.
//
// Limits: none; trees of more than 64 rows work too.
#include "device.cuh"
#include "launch.h"

namespace clover2 {
namespace {

constexpr int kAcceptThreads = 64;  // two requests per block
constexpr int kAcceptWarps = kAcceptThreads / kWarpSize;

// The first row after `node` whose parent is `node` and whose token is `token`,
// or -1. A row comes after its parent. All lanes return the same.
__device__ __forceinline__ int find_child(const TreeAcceptParams& p, int begin,
                                          int rows, int node, int64_t token) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int first = node + 1; first < rows; first += kWarpSize) {
    const int row = first + lane;
    const bool matches = row < rows && p.parents[begin + row] == node &&
                         p.draft_tokens[begin + row] == token;
    const unsigned found = ballot(matches);
    if (found != 0) return first + lowest_bit(found);
  }
  return -1;
}

__global__ void __launch_bounds__(kAcceptThreads)
    tree_accept_kernel(const TreeAcceptParams p) {
  const int request = static_cast<int>(blockIdx.x) * kAcceptWarps +
                      static_cast<int>(threadIdx.x) / kWarpSize;
  if (request >= p.requests) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int begin = p.row_offsets[request];
  const int rows = p.row_offsets[request + 1] - begin;
  int32_t* path = p.paths + static_cast<int64_t>(request) * p.max_depth;

  int length = 0;
  int node = 0;
  int64_t token = rows > 0 ? p.target_tokens[begin] : -1;
  while (rows > 0 && length < p.max_depth) {
    const int child = find_child(p, begin, rows, node, token);
    if (child < 0) break;
    if (lane == 0) path[length] = child;
    ++length;
    node = child;
    token = p.target_tokens[begin + node];
  }
  for (int i = length + lane; i < p.max_depth; i += kWarpSize) path[i] = -1;
  if (lane == 0) {
    p.lengths[request] = length;
    p.next_tokens[request] = token;
  }
}

}  // namespace

int launch_tree_accept(const TreeAcceptParams& params, void* stream) {
  if (params.requests == 0) return 0;
  const unsigned blocks = static_cast<unsigned>(
      (params.requests + kAcceptWarps - 1) / kAcceptWarps);
  return launch_kernel(tree_accept_kernel, Grid{blocks, 1, 1}, kAcceptThreads,
                       0, static_cast<Stream>(stream), params);
}

}  // namespace clover2
