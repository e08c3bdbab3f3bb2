"""What the picture commands of `muse` do: pictures in, latents, embeddings and facts out."""
