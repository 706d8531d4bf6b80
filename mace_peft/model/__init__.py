"""A model with adapters: where they go, how they are put in and taken out, and the class that keeps them."""
