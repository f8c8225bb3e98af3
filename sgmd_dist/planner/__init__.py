"""What a recipe needs of a machine, before it is paid for: bytes, FLOPs, communication, seconds, and what to change."""
