"""Serving: tokenizers, infill formats, engines and the replicas that run them."""

from serving.formats import load_format
from serving.once import infill
from serving.tokenizer import load_tokenizer

__all__ = ["infill", "load_format", "load_tokenizer"]
