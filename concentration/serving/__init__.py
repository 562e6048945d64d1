"""What answers with an exported network: onnxruntime, numpy, Pillow, pydantic and rich, and neither torch nor the trainer."""
