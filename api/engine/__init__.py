"""Where torch lives: models in memory, pipelines over them, and generation.

Knows nothing of HTTP, JSON or base64. Used alone: ``Engine(settings, "cpu").generate(request)``.
"""
