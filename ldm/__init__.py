"""The Stable Diffusion v1 reference toolkit, made anew."""

__version__ = "0.1.0"
