"""What a run reads: its heads, files, labels and E0s, in every format, and what is wrong with them."""
