"""Trained networks for other programs: ATen for ``torch.export`` and ONNX, weights for torchvision and timm."""

from fastres.export.formats import check_onnx, to_onnx, to_program, write_onnx, write_program, write_weights
from fastres.export.portable import FromPixels, portable
from fastres.export.weights import to_safetensors, write_hub, write_safetensors

__all__ = [
    "FromPixels",
    "check_onnx",
    "portable",
    "to_onnx",
    "to_program",
    "to_safetensors",
    "write_hub",
    "write_onnx",
    "write_program",
    "write_safetensors",
    "write_weights",
]
