"""The Sanic app: one module per dialect, and what all of them share."""
