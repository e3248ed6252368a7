"""What the authors' repository has beside HiCache: off by default, imported only where it is asked for."""
