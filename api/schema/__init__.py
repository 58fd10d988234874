"""Plain data that every room shares. No torch, no sanic."""
