// SPDX-License-Identifier: Apache-2.0
// Attention of a task's query vectors over their prefix and their path of tree
// rows. Included once per instruction set, after simd.h.
//
// A row's keys are the prefix and its own path, and the kernel works on them as
// if they lay one after the other, where plain decoding would have put them:
// the prefix at 0..S-1, the path at S..S+depth. Thus all sums run in the order
// in which vLLM's attention adds them for the same token without a tree, and
// the results are equal bit by bit (tests/ops/test_stock_numerics.py), although
// the cache holds the path between rows of other paths.
//   - Scores do not depend on where a key lies: they are computed for whole
//   groups of
//     the cache, and each row picks those of its path.
//   - Values of the prefix's full groups are shared by all rows. For the last
//   partial
//     group and the path ("the tail") each row has its own copy of a few
//     values.
// Keys and values of the prefix come from memory once per task (32 query
// vectors); the tasks of one KV head follow each other, so from the second on
// they come from L2.

namespace clover2::cpu::CLOVER2_ISA {

constexpr int64_t kTailTokens =
    3 * kGroupTokens;  // >= 31 of the prefix + 64 rows

// Aligned memory that a thread keeps from call to call.
inline char* scratch(size_t bytes) {
  static thread_local std::vector<char> memory;
  if (memory.size() < bytes + 64) memory.resize(bytes + 64);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (64 - address % 64) % 64;
}

template <typename Kernel>
class Attention {
 public:
  using Element = typename Kernel::Element;
  using Query = typename Kernel::Query;
  using Probability = typename Kernel::Probability;

  Attention(const AttentionProblem& problem, const AttentionTask& task)
      : problem_(problem),
        task_(task),
        kernel_(problem.dim),
        queries_(task.last - task.first),
        prefix_(problem.prefix_lens[task.request]),
        shared_end_(prefix_ / kGroupTokens * kGroupTokens) {
    const int64_t dim = problem.dim;
    const size_t sizes[] = {kMaxQueries * dim * sizeof(Query),
                            kMaxQueries * problem.tile_tokens * sizeof(float),
                            kMaxQueries * kTailTokens * sizeof(float),
                            kMaxQueries * dim * sizeof(float),
                            kMaxQueries * dim * sizeof(float),
                            kTailTokens * dim * sizeof(Element)};
    size_t total = 0;
    for (size_t size : sizes) total += size;
    char* memory = scratch(total);
    query_ = reinterpret_cast<Query*>(memory);
    logits_ = reinterpret_cast<float*>(memory += sizes[0]);
    tail_logits_ = reinterpret_cast<float*>(memory += sizes[1]);
    sums_of_values_ = reinterpret_cast<float*>(memory += sizes[2]);
    merged_values_ = reinterpret_cast<float*>(memory += sizes[3]);
    tail_values_ = reinterpret_cast<Element*>(memory + sizes[4]);
  }

  void run() {
    find_paths();
    pack_queries();
    kernel_.begin(queries_);
    score_tail();
    copy_prefix_tail();
    // One round, unless vLLM would cut the rows of this task at different
    // places.
    uint64_t pending = (1ull << queries_) - 1;
    while (pending != 0) {
      const Cut cut = cut_of(row_of(__builtin_ctzll(pending)));
      attend(cut);
      for (int64_t i = 0; i < queries_; ++i) {
        if ((pending >> i & 1) == 0 || !(cut_of(row_of(i)) == cut)) continue;
        store(i);
        pending &= ~(1ull << i);
      }
    }
    kernel_.end();
  }

 private:
  // A key sequence is attended in pieces whose results are merged.
  struct Cut {
    int64_t piece;  // tokens in all pieces but the last
    int64_t pieces;
    bool operator==(const Cut&) const = default;
  };

  // For a single request vLLM's attention cuts the keys between its threads,
  // unless they are few. That rounds probabilities differently, so it is done
  // here as well.
  Cut cut_of(int64_t row) const {
    const int64_t threads = problem_.split_threads;
    const int64_t length = whole_groups(prefix_ + steps_[row]);
    const int64_t share = whole_groups(length / threads);
    const int64_t least = Kernel::kLeastPiece;
    const int64_t piece = share > least ? share : least;
    int64_t pieces = 1;
    for (int64_t rest = length; rest > share + least && pieces < threads;
         rest -= piece) {
      ++pieces;
    }
    return {pieces == 1 ? 0 : piece, pieces};
  }

  static int64_t whole_groups(int64_t tokens) {
    return (tokens + kGroupTokens - 1) / kGroupTokens * kGroupTokens;
  }

