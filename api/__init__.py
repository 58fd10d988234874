"""diffusers-api: one container that serves every diffusers model over HTTP."""

__version__ = "0.1.0"
