"""Answers images with an exported network. It needs onnxruntime, numpy, Pillow, pydantic and rich, but no torch."""
