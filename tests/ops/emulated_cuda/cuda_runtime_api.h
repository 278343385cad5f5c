// SPDX-License-Identifier: Apache-2.0
// The little that kernels/cuda/bindings.cpp asks of the CUDA runtime, for a GPU
// that is emulated: see gpu_emulator.h.
#pragma once

using cudaError_t = int;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};

inline int emulated_multiprocessors = 132;
inline int emulated_shared_bytes = 228 * 1024;  // of one multiprocessor

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute,
                                          int) {
  *value = attribute == cudaDevAttrMultiProcessorCount
               ? emulated_multiprocessors
               : emulated_shared_bytes;
  return 0;
}

inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