  void attend(const Cut& cut) {
    // The root sees farthest to the left.
    int64_t begin = 0;
    if (problem_.window >= 0 && prefix_ + 1 > problem_.window) {
      begin = (prefix_ + 1 - problem_.window) / kGroupTokens * kGroupTokens;
    }
    for (int64_t piece = 0; piece < cut.pieces; ++piece) {
      const bool last = piece == cut.pieces - 1;
      attend_piece(begin, last ? length_ : begin + cut.piece);
      merge(piece == 0);
      begin += cut.piece;
    }
  }

  void attend_piece(int64_t begin, int64_t end) {
    std::memset(sums_of_values_, 0, kMaxQueries * problem_.dim * sizeof(float));
    for (int64_t i = 0; i < queries_; ++i) {
      max_[i] = std::numeric_limits<float>::lowest();
      sum_[i] = 0.0f;
    }
    for (; begin < end; begin += problem_.tile_tokens) {
      const int64_t tile_end = begin + problem_.tile_tokens;
      attend_tile(begin, tile_end < end ? tile_end : end);
    }
  }

  // Adds a piece's sums to those of the pieces before it.
  void merge(bool first) {
    for (int64_t i = 0; i < queries_; ++i) {
      const float* piece = sums_of_values_ + i * problem_.dim;
      float* merged = merged_values_ + i * problem_.dim;
      if (first) {
        std::memcpy(merged, piece, problem_.dim * sizeof(float));
        merged_max_[i] = max_[i];
        merged_sum_[i] = sum_[i];
        continue;
      }
      const bool keep = merged_max_[i] > max_[i];  // the larger maximum stays
      const float factor =
          std::exp(keep ? max_[i] - merged_max_[i] : merged_max_[i] - max_[i]);
      merged_sum_[i] = keep ? merged_sum_[i] + factor * sum_[i]
                            : factor * merged_sum_[i] + sum_[i];
      merged_max_[i] = keep ? merged_max_[i] : max_[i];
      for (int64_t d = 0; d < problem_.dim; d += kLanes) {
        const floats whole = load_floats((keep ? merged : piece) + d);
        const floats scaled = load_floats((keep ? piece : merged) + d);
        store_floats(merged + d,
                     multiply_add(scaled, broadcast(factor), whole));
      }
    }
  }

  int64_t row_of(int64_t query) const {
    return (task_.first + query) / problem_.heads_per_kv;
  }

  // Start of the (block, head) that holds a position.
  const Element* block_of(int64_t position) const {
    const int64_t block =
        problem_.block_table[task_.request * problem_.block_table_stride +
                             position / problem_.block_size];
    return static_cast<const Element*>(problem_.cache) +
           (block * problem_.kv_heads + task_.kv_head) * 2 *
               problem_.block_size * problem_.dim;
  }

  const Element* values_of(int64_t position) const {
    return block_of(position) + problem_.block_size * problem_.dim;
  }

  // Rows on the path of each of the task's rows, from the root, and the length
  // of the longest of their key sequences.
  void find_paths() {
    const int64_t* ancestors =
        problem_.ancestors + problem_.row_offsets[task_.request];
    int64_t longest = 0;
    for (int64_t row = row_of(0); row <= row_of(queries_ - 1); ++row) {
      int64_t steps = 0;
      for (uint64_t word = ancestors[row]; word != 0; word &= word - 1) {
        path_[row][steps++] = static_cast<uint8_t>(__builtin_ctzll(word));
      }
      steps_[row] = static_cast<uint8_t>(steps);
      longest = steps > longest ? steps : longest;
    }
    length_ = whole_groups(prefix_ + longest);
  }

  int64_t query_offset(int64_t query, int64_t token_stride,
                       int64_t head_stride) const {
    const int64_t token = problem_.query_starts[task_.request] + row_of(query);
    const int64_t head = task_.kv_head * problem_.heads_per_kv +
                         (task_.first + query) % problem_.heads_per_kv;
    return token * token_stride + head * head_stride;
  }

  void pack_queries() {
    for (int64_t i = 0; i < queries_; ++i) {
      const int64_t offset = query_offset(i, problem_.query_token_stride,
                                          problem_.query_head_stride);
      kernel_.pack_query(static_cast<const Element*>(problem_.query) + offset,
                         i, problem_.scale, query_);
    }
  }

