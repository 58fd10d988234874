"""How the bundled demo model, ``demo/shapes``, is made from nothing and judged.

``grammar`` says what can be asked for, ``drawing`` draws it, ``tokens`` / ``autoencoder`` /
``text_encoder`` / ``denoiser`` train the parts, ``checker`` reads a picture back without knowing
how it was drawn, and ``evaluate`` asks the finished model and counts.
Run it with ``scripts/make-demo-model``.
"""
