"""Samplers of masked diffusion models."""
