"""Fused operations and their gradients on NHWC tensors; torch.compile keeps each of them whole."""

from fastres.ops import flops as _flops  # noqa: F401 - registers its formulas
from fastres.ops.bn_relu import bn_relu
from fastres.ops.conv_bias_act import conv_bias_act, repeat_block, repeat_conv_bias_act, repeat_max_pool
from fastres.ops.global_avg_pool import global_avg_pool
from fastres.ops.graphs import as_one_graph
from fastres.ops.layers import Conv, Identity, Layer, Norm, Statistics, symmetric
from fastres.ops.preact import preact_block, preact_chain
from fastres.ops.residual import residual_block, residual_chain
from fastres.ops.running import update_running
from fastres.ops.select import implementation, selection
from fastres.ops.stem import stem

__all__ = [
    "Conv",
    "Identity",
    "Layer",
    "Norm",
    "Statistics",
    "as_one_graph",
    "bn_relu",
    "conv_bias_act",
    "repeat_block",
    "repeat_conv_bias_act",
    "repeat_max_pool",
    "global_avg_pool",
    "implementation",
    "preact_block",
    "preact_chain",
    "residual_block",
    "residual_chain",
    "selection",
    "stem",
    "symmetric",
    "update_running",
]
