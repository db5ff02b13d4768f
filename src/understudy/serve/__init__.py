"""Models of your own behind the OpenAI routes, and their export to GGUF."""
