"""Samplers of masked diffusion models: one loop, and a file for each way to choose positions."""
