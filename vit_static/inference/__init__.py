"""Run exported models: predict, serve, visualize."""
