"""What an edit is measured by: pure functions of frames uint8 (f, H, W, 3), or of their embeddings by CLIP."""
