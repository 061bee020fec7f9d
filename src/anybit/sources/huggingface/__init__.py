"""Hugging Face models and their texts. The only importer of transformers."""
