"""Triton kernels of the fused residual blocks, installed as ``fastres.kernels``.

A file holds a family: its mathematics as device code, then thin launchers. Launchers take contiguous NHWC activations
in fp32, fp16 or bf16, weights [Cout, KH, KW, Cin] and fp32 statistics, and return new tensors; they have the signatures
that `fastres.ops.backends.triton` calls them by.
"""

from fastres.kernels.batch_norm import bn_backward_coef, finalize, moments, running_coef
from fastres.kernels.bn_add_relu import bn_act_backward, bn_add_relu, bn_add_relu_backward, bn_backward_apply
from fastres.kernels.conv import bn_add_relu_conv, conv, conv_bias_act
from fastres.kernels.dgrad import conv_dgrad
from fastres.kernels.grads import conv_grads, is_joint
from fastres.kernels.pool import (
    bn_relu_max_pool,
    bn_relu_max_pool_backward,
    global_avg_pool,
    global_avg_pool_backward,
)
from fastres.kernels.wgrad import conv_wgrad

__all__ = [
    "bn_act_backward",
    "bn_add_relu",
    "bn_add_relu_backward",
    "bn_add_relu_conv",
    "bn_backward_apply",
    "bn_backward_coef",
    "bn_relu_max_pool",
    "bn_relu_max_pool_backward",
    "conv",
    "conv_bias_act",
    "conv_dgrad",
    "conv_grads",
    "conv_wgrad",
    "finalize",
    "global_avg_pool",
    "global_avg_pool_backward",
    "is_joint",
    "moments",
    "running_coef",
]
