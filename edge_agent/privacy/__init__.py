"""What the owner of a device allows its data to be used for, and what was used of it."""
