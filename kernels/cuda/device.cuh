// SPDX-License-Identifier: Apache-2.0
// The few machine instructions that the kernels need beyond plain C++, and the
// launch.
//
// Everything here exists a second time, emulated on the host
// (tests/ops/emulated_cuda), so that the kernels, their index arithmetic and
// their barriers run in tests on machines without a GPU. Kernels use nothing
// else of CUDA but threadIdx, blockIdx, blockDim and __syncthreads.
#pragma once

#if defined(CLOVER2_EMULATED_GPU)
  #include "gpu_emulator.h"
#else

  #include <cuda_runtime.h>

  #include <cstdint>

namespace clover2 {

using Stream = cudaStream_t;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}

__device__ __forceinline__ unsigned ballot(bool predicate) {
  return __ballot_sync(kAllLanes, predicate);
}

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Index of the lowest set bit; `word` is not 0.
__device__ __forceinline__ int lowest_bit(unsigned word) {
  return __ffs(static_cast<int>(word)) - 1;
}

// 2^x, 2 ulp; -infinity gives 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x, 1 ulp; infinity gives 0.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Memory of the block whose size is given at launch, 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts copying 16 bytes to shared memory, past L1; zeroes them if not `valid`
// (then `global` is not read). Both addresses are multiples of 16.
__device__ __forceinline__ void copy_16_async(void* shared, const void* global,
                                              bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

// Waits for all copies that this thread started. Others' need a barrier
// besides.
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory to registers. Lane l
// gives the address of row l % 8 of matrix l / 8 and receives, in result[i],
// elements 2 * (l % 4) and the next of row l / 4 of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&result)[4],
                                              const void* row) {
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
      : "r"(shared_address(row)));
}

// The same, each matrix transposed on the way.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&result)[4],
                                                         const void* row) {
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
      : "r"(shared_address(row)));
}

// The 16-bit element types. `multiply_add` is sum += a * b of a 16x16 and a
// 16x8 matrix on the tensor cores, sums in float32. With row = lane / 4 and
// pair = lane % 4:
//   a[0], a[1], a[2], a[3]: rows row, row + 8, row, row + 8; columns 2 * pair
//   and the
//     next (a[0], a[1]), 8 more (a[2], a[3]);
//   b0, b1: rows 2 * pair and the next (b0), 8 more (b1); column row;
//   sum[0], sum[1]: row row, columns 2 * pair and the next; sum[2], sum[3]: row
//   + 8.
struct BFloat16 {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  static __device__ __forceinline__ void multiply_add(float (&sum)[4],
                                                      const uint32_t (&a)[4],
                                                      uint32_t b0,
                                                      uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Float16 {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  static __device__ __forceinline__ void multiply_add(float (&sum)[4],
                                                      const uint32_t (&a)[4],
                                                      uint32_t b0,
                                                      uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Grid {
  unsigned x, y, z;
};

// Launches with `shared_bytes` of dynamic shared memory. Returns cudaSuccess or
// what went wrong, as an int so that callers need no CUDA header.
template <typename Kernel, typename Params>
int launch_kernel(Kernel kernel, const Grid& grid, unsigned threads,
                  int shared_bytes, Stream stream, const Params& params) {
  constexpr int kDefaultLimit =
      48 * 1024;  // more must be asked for, per kernel
  if (shared_bytes > kDefaultLimit) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) {
      (void)cudaGetLastError();  // reported here, not by some later call
      return static_cast<int>(error);
    }
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  const cudaError_t error = cudaLaunchKernel(
      reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y, grid.z),
      dim3(threads), arguments, static_cast<size_t>(shared_bytes), stream);
  if (error != cudaSuccess) (void)cudaGetLastError();
  return static_cast<int>(error);
}

}  // namespace clover2

#endif  // CLOVER2_EMULATED_GPU
