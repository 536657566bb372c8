"""Pure pieces on arrays: attention, masking, positions, patches, randomness."""
