"""spanfill beside bare vLLM, Ray Data LLM, vLLM's run-batch and transformers, on the same rows and settings."""
