"""Families of kernels, by the names that they have in a profile."""

import pytest

from benchmarks.suites.breakdown import family


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("difference_kernel", "matching"),
        ("sums_kernel", "normalisation"),
        ("coefficients_kernel", "normalisation"),
        ("combine_kernel", "normalisation"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>(...)", "normalisation"),
        ("step_kernel", "optimizer"),
        ("adjoint_kernel", "optimizer"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, threshold_kernel_impl<float>(...)>", "activation"),
        ("void at::native::vectorized_elementwise_kernel<4, launch_clamp_scalar(...)>", "activation"),
        ("sm80_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x128x16", "convolution"),
        ("void implicit_convolve_sgemm<float, float, 1024, 5, 5, 3, 3, 3, 1, false, false, true>(...)", "convolution"),
        ("cutlass__5x_cudnn::Kernel<cutlass_tensorop_s1688wgrad_optimized_tf32_128x128>", "convolution"),
        ("sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x32_warpgroupsize1x1x1", "products"),
        ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x64_8x5_nn_align1>(...)", "products"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "sums"),
        ("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda(...)>", "copies"),
        ("void at::native::max_pool_backward_nhwc<float>", "pooling"),
        ("void at::native::reduce_kernel<512, 1, ...>", "rest"),
    ],
)
def test_family(name: str, expected: str) -> None:
    assert family(name) == expected
