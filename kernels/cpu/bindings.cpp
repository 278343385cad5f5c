// SPDX-License-Identifier: Apache-2.0
// Registers the CPU kernels. The schemas are declared in
// vllm_clover2/ops/schema.py.
//
// Built against torch's stable ABI, so that one binary serves several torch
// versions; setup.py has the flags.

#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(clover2, CPU, library) {
  library.impl("tree_attention", TORCH_BOX(&clover2::cpu::tree_attention));
  library.impl("tree_accept", TORCH_BOX(&clover2::cpu::tree_accept));
  library.impl("commit_kv", TORCH_BOX(&clover2::cpu::commit_kv));
  library.impl("context_nodes", TORCH_BOX(&clover2::cpu::context_nodes));
  library.impl("add_candidates", TORCH_BOX(&clover2::cpu::add_candidates));
  library.impl("best_candidates", TORCH_BOX(&clover2::cpu::best_candidates));
  library.impl("judge_context", TORCH_BOX(&clover2::cpu::judge_context));
  library.impl("learn_context", TORCH_BOX(&clover2::cpu::learn_context));
  library.impl("top_k_log_probs", TORCH_BOX(&clover2::cpu::top_k_log_probs));
  library.impl("int8_product", TORCH_BOX(&clover2::cpu::int8_product));
  library.impl("packed_linear", TORCH_BOX(&clover2::cpu::packed_linear));
  library.impl("recurrent_step", TORCH_BOX(&clover2::cpu::recurrent_step));
}
