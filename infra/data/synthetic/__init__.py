"""What only the embedded data has: planted noise, composed scenes."""
