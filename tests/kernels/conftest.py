"""Kernels in the interpreter compute bfloat16 as a GPU does."""

import interpreter_bf16

interpreter_bf16.install()
