// SPDX-License-Identifier: Apache-2.0
// commit_kv on the CPU: accepted rows move to the positions after the root.
//
// A (layer, head) pair is one unit of parallel work: it touches memory of no
// other. Within it, all of a request's accepted tokens are read into a small
// buffer before the first is written, because the ranges overlap. Memory
// traffic: 2 * D elements read and written per token, layer and head; in the
// CPU layouts the elements of a key (and, in AMX, of a value) are strided.

#include "../common/checks.h"
#include "ops.h"

#include <torch/csrc/stable/ops.h>

namespace clover2::cpu {

namespace {

struct CacheShape {
  KVLayout layout;
  int64_t block_size;
  int64_t dim;
  int64_t strides[4];  // of the logical [blocks, kv_heads, block_size, 2 * D]
};

// Element offsets, from the start of the cache, of one token's key and value.
template <KVLayout kLayout>
class TokenOffsets {
 public:
  TokenOffsets(const CacheShape& shape, int64_t slot, int64_t head)
      : block_size_(shape.block_size),
        dim_(shape.dim),
        stride_(shape.strides[3]),
        token_(slot % shape.block_size),
        base_(slot / shape.block_size * shape.strides[0] +
              head * shape.strides[1]) {
    if (kLayout == KVLayout::kStrided) base_ += token_ * shape.strides[2];
  }

  int64_t key(int64_t d) const {
    if constexpr (kLayout == KVLayout::kVec) {
      return base_ + vec_key(token_, d, block_size_);
    } else if constexpr (kLayout == KVLayout::kAmx) {
      return base_ + amx_key(token_, d, dim_);
    } else {
      return base_ + d * stride_;
    }
  }

  int64_t value(int64_t d) const {
    if constexpr (kLayout == KVLayout::kVec) {
      return base_ + vec_value(token_, d, block_size_, dim_);
    } else if constexpr (kLayout == KVLayout::kAmx) {
      return base_ + amx_value(token_, d, block_size_, dim_);
    } else {
      return base_ + (dim_ + d) * stride_;
    }
  }

 private:
  const int64_t block_size_;
  const int64_t dim_;
  const int64_t stride_;
  const int64_t token_;
  int64_t base_;
};

struct Move {
  int64_t source;  // slots
  int64_t destination;
};

// One request's moves; those that would not change anything are left out.
std::vector<Move> request_moves(const int32_t* path, int64_t length,
                                int64_t prefix, const int32_t* blocks,
                                int64_t max_blocks, int64_t block_size) {
  std::vector<Move> moves;
  const auto slot = [&](int64_t position) {
    const int64_t block = position / block_size;
    STD_TORCH_CHECK(position >= 0 && block < max_blocks, "position ", position,
                    " is beyond the ", max_blocks, " blocks of block_table");
    return blocks[block] * block_size + position % block_size;
  };
  for (int64_t i = 1; i <= length; ++i) {
    if (path[i - 1] == i) continue;
    moves.push_back({slot(prefix + path[i - 1]), slot(prefix + i)});
  }
  return moves;
}

// Element is an unsigned integer of the cache's element size: bits are moved.
template <KVLayout kLayout, typename Element>
void move_tokens(const CacheShape& shape, Element* cache, int64_t head,
                 const std::vector<Move>& moves, std::vector<Element>& staged) {
  const int64_t dim = shape.dim;
  staged.resize(moves.size() * 2 * dim);
  Element* buffer = staged.data();
  for (const Move& move : moves) {
    const TokenOffsets<kLayout> source(shape, move.source, head);
    for (int64_t d = 0; d < dim; ++d) buffer[d] = cache[source.key(d)];
    buffer += dim;
    for (int64_t d = 0; d < dim; ++d) buffer[d] = cache[source.value(d)];
    buffer += dim;
  }
  buffer = staged.data();
  for (const Move& move : moves) {
    const TokenOffsets<kLayout> target(shape, move.destination, head);
    for (int64_t d = 0; d < dim; ++d) cache[target.key(d)] = buffer[d];
    buffer += dim;
    for (int64_t d = 0; d < dim; ++d) cache[target.value(d)] = buffer[d];
    buffer += dim;
  }
}

template <typename Element>
void commit(const CacheShape& shape, const std::vector<Tensor>& caches,
            int64_t heads, const std::vector<std::vector<Move>>& requests) {
  const int64_t units = static_cast<int64_t>(caches.size()) * heads;
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    std::vector<Element> staged;
    for (int64_t unit = begin; unit < end; ++unit) {
      auto* cache =
          static_cast<Element*>(caches[unit / heads].mutable_data_ptr());
      const int64_t head = unit % heads;
      for (const std::vector<Move>& moves : requests) {
        switch (shape.layout) {
          case KVLayout::kVec:
            move_tokens<KVLayout::kVec>(shape, cache, head, moves, staged);
            break;
          case KVLayout::kAmx:
            move_tokens<KVLayout::kAmx>(shape, cache, head, moves, staged);
            break;
          case KVLayout::kStrided:
            move_tokens<KVLayout::kStrided>(shape, cache, head, moves, staged);
            break;
        }
      }
    }
  });
}

