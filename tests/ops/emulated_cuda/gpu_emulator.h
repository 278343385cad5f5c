// SPDX-License-Identifier: Apache-2.0
// Runs the CUDA kernels on the host, for tests on machines without a GPU.
//
// Stands in for kernels/cuda/device.cuh (see there for what each function
// does). Every thread of a block is a fiber; a fiber runs until it meets a
// barrier or an exchange between the lanes of its warp. Made to find mistakes
// rather than to be fast:
//   - asynchronous copies land only when their thread waits for them, and
//   poison their
//     destination until then;
//   - shared memory starts out poisoned (NaN in every float format);
//   - fibers run in rising or falling order, each warp as far as it comes
//     without the others, so that a missing barrier shows in one of the orders;
//   - a barrier that some threads never reach ends the process, and so does a
//   copy or
//     matrix load outside the block's shared memory.
// What it cannot show: instruction-level mistakes of device.cuh itself, memory
// ordering beyond barriers, speed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __forceinline__ inline

struct Dim3 {
  unsigned x, y, z;
};
inline Dim3 threadIdx, blockIdx, blockDim;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace clover2 {

using Stream = void*;
constexpr int kWarpSize = 32;

namespace emulator {

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned char kPoison = 0xff;

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

struct Copy {
  unsigned char* to;
  const unsigned char* from;  // null: zeros
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kReady;
  std::vector<Copy> copies;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned char> shared;
  std::vector<uint64_t>
      exchange;  // [threads][8]: what a lane shows to its warp
  unsigned char* shared_begin = nullptr;
  size_t shared_bytes = 0;
  ucontext_t scheduler;
  std::function<void()> kernel;
};

inline Block block;
inline bool falling_order = false;
inline int64_t kernels_run = 0;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s (block %u %u %u, thread %u)\n", what,
               blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
  std::abort();
}

inline void wait(State state) {
  Fiber& fiber = block.fibers[threadIdx.x];
  fiber.state = state;
  swapcontext(&fiber.context, &block.scheduler);
}

inline void run_fiber() {
  block.kernel();
  block.fibers[threadIdx.x].state = State::kDone;
  swapcontext(&block.fibers[threadIdx.x].context, &block.scheduler);
}

// Lets fibers begin .. end - 1 go on if all that live are at `barrier`.
inline bool release(size_t begin, size_t end, State barrier) {
  bool any = false;
  for (size_t i = begin; i < end; ++i) {
    const State state = block.fibers[i].state;
    if (state != barrier && state != State::kDone) return false;
    any = any || state == barrier;
  }
  for (size_t i = begin; any && i < end; ++i) {
    Fiber& fiber = block.fibers[i];
    if (fiber.state == barrier) fiber.state = State::kReady;
  }
  return any;
}

// Runs a warp as far as it comes without the block's other warps.
inline void run_warp(size_t begin) {
  do {
    for (size_t i = 0; i < kWarpSize; ++i) {
      const size_t thread = begin + (falling_order ? kWarpSize - 1 - i : i);
      if (block.fibers[thread].state != State::kReady) continue;
      threadIdx = {static_cast<unsigned>(thread), 0, 0};
      swapcontext(&block.scheduler, &block.fibers[thread].context);
    }
  } while (release(begin, begin + kWarpSize, State::kAtWarpBarrier));
}

inline void run_block() {
  const size_t threads = block.fibers.size();
  for (Fiber& fiber : block.fibers) {
    fiber.state = State::kReady;
    fiber.copies.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  std::memset(block.shared_begin, kPoison, block.shared_bytes);
  for (;;) {
    for (size_t i = 0; i < threads; i += kWarpSize) {
      run_warp(falling_order ? threads - kWarpSize - i : i);
    }
    bool done = true;
    for (const Fiber& fiber : block.fibers) done &= fiber.state == State::kDone;
    if (done) return;
    if (!release(0, threads, State::kAtBlockBarrier)) {
      fail("threads wait at different barriers");
    }
  }
}

inline unsigned char* checked_shared(const void* pointer, size_t bytes) {
  unsigned char* address =
      const_cast<unsigned char*>(static_cast<const unsigned char*>(pointer));
  if (address < block.shared_begin ||
      address + bytes > block.shared_begin + block.shared_bytes) {
    fail("access outside shared memory");
  }
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail("misaligned access");
  return address;
}

// Shows `words` to the warp and returns where lane 0's are.
inline const uint64_t* show(const uint64_t* words, int count) {
  uint64_t* own = block.exchange.data() + threadIdx.x * 8;
  std::memcpy(own, words, static_cast<size_t>(count) * 8);
  wait(State::kAtWarpBarrier);
  return block.exchange.data() + threadIdx.x / kWarpSize * kWarpSize * 8;
}

inline float from_bfloat16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline uint16_t to_bfloat16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (std::isnan(value)) return 0x7fc0;
  return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

inline float from_float16(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}

inline uint16_t to_float16(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

inline void load_matrices(uint32_t (&result)[4], const void* row,
                          bool transposed) {
  const uint64_t address = reinterpret_cast<uint64_t>(checked_shared(row, 16));
  const uint64_t* warp = show(&address, 1);
  const unsigned lane = threadIdx.x % kWarpSize;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned from = transposed ? lane % 4 * 2 + i : lane / 4;
      const unsigned column = transposed ? lane / 4 : lane % 4 * 2 + i;
      pair[i] = reinterpret_cast<const uint16_t*>(
          warp[(matrix * 8 + from) * 8])[column];
    }
    std::memcpy(&result[matrix], pair, 4);
  }
  wait(State::kAtWarpBarrier);
}

template <float (*kToFloat)(uint16_t)>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                  uint32_t b1) {
  const uint64_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const uint64_t* warp = show(words, 6);
  const auto element = [&](unsigned lane, unsigned word, unsigned i) {
    return kToFloat(static_cast<uint16_t>(warp[lane * 8 + word] >> (16 * i)));
  };
  const unsigned lane = threadIdx.x % kWarpSize;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8;
    const unsigned column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned a_word = row / 8 + k / 8 * 2;
      const unsigned pair = k % 8 / 2;
      sum[i] += element(row % 8 * 4 + pair, a_word, k % 2) *
                element(column * 4 + pair, 4 + k / 8, k % 2);
    }
  }
  wait(State::kAtWarpBarrier);
}

}  // namespace emulator

