"""What the model really does for you: the record log, the store over it, and what is read from it."""
