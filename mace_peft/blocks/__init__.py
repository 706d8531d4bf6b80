"""What an operation is, for each package that has some, and how it takes an adapter."""
