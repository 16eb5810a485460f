"""The one decoder, and what is done with small images in bulk."""
