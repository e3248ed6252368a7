"""What the commands share: timing, the machine, tables and arguments."""