  // Scores of all groups from the prefix's last, partial one to the last tree
  // row.
  void score_tail() {
    const int64_t rows = problem_.row_offsets[task_.request + 1] -
                         problem_.row_offsets[task_.request];
    for (int64_t position = shared_end_; position < prefix_ + rows;
         position += kGroupTokens) {
      score_group(position, tail_logits_ + position - shared_end_, kTailTokens);
    }
  }

  void score_group(int64_t position, float* logits, int64_t stride) {
    const int64_t token = position % problem_.block_size;
    kernel_.query_key(queries_, query_,
                      block_of(position) + kernel_.key_offset(token),
                      problem_.block_size, logits, stride);
  }

  void copy_prefix_tail() {
    // Unused places are multiplied with zero probabilities: they must be
    // finite.
    std::memset(tail_values_, 0, kTailTokens * problem_.dim * sizeof(Element));
    if (prefix_ > shared_end_) {
      const int64_t token = shared_end_ % problem_.block_size;
      kernel_.copy_values(values_of(shared_end_) + kernel_.value_offset(token),
                          problem_.block_size, tail_values_, kTailTokens,
                          prefix_ - shared_end_);
    }
    std::memset(tail_row_, 0xff, sizeof(tail_row_));
  }

  void copy_tail_value(int64_t position, int64_t tail_position) {
    kernel_.copy_value(values_of(position), position % problem_.block_size,
                       problem_.block_size, tail_values_,
                       tail_position - shared_end_, kTailTokens);
  }

  void attend_tile(int64_t begin, int64_t end) {
    const int64_t stride = problem_.tile_tokens;
    const int64_t shared = end < shared_end_ ? end : shared_end_;
    for (int64_t position = begin; position < shared;
         position += kGroupTokens) {
      score_group(position, logits_ + position - begin, stride);
    }
    for (int64_t i = 0; i < queries_; ++i) {
      finish_logits(i, begin, end);
      softmax(i, end - begin);
    }
    add_shared_values(begin, shared);
    add_tail_values(begin, end);
  }

  // Places the path's scores behind the prefix's, then scale, soft cap and
  // mask.
  void finish_logits(int64_t query, int64_t begin, int64_t end) {
    float* logits = logits_ + query * problem_.tile_tokens;
    const float* tail = tail_logits_ + query * kTailTokens - shared_end_;
    const int64_t row = row_of(query);
    const int64_t last = prefix_ + steps_[row];  // one after the row itself
    int64_t position = begin > shared_end_ ? begin : shared_end_;
    for (; position < end && position < prefix_; ++position) {
      logits[position - begin] = tail[position];
    }
    for (; position < end && position < last; ++position) {
      logits[position - begin] = tail[prefix_ + path_[row][position - prefix_]];
    }
    for (; position < end; ++position) {
      logits[position - begin] = -std::numeric_limits<float>::infinity();
    }
    for (int64_t i = 0; Kernel::kScaleLogits && i < end - begin; i += kLanes) {
      store_floats(logits + i, load_floats(logits + i) * problem_.scale);
    }
    if (problem_.softcap > 0.0f) cap(logits, end - begin);
    for (int64_t position = begin;
         problem_.window >= 0 && position < last - problem_.window &&
         position < end;
         ++position) {
      logits[position - begin] = -std::numeric_limits<float>::infinity();
    }
  }

  // softcap * tanh(x / softcap), by the exponential.
  void cap(float* logits, int64_t count) const {
    const float inverse = 1.0f / problem_.softcap;
    for (int64_t i = 0; i < count; i += kLanes) {
      const floats raw = load_floats(logits + i);
      const floats up = exponential(raw * inverse);
      const floats down = 1.0f / up;
      const floats capped = (up - down) / (up + down) * problem_.softcap;
      store_floats(logits + i, raw < -1e30f ? raw : capped);
    }
  }

  // One round of online softmax; leaves probabilities in place of the logits.
  // As in vLLM, a new maximum counts only if it is larger by more than 8 (e^8
  // is far from overflow), which saves most rescaling.
  void softmax(int64_t query, int64_t count) {
    float* logits = logits_ + query * problem_.tile_tokens;
    auto* probabilities = reinterpret_cast<Probability*>(logits);
    floats largest_so_far = broadcast(max_[query]);
    for (int64_t i = 0; i < count; i += kLanes) {
      largest_so_far = maximum(load_floats(logits + i), largest_so_far);
    }
    const float change = max_[query] - largest(largest_so_far);
    const bool rescale = change < -8.0f;
    if (rescale) max_[query] = largest(largest_so_far);

    const floats reference = broadcast(max_[query]);
    floats total = {};
    for (int64_t i = 0; i < count; i += kLanes) {
      const floats probability =
          exponential(load_floats(logits + i) - reference);
      store_floats(probabilities + i, probability);
      total += probability;
    }
    float new_sum = sum(total);
    if (rescale) {
      const float factor = std::exp(change);
      new_sum += factor * sum_[query];
      float* values = sums_of_values_ + query * problem_.dim;
      for (int64_t d = 0; d < problem_.dim; d += kLanes) {
        store_floats(values + d, load_floats(values + d) * factor);
      }
    } else {
      new_sum += sum_[query];
    }
    sum_[query] = new_sum;
  }

