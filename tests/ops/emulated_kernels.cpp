// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels and their launchers, compiled for the emulated GPU. Parameters come
// from Python (test_cuda_emulated.py) as the structs of launch.h.
#include "cuda/commit_kv.cu"
#include "cuda/tree_accept.cu"
#include "cuda/tree_attention.cu"

extern "C" {

void emulate_falling_order(int falling) {
  clover2::emulator::falling_order = falling != 0;
}

int64_t emulated_kernels_run() { return clover2::emulator::kernels_run; }

// Sizes in bytes, to check that Python declares the structs alike.
int64_t size_of_tree_attention() { return sizeof(clover2::TreeAttentionParams); }
int64_t size_of_tree_accept() { return sizeof(clover2::TreeAcceptParams); }
int64_t size_of_commit_kv() { return sizeof(clover2::CommitKvParams); }

void plan_tree_attention(clover2::TreeAttentionParams* params, int type,
                         int multiprocessors) {
  clover2::plan_tree_attention(
      *params, static_cast<clover2::AttentionType>(type), multiprocessors);
}

int launch_tree_attention(const clover2::TreeAttentionParams* params, int type) {
  return clover2::launch_tree_attention(
      *params, static_cast<clover2::AttentionType>(type), nullptr);
}

int launch_tree_accept(const clover2::TreeAcceptParams* params) {
  return clover2::launch_tree_accept(*params, nullptr);
}

int launch_commit_kv(const clover2::CommitKvParams* params) {
  return clover2::launch_commit_kv(*params, nullptr);
}

}  // extern "C"
