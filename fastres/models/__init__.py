"""Networks by name."""

from fastres.models.registry import create_model, describe_models, model_names

__all__ = ["create_model", "describe_models", "model_names"]
