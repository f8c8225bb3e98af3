"""Shards on disk, the order in which they are read, and the stream of batches that training sees."""
