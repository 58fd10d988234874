"""Compiled blocks of denoisers, prepared in another process, and CUDA graphs of their calls: see docs/compile.md."""
