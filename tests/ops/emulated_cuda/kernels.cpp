// SPDX-License-Identifier: Apache-2.0
// All of kernels/cuda compiled for the emulated GPU, as ops of the namespace
// clover2_emulated that take CPU tensors.
#define USE_CUDA

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::accelerator {
struct EmulatedGuard {
  explicit EmulatedGuard(DeviceIndex) {}
  ~EmulatedGuard() {}
};
}  // namespace torch::stable::accelerator

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t,
                                                             void** stream) {
  *stream = nullptr;
  return 0;
}

// Torch's headers are in; from here on the sources mean the emulated GPU.
#define clover2 clover2_emulated
#define CUDA CPU
#define is_cuda is_cpu
#define DeviceGuard EmulatedGuard

#include "cuda/bindings.cpp"
#include "cuda/commit_kv.cu"
#include "cuda/context_nodes.cu"
#include "cuda/tree_accept.cu"
#include "cuda/tree_attention.cu"

extern "C" {

void emulate_falling_order(int falling) {
  clover2::emulator::falling_order = falling != 0;
}

void emulate_multiprocessors(int count) { emulated_multiprocessors = count; }

void emulate_shared_bytes(int bytes) { emulated_shared_bytes = bytes; }

int64_t emulated_kernels_run() { return clover2::emulator::kernels_run; }

}  // extern "C"
