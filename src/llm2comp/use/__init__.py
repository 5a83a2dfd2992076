"""Using encoders: texts to embeddings."""
