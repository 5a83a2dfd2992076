"""What the package is held against: the stock library's own way from texts to embeddings."""

import torch


def embed_texts(model, texts, batch_size=32):
    """Embeddings by sentence-transformers' own loop, (N, D), float32, on the CPU."""
    with torch.no_grad():
        found = model.encode(
            list(texts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )
    return found.float().cpu()
