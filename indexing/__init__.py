"""Unit vectors in, a searchable FAISS index out (numpy and faiss only)."""
