"""The adapter directory: what it holds, and how foundation + directory make the trained model."""