template <typename T>
T shuffle_xor(T value, int mask) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  const uint64_t* warp = emulator::show(&word, 1);
  T result;
  std::memcpy(
      &result,
      &warp[(threadIdx.x % kWarpSize ^ static_cast<unsigned>(mask)) * 8],
      sizeof(T));
  emulator::wait(emulator::State::kAtWarpBarrier);
  return result;
}

inline unsigned ballot(bool predicate) {
  const uint64_t word = predicate ? 1 : 0;
  const uint64_t* warp = emulator::show(&word, 1);
  unsigned result = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    result |= static_cast<unsigned>(warp[lane * 8]) << lane;
  }
  emulator::wait(emulator::State::kAtWarpBarrier);
  return result;
}

inline void sync_warp() { emulator::wait(emulator::State::kAtWarpBarrier); }
inline int lowest_bit(unsigned word) { return __builtin_ctz(word); }
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline unsigned char* dynamic_shared() { return emulator::block.shared_begin; }

inline void copy_16_async(void* shared, const void* global, bool valid) {
  unsigned char* to = emulator::checked_shared(shared, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    emulator::fail("misaligned copy source");
  }
  std::memset(to, emulator::kPoison, 16);
  emulator::block.fibers[threadIdx.x].copies.push_back(
      {to, valid ? static_cast<const unsigned char*>(global) : nullptr});
}

inline void wait_copies() {
  std::vector<emulator::Copy>& copies =
      emulator::block.fibers[threadIdx.x].copies;
  for (const emulator::Copy& copy : copies) {
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, 16);
    } else {
      std::memcpy(copy.to, copy.from, 16);
    }
  }
  copies.clear();
}

inline void load_matrices(uint32_t (&result)[4], const void* row) {
  emulator::load_matrices(result, row, false);
}
inline void load_matrices_transposed(uint32_t (&result)[4], const void* row) {
  emulator::load_matrices(result, row, true);
}

struct BFloat16 {
  static uint32_t pack(float low, float high) {
    return emulator::to_bfloat16(low) |
           static_cast<uint32_t>(emulator::to_bfloat16(high)) << 16;
  }
  static void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                           uint32_t b1) {
    emulator::multiply_add<emulator::from_bfloat16>(sum, a, b0, b1);
  }
};

struct Float16 {
  static uint32_t pack(float low, float high) {
    return emulator::to_float16(low) |
           static_cast<uint32_t>(emulator::to_float16(high)) << 16;
  }
  static void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                           uint32_t b1) {
    emulator::multiply_add<emulator::from_float16>(sum, a, b0, b1);
  }
};

struct Grid {
  unsigned x, y, z;
};

template <typename Kernel, typename Params>
int launch_kernel(Kernel kernel, const Grid& grid, unsigned threads,
                  int shared_bytes, Stream, const Params& params) {
  if (shared_bytes > emulated_shared_bytes - 1024) return 1;  // as a GPU would
  emulator::Block& block = emulator::block;
  while (block.fibers.size() > threads) block.fibers.pop_back();
  while (block.fibers.size() < threads) {
    block.fibers.emplace_back();
    block.fibers.back().stack.reset(new char[emulator::kStackBytes]);
  }
  block.exchange.assign(threads * 8, 0);
  block.shared_bytes = static_cast<size_t>(shared_bytes);
  block.shared.resize(block.shared_bytes + 16);
  const uintptr_t start = reinterpret_cast<uintptr_t>(block.shared.data());
  block.shared_begin = block.shared.data() + (16 - start % 16) % 16;
  block.kernel = [kernel, &params] { kernel(params); };
  blockDim = {threads, 1, 1};
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        emulator::run_block();
      }
    }
  }
  ++emulator::kernels_run;
  return 0;
}

}  // namespace clover2

inline void __syncthreads() {
  clover2::emulator::wait(clover2::emulator::State::kAtBlockBarrier);
}
