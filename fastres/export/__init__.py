"""Trained networks for other programs: plain ATen for ``torch.export`` and ONNX, and weights for torchvision."""

from fastres.export.formats import check_onnx, to_onnx, to_program, write_onnx, write_program, write_weights
from fastres.export.portable import FromPixels, portable

__all__ = [
    "FromPixels",
    "check_onnx",
    "portable",
    "to_onnx",
    "to_program",
    "write_onnx",
    "write_program",
    "write_weights",
]
