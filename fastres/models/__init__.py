"""Networks by name."""

from fastres.models.fused import create_fused_model
from fastres.models.registry import create_model, describe_models, model_names

__all__ = ["create_fused_model", "create_model", "describe_models", "model_names"]
