"""Semantic-aware classifier-free guidance for diffusers U-net pipelines. Imports nothing else of this project."""
