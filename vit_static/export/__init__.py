"""Export trained models for Paddle Inference and ONNX Runtime."""
