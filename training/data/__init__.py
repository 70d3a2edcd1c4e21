"""From pictures, captions, masks and conditions to batches."""
