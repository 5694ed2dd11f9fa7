"""What is migrated: RAM blocks, device sections, run state."""
