"""What probae writes to disk, and how it is read back."""