CacheShape cache_shape(const std::vector<Tensor>& caches, int64_t layout) {
  STD_TORCH_CHECK(layout >= 0 && layout <= 2,
                  "layout must be a KVLayout (0, 1 or 2), found ", layout);
  const Tensor& first = caches[0];
  CacheShape shape{
      static_cast<KVLayout>(layout), first.size(2), first.size(3) / 2, {}};
  for (int64_t axis = 0; axis < 4; ++axis) {
    shape.strides[axis] = first.stride(axis);
    for (const Tensor& cache : caches) {
      STD_TORCH_CHECK(cache.stride(axis) == shape.strides[axis],
                      "all kv_caches must have the same strides");
    }
  }
  STD_TORCH_CHECK(
      shape.layout == KVLayout::kStrided || first.is_contiguous(),
      "caches in the layouts VEC and AMX must be contiguous; pass the layers' "
      "cache tensors themselves, not views");
  STD_TORCH_CHECK(
      shape.layout != KVLayout::kAmx ||
          (shape.block_size % kTileRows == 0 && shape.dim % kTileRows == 0),
      "the AMX layout needs block and head sizes that are multiples "
      "of 16, found ",
      shape.block_size, " and ", shape.dim);
  return shape;
}

}  // namespace

void commit_kv(
    std::vector<Tensor> kv_caches,  // each [blocks, kv_heads, B, 2 * D]
    int64_t layout,
    const Tensor& block_table,  // [R, max_blocks] int32
    const Tensor& prefix_lens,  // [R] int32
    const Tensor& paths,        // [R, max_depth] int32
    const Tensor& lengths) {    // [R] int32
  const int64_t count =
      check_commit_kv(kv_caches, block_table, prefix_lens, paths, lengths);
  if (kv_caches.empty()) return;
  const CacheShape shape = cache_shape(kv_caches, layout);
  const int64_t max_depth = paths.size(1);

  std::vector<std::vector<Move>> requests;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = lengths.const_data_ptr<int32_t>()[i];
    STD_TORCH_CHECK(length >= 0 && length <= max_depth, "lengths[", i,
                    "] must be between 0 and ", max_depth, ", found ", length);
    auto moves = request_moves(
        paths.const_data_ptr<int32_t>() + i * max_depth, length,
        prefix_lens.const_data_ptr<int32_t>()[i],
        block_table.const_data_ptr<int32_t>() + i * block_table.stride(0),
        block_table.size(1), shape.block_size);
    if (!moves.empty()) requests.push_back(std::move(moves));
  }
  if (requests.empty()) return;

  const int64_t heads = kv_caches[0].size(1);
  switch (kv_caches[0].element_size()) {
    case 1:
      return commit<uint8_t>(shape, kv_caches, heads, requests);
    case 2:
      return commit<uint16_t>(shape, kv_caches, heads, requests);
    case 4:
      return commit<uint32_t>(shape, kv_caches, heads, requests);
    default:
      STD_TORCH_CHECK(false, "kv_caches must have 1, 2 or 4 byte elements");
  }
}

}  // namespace clover2::cpu
