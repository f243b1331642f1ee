"""CodeGen2.5-7B's configuration with random weights: bare vLLM and spanfill beside what the GPU itself can do."""
