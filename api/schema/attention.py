"""Names of attention kernels, as diffusers calls them, and what a server or a request can ask for."""

from __future__ import annotations

NATIVE = "sdpa"
"""Torch's own choice; diffusers calls it ``native``, and both names are taken."""
LOSSY = frozenset({"sage"})
"""These compute in 8 bit: what they give is near what the others give, and not the same within rounding."""
PACKAGES = {"xformers": "xformers", "flash": "flash_attn", "sage": "sageattention"}
"""Those that are in a package of their own."""
FORCED = ("_native_cudnn", "_native_flash", "_native_efficient", "_native_math")
"""One of torch's own kernels and no other."""
ATTENTIONS = ("auto", "native", NATIVE, *PACKAGES, *FORCED)
"""What can be asked for."""


def asked(option: str | None, wants_xformers: bool | None, server: str) -> str:
    """What a request asks for.

    Args:
        option: its ``attention``.
        wants_xformers: its ``xformers_memory_efficient_attention``, the old way to say so.
        server: the setting ``ATTENTION``.
    """
    if option is None and wants_xformers is not None:
        option = "xformers" if wants_xformers else NATIVE if server == "xformers" else None
    chosen = option or server
    return NATIVE if chosen == "native" else chosen
