"""What the extension offers; the twins in Python say what each function does."""
