"""CUDA's runtime and the capture of its graphs, without a card: strict about what torch would not forgive."""
