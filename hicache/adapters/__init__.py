"""What the blocks of a family of transformers compute: one file a family, one class each."""
