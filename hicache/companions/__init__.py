"""What the authors' repository has beside HiCache: each optional, off by default, in a place of its own."""
