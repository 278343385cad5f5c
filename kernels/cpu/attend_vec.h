// SPDX-License-Identifier: Apache-2.0
// Layout kVec for all dtypes. Included once per instruction set, after simd.h,
// vec_kernel.h and attention.h.

namespace clover2::cpu::CLOVER2_ISA {

inline void attend_vec(const AttentionProblem& problem,
                       const AttentionTask& task) {
  switch (problem.dtype) {
    case ScalarType::Float:
      return Attention<VecKernel<float>>(problem, task).run();
    case ScalarType::BFloat16:
      return Attention<VecKernel<BFloat16>>(problem, task).run();
    default:
      return Attention<VecKernel<Half>>(problem, task).run();
  }
}

}  // namespace clover2::cpu::CLOVER2_ISA
