"""What goes with HiCache and is no part of it: each in a place of its own, and imported when it is used."""
