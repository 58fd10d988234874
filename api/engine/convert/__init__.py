"""The process that reads weights from anywhere and writes them as a diffusers folder of safetensors."""
