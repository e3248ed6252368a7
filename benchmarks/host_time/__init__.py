"""Host time of a skipped step, of this tree and of an earlier commit's."""