  int64_t probability_stride() const {
    return problem_.tile_tokens * (sizeof(float) / sizeof(Probability));
  }

  const Probability* probabilities() const {
    return reinterpret_cast<const Probability*>(logits_);
  }

  void add_shared_values(int64_t begin, int64_t end) {
    for (int64_t position = begin; position < end;) {
      const int64_t token = position % problem_.block_size;
      int64_t tokens = problem_.block_size - token;
      tokens = tokens < end - position ? tokens : end - position;
      kernel_.probability_value(
          queries_, probabilities() + position - begin, probability_stride(),
          values_of(position) + kernel_.value_offset(token), tokens,
          problem_.block_size, sums_of_values_);
      position += tokens;
    }
  }

  // Row by row: all of a row's query vectors share its copy of the tail's
  // values.
  void add_tail_values(int64_t begin, int64_t end) {
    const int64_t tail = begin > shared_end_ ? begin : shared_end_;
    if (tail >= end) return;
    int64_t shape = 0;
    for (int64_t query = 0; query < queries_;) {
      const int64_t row = row_of(query);
      int64_t count = (row + 1) * problem_.heads_per_kv - task_.first - query;
      count = count < queries_ - query ? count : queries_ - query;
      // A key sequence that ends before this tile has nothing to add.
      if (prefix_ + steps_[row] > tail) {
        place_path_values(row);
        if (count != shape) kernel_.begin(shape = count);
        kernel_.probability_value(
            count,
            probabilities() + query * probability_stride() + tail - begin,
            probability_stride(),
            tail_values_ + kernel_.value_offset(tail - shared_end_), end - tail,
            kTailTokens, sums_of_values_ + query * problem_.dim);
      }
      query += count;
    }
    if (shape != 0) kernel_.begin(queries_);
  }

  // Copies the values of a row's path behind the prefix's, but for those that
  // the previous row, often a sibling, had in the same place. What an earlier
  // row left beyond this path's end has probability zero.
  void place_path_values(int64_t row) {
    for (int64_t step = 0; step < steps_[row]; ++step) {
      const uint8_t source = path_[row][step];
      if (tail_row_[step] == source) continue;
      tail_row_[step] = source;
      copy_tail_value(prefix_ + source, prefix_ + step);
    }
  }

  void store(int64_t query) {
    Element* target = static_cast<Element*>(problem_.out) +
                      query_offset(query, problem_.out_token_stride,
                                   problem_.out_head_stride);
    const float* values = merged_values_ + query * problem_.dim;
    const float inverse = 1.0f / merged_sum_[query];
    for (int64_t d = 0; d < problem_.dim; d += kLanes) {
      store_floats(target + d, load_floats(values + d) * inverse);
    }
  }

  const AttentionProblem& problem_;
  const AttentionTask& task_;
  Kernel kernel_;
  const int64_t queries_;
  const int64_t prefix_;
  const int64_t shared_end_;  // positions before it are in full prefix groups
  int64_t length_ = 0;        // longest key sequence, in whole groups

  Query* query_;           // packed, scaled if the kernel wants so
  float* logits_;          // [kMaxQueries, tile_tokens]; then probabilities
  float* tail_logits_;     // [kMaxQueries, kTailTokens] in cache order
  float* sums_of_values_;  // [kMaxQueries, D] of the current piece
  float* merged_values_;   // [kMaxQueries, D] of all pieces so far
  Element* tail_values_;   // kTailTokens in the layout of a block's values

  float max_[kMaxQueries];
  float sum_[kMaxQueries];
  float merged_max_[kMaxQueries];
  float merged_sum_[kMaxQueries];
  uint8_t path_[kMaxTreeRows][kMaxTreeRows];
  uint8_t steps_[kMaxTreeRows];  // rows on the path
  uint8_t
      tail_row_[kMaxTreeRows];  // row whose value lies at this step, 0xff: none
};

}  // namespace clover2::cpu::CLOVER2_ISA
